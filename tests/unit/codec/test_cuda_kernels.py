"""The GPU kernels, emulated on the CPU (emulate.py): their bytes are the native codec's.

But for the last bit of Euclidean norms, which these seeds do not show.
"""

import ctypes
import warnings

import emulate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_quant import NUQSGD, QSGD
from hvd_quant.codec import cuda, native, torch_ops
from hvd_quant.codec.message import DTYPES, MessageLayout, Segment
from hvd_quant.codec.noise import Noise

CPU = torch.device("cpu")

schemes = st.builds(
    lambda kind, bits, norm, bucket_size, rounding: kind(bits, norm, bucket_size, rounding=rounding),
    st.sampled_from([QSGD, NUQSGD]),
    st.integers(2, 8),
    st.sampled_from(["max", "l2"]),
    st.sampled_from([8, 64, 512, 1000, 4096, 2**40]),
    st.sampled_from(["independent", "nearest", "correlated"]),
)
tensors = st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(DTYPES), schemes), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def kernels():
    return emulate.kernels()


def as_array(tensor):
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def draw(rng, count, dtype):
    """Values of many magnitudes, subnormal and zeros among them, and now and then one that is not finite."""
    x = rng.standard_normal(count) * np.exp2(rng.choice([-149, -130, -100, -3, 0, 3, 100], count and 1))
    x[rng.random(count) < 0.1] = 0.0
    if count and rng.random() < 0.2:
        x[rng.integers(count)] = rng.choice([np.nan, np.inf, -np.inf])
    with np.errstate(over="ignore"):
        return torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype))


@given(tensors, st.integers(0, 2**32), st.booleans(), st.sampled_from([1, 2, 7]))
def test_messages_are_those_of_the_native_codec(kernels, kinds, seed, error_feedback, blocks):
    rng = np.random.default_rng(seed)
    layout = MessageLayout(
        [Segment(i, 0, count, dtype, scheme) for i, (count, dtype, scheme) in enumerate(kinds)], rng.bytes(8)
    )
    if not kernels.take(layout):
        assert layout.count == 0
        return
    kernels = emulate.kernels(blocks)
    values = [draw(rng, count, dtype) for count, dtype, _ in kinds]
    residuals = (
        [draw(rng, len(one), "float32").nan_to_num_(0, 0, 0) for one in values] if error_feedback else []
    )
    noise = Noise(
        rng.integers(0, 2**64, len(kinds), np.uint64), rng.integers(0, 2**24, len(kinds), dtype=np.uint32)
    )
    kept = [one.numpy().copy() for one in residuals]
    expected = np.full(layout.size, 0xAB, np.uint8)
    native.encode_message([as_array(one) for one in values], layout, noise, expected, kept)
    message = torch.full((layout.size,), 0xCD, dtype=torch.uint8)
    kernels.encode(values, layout, noise, message, residuals)
    assert message.numpy().tobytes() == expected.tobytes()
    for one, by_native in zip(residuals, kept, strict=True):
        np.testing.assert_array_equal(one.numpy().view(np.uint32), by_native.view(np.uint32))

    means = [torch.full_like(one, 7.0) for one in values]
    expected_means = [torch.full_like(one, 9.0) for one in values]
    native.decode_messages([expected] * 3, layout, [as_array(one) for one in expected_means], 0.7)
    assert not kernels.decode([message] * 3, layout, means, 0.7).any()
    for mean, by_native in zip(means, expected_means, strict=True):
        np.testing.assert_array_equal(mean.double().numpy(), by_native.double().numpy())


def on_kernels(monkeypatch, kernels):
    monkeypatch.setattr(cuda, "kernels", lambda _: kernels)


def test_gradients_that_are_views(kernels, monkeypatch):
    """Negated and transposed ones, and results that go to such."""
    on_kernels(monkeypatch, kernels)
    x = torch.randn(24, 50)
    negated = torch.complex(torch.zeros(24, 50), x).conj().imag
    assert negated.is_neg()
    plain, views = [-x, x.t().contiguous()], [negated, x.t()]
    layout = MessageLayout([Segment(i, 0, 1200, "float32", QSGD(8)) for i in range(2)], bytes(8))
    noise = Noise(np.zeros(2, np.uint64), np.zeros(2, np.uint32))
    expected, message = torch.empty(2, layout.size, dtype=torch.uint8)
    torch_ops.encode_message(plain, layout, noise, expected)
    torch_ops.encode_message(views, layout, noise, message)
    assert torch.equal(message, expected)
    assert torch.equal(
        torch_ops.encode(negated.view(-1), QSGD(8), 1), torch_ops.encode(-x.view(-1), QSGD(8), 1)
    )
    with pytest.raises(RuntimeError, match="view"):
        torch_ops.decode_messages([message], layout, [torch.empty(24, 50), torch.empty(24, 50).t()])


def test_what_only_the_kernels_find_is_an_error(kernels, monkeypatch):
    on_kernels(monkeypatch, kernels)
    layout, values, noise = example()
    message = torch.empty(layout.size, dtype=torch.uint8)
    torch_ops.encode_message(values, layout, noise, message)
    payload, out = torch_ops.encode(values[0], QSGD(4), 1), [torch.empty_like(one) for one in values]
    torch_ops.decode_messages([message], layout, out)
    torch_ops.decode_mean([payload])
    monkeypatch.setattr(kernels, "decode", lambda *_, **__: torch.ones(1))
    with pytest.raises(ValueError, match="kernels find damage"):
        torch_ops.decode_messages([message], layout, out)
    with pytest.raises(ValueError, match="kernels find damage"):
        torch_ops.decode_mean([payload])


@pytest.mark.parametrize("size", [0, 1, 7, 8, 93, 96, -1, -8])
def test_messages_of_another_size(kernels, monkeypatch, size):
    on_kernels(monkeypatch, kernels)
    layout, values, noise = example()
    message = torch.empty(layout.size, dtype=torch.uint8)
    torch_ops.encode_message(values, layout, noise, message)
    with pytest.raises(ValueError, match="message 1"):
        torch_ops.decode_messages(
            [message, message[:size]], layout, [torch.empty_like(one) for one in values]
        )


def example():
    layout = MessageLayout(
        [Segment(0, 0, 1000, "float32", QSGD(3, bucket_size=64)), Segment(1, 3, 77, "float32", NUQSGD(5))],
        bytes(8),
    )
    values = [torch.randn(1000), torch.randn(80)]
    noise = Noise(np.array([3, 4], np.uint64), np.zeros(2, np.uint32))
    return layout, values, noise


def test_every_changed_bit_is_found(kernels):
    layout, values, noise = example()
    message = torch.empty(layout.size, dtype=torch.uint8)
    kernels.encode(values, layout, noise, message)
    out = [torch.empty_like(one) for one in values]
    for place in range(layout.size):
        damaged = message.clone()
        damaged[place] ^= 1 << place % 8
        assert kernels.decode([message, damaged], layout, out, 1.0).any(), place
    assert not kernels.decode([message, message], layout, out, 1.0).any()


def test_values_beside_the_segments_are_left_alone(kernels):
    layout, values, noise = example()
    message = torch.empty(layout.size, dtype=torch.uint8)
    kernels.encode(values, layout, noise, message)
    out = [torch.full_like(one, 7.0) for one in values]
    kernels.decode([message], layout, out, 1.0)
    assert (out[1][:3] == 7.0).all()
    assert (out[1][3:] != 7.0).all()


@pytest.mark.parametrize(
    ("scheme", "count", "taken"),
    [
        (QSGD(), 10, True),
        (QSGD(), 0, False),
        (QSGD(coding="elias"), 10, False),
        (QSGD(bucket_size=12), 100, False),
        (QSGD(bucket_size=12), 12, True),
        (QSGD(bucket_size=2**17), 2**17, False),
        (QSGD(bucket_size=2**17), 2**16, True),
    ],
)
def test_what_they_take(scheme, count, taken):
    assert cuda.Kernels.take(MessageLayout([Segment(0, 0, count, "float32", scheme)], bytes(8))) == taken


# --- the capability check ---------------------------------------------------------------------------------


def test_there_are_none_on_a_cpu():
    assert cuda.kernels(CPU) is None


@pytest.fixture
def gpu(monkeypatch):
    """A device that says it is a GPU, for which the kernels compile."""
    monkeypatch.setattr(cuda, "_compile", lambda *_: emulate.kernels())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "_agree_with_native", lambda kernels, _: cuda_agrees(kernels, CPU))
    monkeypatch.delenv(cuda.SWITCH, raising=False)
    cuda.kernels.cache_clear()
    yield torch.device("cuda", 0)
    cuda.kernels.cache_clear()


cuda_agrees = cuda._agree_with_native


def test_they_are_tried_and_then_used(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(cuda.kernels(gpu), cuda.Kernels)


def test_the_switch(gpu, monkeypatch):
    monkeypatch.setenv(cuda.SWITCH, "off")
    assert cuda.kernels(gpu) is None
    cuda.kernels.cache_clear()
    monkeypatch.setenv(cuda.SWITCH, "on")
    with pytest.raises(ValueError, match="HVD_QUANT_GPU_KERNELS must be 'auto' or 'off', not 'on'"):
        cuda.kernels(gpu)


def test_there_are_none_on_the_gpus_of_others(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.kernels(gpu) is None


def test_kernels_that_do_not_compile_are_not_used(gpu, monkeypatch):
    def fail(*_):
        raise RuntimeError("NVRTC says no")

    monkeypatch.setattr(cuda, "_compile", fail)
    with pytest.warns(UserWarning, match="plain torch operations encode instead.*NVRTC says no"):
        assert cuda.kernels(gpu) is None


def write_another_code(arguments):
    arguments[3][-20] ^= 1


def write_another_mean(arguments):
    out = ctypes.c_float.from_address(arguments[0].view(torch.int64)[0].item())
    out.value += 0.25


def find_damage(arguments):
    arguments[-1].fill_(1)


def find_nothing(arguments):
    arguments[-1].fill_(0)
    arguments[-2].fill_(0)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("encode", write_another_code),
        ("decode", write_another_mean),
        ("check", find_damage),
        ("check", find_nothing),
    ],
)
def test_kernels_that_compute_something_else_are_not_used(gpu, name, spoil, monkeypatch):
    def launch(kernel, blocks, threads, arguments):
        emulate.launch(kernel, blocks, threads, arguments)
        if kernel == f"hvd_quant_{name}":
            spoil(arguments)

    monkeypatch.setattr(cuda, "_compile", lambda *_: cuda.Kernels(launch, 3, 64, CPU))
    with pytest.warns(UserWarning, match="plain torch operations encode instead"):
        assert cuda.kernels(gpu) is None


def test_replays_of_a_graph_have_other_noise(kernels, monkeypatch):
    layout, values, noise = example()
    messages = []
    monkeypatch.setattr(cuda, "capturing", lambda _: True)
    for _ in range(3):
        message = torch.empty(layout.size, dtype=torch.uint8)
        kernels.encode(values, layout, noise, message)
        out = [torch.empty_like(one) for one in values]
        assert not kernels.decode([message], layout, out, 1.0).any()
        messages.append(message.numpy().tobytes())
    assert len(set(messages)) == 3
