"""Numbers -> payload -> numbers, for every backend and instruction set (promises 3 and 5)."""

import dataclasses
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from hvd_quant import NUQSGD, QSGD, decode, encode, native_isa, wire
from hvd_quant.codec import _native, flat_array, native, torch_ops

KINDS = [QSGD, NUQSGD]


def schemes_of(bucket_size):
    kinds, bits, norms = st.sampled_from(KINDS), st.integers(2, 8), st.sampled_from(["max", "l2"])
    return st.builds(lambda kind, *fields: kind(*fields), kinds, bits, norms, bucket_size)


schemes = schemes_of(st.integers(1, 70))
# One below the largest float32, which test_largest_values looks at.
LARGE = float(np.nextafter(np.finfo(np.float32).max, np.float32(0)))
floats = st.floats(-LARGE, LARGE, width=32)
arrays = npst.arrays(np.float32, st.integers(0, 200), elements=floats, fill=st.nothing())


def gaussian(n, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(n).astype(dtype)


def bits_of(x):
    """The values' bit patterns, which tell -0.0 from 0.0 and one NaN from another."""
    return x.view(f"u{x.itemsize}")


def norms_of(payload, scheme, count):
    """The norm of each value's bucket, float64."""
    norms = payload[wire.HEADER_SIZE :][: wire.norms_size(scheme, count)].view(np.float32)
    return np.repeat(norms.astype(np.float64), min(scheme.bucket_size, max(count, 1)))[:count]


def smallest_norm(scheme):
    """What torch's operations raise smaller norms to; see docs/wire-format.md."""
    return (scheme.num_levels if scheme.spacing == "uniform" else 2) * 2.0**-126


def assert_within_a_step(values, decoded, payload, scheme):
    """Each finite value is off by less than the distance of the two levels around it, but for rounding."""
    norms = norms_of(payload, scheme, values.size)
    error = np.abs(decoded.astype(np.float64) - values.astype(np.float64))
    finite = np.isfinite(norms)
    if scheme.spacing == "uniform":
        step = norms / scheme.num_levels
    else:  # between a power of two and the next, the distance is the lower one, so below the value
        step = np.maximum(norms * scheme.levels()[1], np.abs(values.astype(np.float64)))
    assert (error <= step + norms * 2.0**-22 + 2.0**-149)[finite].all()
    assert np.isnan(decoded[~finite]).all()


# --- round trip -----------------------------------------------------------------------------------------


@given(arrays, schemes, st.integers(0, 2**64 - 1))
def test_error_is_at_most_one_step(backend, values, scheme, seed):
    payload = encode(values, scheme, seed=seed, backend=backend)
    assert payload.dtype == np.uint8
    assert payload.shape == (wire.payload_size(scheme, values.size),)
    decoded = decode(payload, backend=backend)
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    assert_within_a_step(values, decoded, payload, scheme)


@given(arrays, schemes)
def test_norms_are_those_of_the_buckets(backend, values, scheme):
    with np.errstate(over="ignore"):
        starts = range(0, values.size, scheme.bucket_size)
        buckets = [values[start : start + scheme.bucket_size].astype(np.float64) for start in starts]
        order = np.inf if scheme.norm == "max" else 2
        expected = np.array([np.linalg.norm(bucket, order) for bucket in buckets]).astype(np.float32)
    payload = encode(values, scheme, backend=backend)
    norms = payload[wire.HEADER_SIZE :][: 4 * expected.size].view(np.float32)
    # What float32 cannot hold is sent as NaN.
    expected = np.where(np.isinf(expected), np.nan, expected)
    if backend == "torch":
        norms = np.where(np.isinf(norms), np.nan, norms)
        raised = (norms == smallest_norm(scheme)) & (expected < norms)
        expected = np.where(raised, norms, expected)
    # A sum of squares may be rounded in another order.
    np.testing.assert_allclose(norms, expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("exponent", [-140, -100, -91, -90, 0, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_values_on_a_level_are_exact(backend, kind, bits, exponent):
    scheme = kind(bits=bits, norm="max", bucket_size=2 * 127)
    levels = np.append(-scheme.levels()[:0:-1], scheme.levels())
    if kind is QSGD:
        levels = np.round(
            levels * scheme.num_levels
        )  # the norm s * 2^e makes every step of the arithmetic exact
    values = np.ldexp(np.tile(levels, 3000 // levels.size)[: 10 * scheme.bucket_size], exponent)
    values = np.concatenate([values, np.ldexp(levels, exponent)]).astype(np.float32)
    for seed in range(3):
        payload = encode(values, scheme, seed=seed, backend=backend)
        decoded = decode(payload, backend=backend)
        if backend == "torch" and values.max() < smallest_norm(scheme):
            assert_within_a_step(values, decoded, payload, scheme)
        else:
            np.testing.assert_array_equal(decoded, values)


@given(arrays, schemes, st.integers(0, 2**32))
def test_backends_read_each_other(backend, on_gpu, values, scheme, seed):
    payload = encode(values, scheme, seed=seed, backend=backend)
    by_native, by_torch = decode(payload, backend="native"), decode(payload, backend="torch")
    if on_gpu:  # whose NaNs are others
        np.testing.assert_array_equal(np.isnan(by_native), np.isnan(by_torch))
        by_native, by_torch = np.nan_to_num(by_native), np.nan_to_num(by_torch)
    np.testing.assert_array_equal(bits_of(by_native), bits_of(by_torch))


def of_every_isa(function):
    """The results of a call under each instruction set of this machine."""
    before, results = _native.isa(), []
    for isa in _native.available_isas():
        _native.choose_isa(isa)
        assert native_isa() == isa
        results.append(function())
    _native.choose_isa(before)
    return results


@given(
    values=arrays | st.integers(0, 9000).map(gaussian),
    scheme=schemes | schemes_of(st.integers(1, 9000)),
    seed=st.integers(0, 2**64 - 1),
    dtype=st.sampled_from([np.float32, np.float64, np.float16]),
)
@settings(max_examples=200)
def test_instruction_sets_agree(values, scheme, seed, dtype):
    with np.errstate(over="ignore"):
        values = values.astype(dtype)
    first, *others = of_every_isa(lambda: native.encode(values, scheme, seed).tobytes())
    assert all(other == first for other in others)
    payload = np.frombuffer(first, np.uint8)
    out = [np.empty(values.size, dtype) for _ in range(len(others) + 1)]
    waiting = iter(out)
    of_every_isa(lambda: native.decode_mean([payload, payload, payload], next(waiting), factor=0.7))
    for other in out[1:]:
        np.testing.assert_array_equal(bits_of(other), bits_of(out[0]))


def test_unknown_instruction_set():
    before = _native.isa()
    with pytest.raises(ValueError, match="no instruction set 'mmx' on this machine; available: portable"):
        _native.choose_isa("mmx")
    _native.choose_isa(before)


# --- types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_dtypes_of_arrays(backend, dtype):
    values, scheme = gaussian(5000, dtype=dtype), QSGD(bits=5, bucket_size=48)
    payload = encode(values, scheme, seed=3, backend=backend)
    # What is encoded is the value as float32.
    same = encode(values.astype(np.float32), scheme, seed=3, backend=backend)
    np.testing.assert_array_equal(payload, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_of_tensors(backend, dtype):
    values, scheme = torch.from_numpy(gaussian(5000)).to(dtype), QSGD(bits=5, bucket_size=48)
    payload = encode(values, scheme, seed=3, backend=backend)
    assert isinstance(payload, torch.Tensor)
    assert payload.dtype == torch.uint8
    assert torch.equal(payload, encode(values.float(), scheme, seed=3, backend=backend))
    decoded = decode(payload, backend=backend)
    assert isinstance(decoded, torch.Tensor)
    assert (decoded.dtype, decoded.shape) == (torch.float32, (5000,))


def test_every_half_precision_value_is_read_right(isa):
    # Buckets of one value are exact, so decoding gives back what was read.
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype, expected in [
        ("float16", patterns.view(np.float16).astype(np.float32)),
        ("bfloat16", (patterns.astype(np.uint32) << 16).view(np.float32)),
    ]:
        payload = native.encode(patterns, QSGD(bits=2, bucket_size=1), 0, dtype=dtype)
        expected = np.where(np.isfinite(expected), expected, np.nan)
        np.testing.assert_array_equal(native.decode_mean([payload]), expected)


def test_decoding_into_every_dtype(isa):
    # All magnitudes from subnormal to overflow, and where half types round and tie. In a bucket of one value
    # the norm is the value.
    rng = np.random.default_rng(5)
    values = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, gaussian(2000) * 1e-6, gaussian(2000) * 6e4]).astype(np.float32)
    values = np.concatenate([values, (bits_of(values) & 0xFFFF8000).view(np.float32)])
    values = np.concatenate([values, (bits_of(values) & 0xFFFFF000).view(np.float32)])
    payload = native.encode(values, QSGD(bits=2, bucket_size=1), 0)
    single = native.decode_mean([payload])
    with np.errstate(over="ignore"):
        for dtype in (np.float32, np.float64, np.float16):
            out = np.empty(values.size, dtype)
            assert native.decode_mean([payload], out) is out
            np.testing.assert_array_equal(out, single.astype(dtype))
    out = np.empty(values.size, np.int16)
    native.decode_mean([payload], out, dtype="bfloat16")
    expected = torch.from_numpy(single).to(torch.bfloat16)
    result = torch.from_numpy(out).view(torch.bfloat16)
    np.testing.assert_array_equal(result.float().numpy(), expected.float().numpy())


def test_decoding_many_values_into_every_dtype(isa):
    # Large outputs are written past the caches; to addresses that are not aligned they cannot be.
    values, scheme = gaussian(3_000_000), QSGD(bits=4, bucket_size=1000)
    payload = native.encode(values, scheme, 0)
    expected = decode(payload, backend="torch")
    for dtype in (np.float32, np.float64, np.float16):
        for first in (0, 1):
            out = np.zeros(values.size + 2, dtype)
            native.decode_mean([payload], out[first : first + values.size])
            np.testing.assert_array_equal(out[first : first + values.size], expected.astype(dtype))
            assert out[first + values.size] == 0
            assert first == 0 or out[0] == 0


@pytest.mark.parametrize(
    "x",
    [
        np.arange(3),
        np.ones(3, bool),
        np.ones(3, np.complex64),
        np.ones(3, np.longdouble),
        np.array(["a"]),
        np.array([None]),
        [1.0, 2.0],
        (1.0,),
        "gradient",
        b"gradient",
        1.5,
        None,
        torch.arange(3),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, 3).to_sparse(),
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}-{getattr(x, 'layout', '')}",
)
def test_other_input_is_a_type_error(backend, x):
    with pytest.raises(TypeError, match="x must be "):
        encode(x, QSGD(), backend=backend)


@pytest.mark.parametrize("scheme", [None, "qsgd", QSGD, {"bits": 4}, 4])
def test_other_schemes_are_type_errors(scheme):
    with pytest.raises(TypeError, match="scheme must be a scheme such as"):
        encode(np.ones(3, np.float32), scheme)


@pytest.mark.parametrize(
    "payload", [None, "payload", [1, 2], np.ones(40), np.ones((1, 40), np.uint8), torch.ones(40), 40]
)
def test_other_payloads_are_type_errors(backend, payload):
    with pytest.raises(TypeError, match="payload must be "):
        decode(payload, backend=backend)


@pytest.mark.parametrize(("name", "error"), [("cuda", ValueError), ("", ValueError), (None, TypeError)])
def test_unknown_backend(name, error):
    payload = encode(np.ones(3, np.float32), QSGD())
    with pytest.raises(error, match="backend must be 'auto' or 'native' or 'torch'"):
        encode(np.ones(3, np.float32), QSGD(), backend=name)
    with pytest.raises(error, match="backend must be 'auto' or 'native' or 'torch'"):
        decode(payload, backend=name)


def test_auto_is_native_on_cpu():
    x = gaussian(1000)
    native_payload = encode(x, QSGD(), backend="native")
    assert not np.array_equal(native_payload, encode(x, QSGD(), backend="torch"))
    np.testing.assert_array_equal(encode(x, QSGD()), native_payload)
    np.testing.assert_array_equal(encode(torch.from_numpy(x), QSGD()).numpy(), native_payload)


def test_payload_may_be_bytes_or_any_view(backend):
    payload = encode(gaussian(100), QSGD(), backend=backend)
    expected = decode(payload, backend=backend)
    shifted = np.concatenate([np.zeros(1, np.uint8), payload])[1:]
    spread = np.repeat(payload, 2)[::2]
    for other in (payload.tobytes(), bytearray(payload), memoryview(payload), shifted, spread):
        decoded = decode(other, backend=backend)
        assert isinstance(decoded, np.ndarray)
        np.testing.assert_array_equal(decoded, expected)
    for other in (shifted, spread):
        tensor = torch.from_numpy(other.base if other.base is not None else other)
        tensor = tensor[1:] if other is shifted else tensor[::2]
        np.testing.assert_array_equal(decode(tensor, backend=backend).numpy(), expected)


# --- shapes and memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_size", [1, 3, 512, 2**63 - 1])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 4), (5, 7), (2, 3, 4, 5)])
def test_shapes(backend, shape, bucket_size):
    values, scheme = gaussian(shape), QSGD(bits=4, bucket_size=bucket_size)
    values = np.asarray(values, np.float32)
    payload = encode(values, scheme, backend=backend)
    assert_within_a_step(values.reshape(-1), decode(payload, backend=backend), payload, scheme)
    same = encode(torch.from_numpy(values.copy()), scheme, backend=backend)
    np.testing.assert_array_equal(same.numpy(), payload)


def test_order_is_row_major_however_memory_is_laid_out(backend):
    values, scheme = gaussian((40, 60)), QSGD(bits=6, bucket_size=100)
    expected = encode(values, scheme, backend=backend)
    unaligned = np.frombuffer(b"x" + values.tobytes(), np.float32, offset=1).reshape(values.shape)
    read_only = np.frombuffer(values.tobytes(), np.float32)
    spread = np.repeat(values, 3, axis=1)[:, ::3]
    backwards = values[::-1, ::-1].copy()[::-1, ::-1]
    foreign = values.astype(values.dtype.newbyteorder())
    for same in (
        np.asfortranarray(values),
        values.T.copy().T,
        unaligned,
        read_only,
        spread,
        backwards,
        foreign,
    ):
        np.testing.assert_array_equal(encode(same, scheme, backend=backend), expected)
    tensor = torch.from_numpy(values)
    for same in (tensor.T.contiguous().T, torch.from_numpy(np.repeat(values, 3, axis=1))[:, ::3]):
        assert not same.is_contiguous()
        np.testing.assert_array_equal(encode(same, scheme, backend=backend).numpy(), expected)


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_input_is_not_modified(backend, bad):
    values = gaussian(3000)
    values[7] = bad
    before = values.copy()
    payload = encode(values, QSGD(), backend=backend)
    tensor_payload = encode(torch.from_numpy(values), QSGD(), backend=backend)
    np.testing.assert_array_equal(bits_of(values), bits_of(before))
    for one in (payload, tensor_payload):
        kept = bytes(one)
        decode(one, backend=backend)
        assert bytes(one) == kept


def test_tensors_that_require_grad(backend):
    values = torch.from_numpy(gaussian(100)).requires_grad_()
    payload = encode(values, QSGD(), backend=backend)
    assert not payload.requires_grad
    assert torch.equal(payload, encode(values.detach(), QSGD(), backend=backend))
    assert not decode(payload, backend=backend).requires_grad
    assert values.grad is None


# --- special values -------------------------------------------------------------------------------------


def test_zeros(backend):
    values = np.array([0.0, -0.0] * 700, np.float32)
    for norm in ("max", "l2"):
        decoded = decode(encode(values, QSGD(norm=norm, bucket_size=64), backend=backend), backend=backend)
        np.testing.assert_array_equal(bits_of(decoded), 0)


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-126, 2.0**-100, 2.0**-90, 2.0**-89])
@pytest.mark.parametrize(
    ("kind", "bits", "correlation"), [(QSGD, 8, 0.99), (NUQSGD, 8, 0.95), (QSGD, 5, 0.85), (QSGD, 3, 0.5)]
)
def test_tiny_values(backend, norm, scale, kind, bits, correlation):
    values = (np.random.default_rng(1).integers(-100, 101, 4096) * scale).astype(np.float32)
    scheme = kind(bits=bits, norm=norm, bucket_size=64)
    payload = encode(values, scheme, backend=backend)
    decoded = decode(payload, backend=backend)
    assert_within_a_step(values, decoded, payload, scheme)
    if backend == "native" or 100 * scale >= smallest_norm(scheme):
        assert np.corrcoef(values / scale, decoded / scale)[0, 1] > correlation


@pytest.mark.parametrize("noise", ["least", "most"])
@pytest.mark.parametrize(
    "scheme", [kind(bits, "max") for kind in (QSGD, NUQSGD) for bits in range(2, 9)], ids=str
)
def test_values_on_levels_stay_there_in_torch(scheme, noise, monkeypatch):
    """Whatever is drawn, for whatever norm, and the norm's neighbours stay below it."""

    def uniform(x, low, high, **_):  # float32 may round what is drawn up to `high`
        return x.fill_(low if noise == "least" else high)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(
        torch.Tensor, "random_", lambda x, low, high, **_: x.fill_(low if noise == "least" else high - 1)
    )
    levels, rng = np.concatenate([-scheme.levels(), scheme.levels()]), np.random.default_rng(3)
    whole = dataclasses.replace(scheme, bucket_size=levels.size)
    norms = (scheme.num_levels if scheme.spacing == "uniform" else 1) * rng.integers(1, 2**15, (500, 1))
    values = (norms * levels).astype(np.float32)  # exactly
    decoded = decode(encode(values.ravel(), whole, backend="torch"), backend="torch")
    np.testing.assert_array_equal(decoded, values.ravel())

    norms = rng.uniform(1, 2, (500, 1)).astype(np.float32)
    values = norms * np.array([1, -1, *np.nextafter(np.float32([1, -1]), np.float32(0))])
    payload = encode(values.ravel(), dataclasses.replace(scheme, bucket_size=4), backend="torch")
    decoded = decode(payload, backend="torch").reshape(-1, 4)
    assert (np.abs(decoded) <= norms * (1 + 2.0**-22)).all()
    assert (decoded * values >= 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_largest_values(backend, bits):
    scheme = QSGD(bits=bits, bucket_size=5)
    largest = np.finfo(np.float32).max
    almost = np.nextafter(largest, np.float32(0))
    values = np.array([almost, -almost, almost / 2, 0, 1] * 13, np.float32)
    payload = encode(values, scheme, backend=backend)
    assert_within_a_step(values, decode(payload, backend=backend), payload, scheme)
    # s * (N / s) may be rounded up by one unit in the last place: from the largest float32, to Inf.
    values[0] = largest
    decoded = decode(encode(values, scheme, backend=backend), backend=backend)
    assert decoded[0] in (largest, np.inf)
    # Where float32 cannot hold the Euclidean norm, the bucket is non-finite as a whole.
    overflow = encode(values, QSGD(bits=bits, norm="l2", bucket_size=5), backend=backend)
    assert np.isnan(decode(overflow, backend=backend)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_largest_values_rounded_to_powers(backend, bits):
    scheme = NUQSGD(bits=bits, norm="max", bucket_size=5)
    largest = np.finfo(np.float32).max
    values = np.array([largest, -largest, largest / 2 if bits > 2 else 0, 0, 0] * 13, np.float32)
    for seed in range(3):
        decoded = decode(encode(values, scheme, seed=seed, backend=backend), backend=backend)
        np.testing.assert_array_equal(decoded, values)
    values[3] = largest * 0.7
    payload = encode(values, scheme, backend=backend)
    assert_within_a_step(values, decode(payload, backend=backend), payload, scheme)


def test_beyond_float32_is_non_finite(backend):
    values = np.ones(20)
    values[3] = 1e39
    decoded = decode(encode(values, QSGD(bucket_size=10), backend=backend), backend=backend)
    assert np.isnan(decoded[:10]).all()
    np.testing.assert_array_equal(decoded[10:], 1)


@given(
    bad=st.lists(
        st.tuples(st.integers(0, 4999), st.sampled_from([np.nan, -np.nan, np.inf, -np.inf])), min_size=1
    ),
    bucket_size=st.integers(1, 6000),
    scheme=schemes,
)
@settings(max_examples=40)
def test_non_finite_values_poison_their_whole_bucket_and_nothing_else(backend, bad, bucket_size, scheme):
    scheme = dataclasses.replace(scheme, bucket_size=bucket_size)
    values = gaussian(5000)
    clean = decode(encode(values, scheme, backend=backend), backend=backend)
    for place, value in bad:
        values[place] = value
    poisoned = np.isin(np.arange(5000) // bucket_size, [place // bucket_size for place, _ in bad])
    decoded = decode(encode(values, scheme, backend=backend), backend=backend)
    assert np.isnan(decoded[poisoned]).all()
    np.testing.assert_array_equal(decoded[~poisoned], clean[~poisoned])


def test_a_non_finite_value_survives_the_mean(backend):
    payloads = [encode(gaussian(100, seed), QSGD(bucket_size=10), backend=backend) for seed in range(3)]
    bad = gaussian(100)
    bad[42] = np.inf
    payloads[1] = encode(bad, QSGD(bucket_size=10), backend=backend)
    mean = decode_mean_of(backend, payloads)
    np.testing.assert_array_equal(np.isnan(mean), (np.arange(100) // 10) == 4)
    # Also where the output cannot hold a float32.
    half = np.empty(100, np.float16)
    native.decode_mean(payloads, half)
    np.testing.assert_array_equal(np.isnan(half), np.isnan(mean))


# --- the mean -------------------------------------------------------------------------------------------


def decode_mean_of(backend, payloads, factor=1.0):
    if backend == "native":
        return native.decode_mean(payloads, factor=factor)
    return torch_ops.decode_mean([torch.from_numpy(one) for one in payloads], factor=factor).numpy()


@given(
    n=st.integers(1, 9), scheme=schemes, factor=st.sampled_from([1.0, 3.0, 0.1, -2.5]), seed=st.integers(0)
)
def test_mean_of_payloads(backend, n, scheme, factor, seed):
    values = gaussian((n, 300), seed) * np.float32(10.0) ** np.arange(-n, 0, dtype=np.float32)[:, None]
    payloads = [encode(one, scheme, seed=k, backend=backend) for k, one in enumerate(values)]
    total = decode(payloads[0])
    for payload in payloads[1:]:
        total = total + decode(payload)  # in float32, in this order
    expected = total * np.float32(factor / n)
    np.testing.assert_array_equal(decode_mean_of(backend, payloads, factor), expected)


def test_payloads_of_a_mean_must_agree(backend):
    payload = encode(gaussian(16), QSGD(), backend=backend)
    with pytest.raises(ValueError, match="no payloads to decode"):
        decode_mean_of(backend, [])
    for x, scheme in [(gaussian(17), QSGD()), (gaussian(16), QSGD(3)), (gaussian(16), QSGD(bucket_size=8))]:
        with pytest.raises(ValueError, match=r"payloads differ: number 0 .* number 1 "):
            decode_mean_of(backend, [payload, encode(x, scheme, backend=backend)])


def test_mean_needs_room(isa):
    payload = encode(gaussian(16), QSGD())
    for size in (0, 15, 17):
        with pytest.raises(ValueError, match=f"hold 16 values, but there is room for {size}"):
            native.decode_mean([payload], np.empty(size, np.float32))


# --- determinism and seeds ------------------------------------------------------------------------------


def test_seed_decides(backend):
    x, scheme = gaussian(1000), QSGD(bits=4)
    seeds = [0, 1, 2, 2**32, 2**63, 2**64 - 1]
    payloads = [encode(x, scheme, seed=seed, backend=backend).tobytes() for seed in seeds]
    assert len(set(payloads)) == len(seeds)
    # Whatever was encoded in between, and whatever torch's own generator did.
    torch.manual_seed(1)
    torch.rand(3)
    assert payloads == [encode(x, scheme, seed=seed, backend=backend).tobytes() for seed in seeds]
    assert payloads[0] == encode(x, scheme, backend=backend).tobytes()


def test_encoding_leaves_torch_random_state_alone(backend):
    before = torch.random.get_rng_state()
    encode(gaussian(1000), QSGD(), seed=5, backend=backend)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("integer", [np.uint8, np.int64, np.uint64])
def test_seed_may_be_a_numpy_integer(backend, integer):
    same = encode(gaussian(100), QSGD(), seed=7, backend=backend)
    np.testing.assert_array_equal(encode(gaussian(100), QSGD(), seed=integer(7), backend=backend), same)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), ("1", TypeError)]
)
def test_bad_seed(backend, seed, error):
    with pytest.raises(error, match=f"seed must be .*from 0 to {2**64 - 1}"):
        encode(gaussian(3), QSGD(), seed=seed, backend=backend)


# --- threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bucket_size", [512, 5000, 70_001, 2**40])
def test_number_of_threads_changes_nothing(isa, monkeypatch, kind, norm, bucket_size):
    # Enough values for three threads, and buckets that lie across the borders of their parts.
    values, scheme = gaussian(200_003), kind(bits=5, norm=norm, bucket_size=bucket_size)
    values[77] = np.nan if bucket_size == 512 else 0
    results = []
    for count in ("1", "2", "3"):
        monkeypatch.setenv("HVD_QUANT_THREADS", count)
        payload = native.encode(values, scheme, 9)
        decoded = native.decode_mean([payload, payload])
        results.append((payload.tobytes(), decoded.tobytes()))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "two", " 2", "1e3"])
def test_bad_number_of_threads(monkeypatch, text):
    payload = encode(gaussian(3), QSGD())
    monkeypatch.setenv("HVD_QUANT_THREADS", text)
    with pytest.raises(ValueError, match="HVD_QUANT_THREADS must be a positive integer, not"):
        encode(gaussian(3), QSGD(), backend="native")
    with pytest.raises(ValueError, match="HVD_QUANT_THREADS must be a positive integer, not"):
        decode(payload, backend="native")


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_other_python_threads_run_meanwhile(direction):
    values, scheme = gaussian(2**22), QSGD()
    payload = native.encode(values, scheme, 0)
    body, again = payload[wire.HEADER_SIZE :], np.empty_like(payload[wire.HEADER_SIZE :])
    common = {"bucket_size": scheme.bucket_size, "bits": scheme.bits, "first_word": 8, "threads": 1}
    common["spacing"] = "uniform"
    encoding = {"seed": 0, "shift": 0, "nearest": False, "residual": None, **common}
    calls = {
        "encode": lambda: _native.encode(values, dtype="float32", norm="max", body=again, **encoding),
        "decode": lambda: _native.decode_sum([body], weight=1.0, out=values, dtype="float32", **common),
    }
    call, turns, stop = calls[direction], 0, threading.Event()

    def count():
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0)

    other = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    other.start()
    try:
        # From here on Python takes the GIL from nobody: the other thread gets on only where this one, or the
        # code that it calls, gives it up.
        sys.setswitchinterval(1000)
        for _ in range(200):
            before = turns
            call()
            progress = turns - before
            if progress:
                break
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        other.join()
    assert progress


def test_several_python_threads_at_once(isa):
    scheme, results = QSGD(bits=3), {}
    expected = {seed: native.encode(gaussian(50_000, seed), scheme, seed).tobytes() for seed in range(4)}

    def work(seed):
        results[seed] = native.encode(gaussian(50_000, seed), scheme, seed).tobytes()

    workers = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == expected


# --- size -----------------------------------------------------------------------------------------------


def test_flat_array_is_a_view_where_possible():
    array, tensor = gaussian((3, 4)), torch.from_numpy(gaussian((3, 4)))
    assert np.shares_memory(flat_array(array), array)
    assert flat_array(tensor).ctypes.data == tensor.data_ptr()
    half = torch.ones(3, dtype=torch.bfloat16)
    assert flat_array(half).ctypes.data == half.data_ptr()
    assert flat_array(half).itemsize == 2
