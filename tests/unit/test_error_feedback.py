"""Error feedback: what a payload lacks is kept, to the last bit that float32 has, and sent later."""

import numpy as np
import pytest
import torch
from backends import EACH
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exchange import entries_of, randn, topology_of
from test_message import layout_of, noise_of

from hvd_quant import NUQSGD, QSGD
from hvd_quant.codec import _native, native, torch_ops
from hvd_quant.exchange.algorithms import ALGORITHMS, BucketData
from hvd_quant.exchange.driver import Exchange
from hvd_quant.exchange.in_process import Network
from hvd_quant.exchange.layout import GroupLayout

KINDS = [QSGD, NUQSGD]
each_backend = pytest.mark.parametrize("backend", EACH, indirect=True)


def encoded(values, scheme, residual, backend, seed=0):
    """The payload's values; ``residual`` is updated. Values are a tensor."""
    if backend == "torch":
        payload = torch_ops.encode(values, scheme, seed, residual=torch.from_numpy(residual)).numpy()
    else:
        array = (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()
        dtype = str(values.dtype).removeprefix("torch.")
        payload = native.encode(array, scheme, seed, residual=residual, dtype=dtype)
    return native.decode_mean([payload])


def randoms(count, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    norm=st.sampled_from(["max", "l2"]),
    rounding=st.sampled_from(["nearest", "independent"]),
    count=st.integers(0, 9000),
    bucket_size=st.sampled_from([1, 7, 512, 3000, 4096, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
@each_backend
def test_nothing_is_lost(backend, kind, bits, norm, rounding, count, bucket_size, dtype):
    scheme = kind(bits=bits, norm=norm, rounding=rounding, bucket_size=bucket_size)
    values = torch.from_numpy(randoms(count)).to(dtype)
    before = randoms(count, seed=1, scale=0.5)
    residual = before.copy()
    sent = encoded(values, scheme, residual, backend)
    corrected = values.float().numpy() + before
    largest = np.abs(corrected).max(initial=0.0)
    bound = 2.0**-22 * (largest if norm == "max" else np.linalg.norm(corrected) + largest)
    np.testing.assert_allclose(sent + residual, corrected, rtol=0, atol=bound)


@given(kind=st.sampled_from(KINDS), bits=st.integers(2, 8), norm=st.sampled_from(["max", "l2"]))
@settings(max_examples=20)
@each_backend
def test_nearest_is_nearest(backend, kind, bits, norm):
    scheme = kind(bits=bits, norm=norm, bucket_size=300, rounding="nearest")
    values = randoms(300, seed=bits)
    sent = encoded(torch.from_numpy(values), scheme, np.zeros(300, np.float32), backend)
    n = np.abs(values).max() if norm == "max" else np.linalg.norm(values.astype(np.float64))
    distances = np.abs(np.abs(values)[:, None] - n * scheme.levels()).min(axis=1)
    assert (np.abs(sent - values) <= distances + 2e-6 * n).all()
    # No value is further from what is sent than from 0: it contracts, as error feedback needs it.
    assert (np.abs(sent - values) <= np.abs(values) * (1 + 1e-5) + 1e-6).all()


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_is_not_finite_does_not_get_into_the_residual(kind, backend, value):
    """3.4e38 becomes infinite by what has been left of it."""
    scheme = kind(bits=3, bucket_size=100, rounding="nearest")
    values = torch.from_numpy(randoms(1000))
    values[250] = value
    before = randoms(1000, seed=1)
    before[250] = 3e38
    residual = before.copy()
    sent = encoded(values, scheme, residual, backend)
    assert not np.isfinite(sent[200:300]).any()
    assert np.array_equal(residual[200:300], before[200:300])
    others = np.r_[0:200, 300:1000]
    exact = values.numpy()[others] + before[others]
    np.testing.assert_allclose(sent[others] + residual[others], exact, atol=1e-5)


@pytest.mark.parametrize("bucket_size", [512, 1000, 8192, 10**9])
def test_threads_make_no_difference(monkeypatch, bucket_size):
    values, before = randoms(400_000), randoms(400_000, seed=1)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setenv("HVD_QUANT_THREADS", str(threads))
        residual = before.copy()
        scheme = QSGD(bits=3, bucket_size=bucket_size, rounding="nearest")
        payload = native.encode(values, scheme, 0, residual=residual)
        results.append((payload.tobytes(), residual.tobytes()))
    assert results[0] == results[1] == results[2]


def test_every_instruction_set_keeps_the_same():
    values, before, results, chosen = randoms(50_000), randoms(50_000, seed=1), set(), _native.isa()
    try:
        for isa in _native.available_isas():
            _native.choose_isa(isa)
            for kind in KINDS:
                residual = before.copy()
                payload = native.encode(values, kind(bits=4), 3, residual=residual)
                results.add((kind, payload.tobytes(), residual.tobytes()))
    finally:
        _native.choose_isa(chosen)
    assert len(results) == len(KINDS)


@each_backend
def test_segments_have_their_part_of_the_residual(backend):
    scheme = QSGD(bits=2, rounding="nearest")
    layout = layout_of(
        (1, 0, 1000, "float32", scheme), (0, 512, 300, "float32", scheme), (0, 0, 512, "float32", scheme)
    )
    arrays = [randoms(900), randoms(1000, 1)]
    residuals = [randoms(900, 2), randoms(1000, 3)]
    before = [residual.copy() for residual in residuals]
    message = np.empty(layout.size, np.uint8)
    noise = noise_of(layout)
    if backend == "native":
        native.encode_message(arrays, layout, noise, message, residuals)
    else:
        tensors, kept = ([torch.from_numpy(one) for one in ones] for ones in (arrays, residuals))
        torch_ops.encode_message(tensors, layout, noise, torch.from_numpy(message), kept)
    sent = [np.zeros_like(array) for array in arrays]
    native.decode_messages([message], layout, sent)
    for i, end in enumerate((812, 1000)):
        exact = (arrays[i] + before[i])[:end]
        np.testing.assert_allclose((sent[i] + residuals[i])[:end], exact, atol=1e-5)
        assert np.array_equal(residuals[i][end:], before[i][end:])


@pytest.mark.parametrize("exchange", ALGORITHMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_over_many_steps_nothing_is_lost(ranks, kind, exchange):
    """What all steps have brought, plus what the ranks have kept, is the sum of the means."""
    counts, scheme = [3000, 10, 2500], kind(bits=3, norm="max", rounding="nearest")
    residuals = [[np.zeros(count, np.float32) for count in counts] for _ in range(ranks)]
    topology = topology_of(ranks)
    buckets = [GroupLayout(entries_of(counts, scheme), ranks, rank, 0, topology) for rank in range(ranks)]
    brought, exact = [np.zeros(count) for count in counts], [np.zeros(count) for count in counts]
    for step in range(6):
        gradients = randn(ranks, counts, seed=step)
        network = Network(ranks)
        exchanges = [
            Exchange(
                BucketData(
                    buckets[rank],
                    gradients[rank],
                    np.full(3, step, np.uint64),
                    native,
                    residuals[rank],
                ),
                ALGORITHMS[exchange],
                network.ranks[rank],
                "step",
            )
            for rank in range(ranks)
        ]
        while any([not one.ready() for one in exchanges]):  # noqa: C419  ready() takes each of them on
            pass
        results = [[np.empty(count, np.float32) for count in counts] for _ in range(ranks)]
        for one, out in zip(exchanges, results, strict=True):
            one.finish(out)
        for i in range(3):
            assert len({result[i].tobytes() for result in results}) == 1
            brought[i] += results[0][i]
            exact[i] += np.mean([gradient[i] for gradient in gradients], axis=0)
    for i in range(3):
        kept = np.mean([residual[i] for residual in residuals], axis=0)
        np.testing.assert_allclose(brought[i] + kept, exact[i], atol=1e-4)
        assert np.abs(kept).max() > 1e-3
        assert np.linalg.norm(kept) < 2 * np.linalg.norm(exact[i])


@pytest.mark.parametrize("codec", [native, torch_ops])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_a_host_collects(codec, dtype):
    """Values as float32, with their residuals, which stay in a bucket of which something is not finite."""
    values = torch.from_numpy(randoms(700)).to(dtype)
    values[300] = float("nan")
    expected = values.to(torch.float32)[100:600].numpy() + 0.25
    name = str(dtype).removeprefix("torch.")
    layout = layout_of((0, 100, 500, name, QSGD(bucket_size=64)))
    out, residual = torch.zeros(8 + 2000, dtype=torch.uint8), torch.full((700,), 0.25)
    if codec is native:
        array = (values.view(torch.int16) if dtype == torch.bfloat16 else values).numpy()
        codec.collect([array], layout, b"preamble", out.numpy(), [residual.numpy()])
    else:
        codec.collect([values], layout, b"preamble", out, [residual])
    assert bytes(out[:8].tolist()) == b"preamble"
    np.testing.assert_array_equal(out[8:].view(torch.float32).numpy(), expected)
    kept = torch.zeros(700)
    kept[:100] = kept[600:] = 0.25
    kept[100 + 3 * 64 : 100 + 4 * 64] = 0.25  # the bucket with value 300
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("codec", [native, torch_ops])
def test_a_mean_that_lost_too_much_for_float32_leaves_the_residual(codec):
    residual = np.array([1.0, 3e38, -3e38], np.float32)
    lost = np.array([0.5, 1e38, np.nan], np.float32)
    arrays = (residual, lost) if codec is native else (torch.from_numpy(residual), torch.from_numpy(lost))
    codec.add_error(*arrays, 4)
    np.testing.assert_array_equal(residual, np.array([3.0, 3e38, -3e38], np.float32))


def test_residuals_stay_finite_where_gradients_are_as_large_as_float32_has_them():
    ranks, scheme = 4, QSGD(bits=2, bucket_size=64)
    residuals = [np.zeros(256, np.float32) for _ in range(ranks)]
    buckets = [GroupLayout(entries_of([256], scheme), ranks, rank, 0) for rank in range(ranks)]
    for step in range(60):
        network, exchanges = Network(ranks), []
        for rank in range(ranks):
            values = randoms(256, seed=ranks * step + rank)
            values *= np.float32(8e37) / np.abs(values).max()
            data = BucketData(buckets[rank], [values], np.array([step], np.uint64), native, [residuals[rank]])
            exchanges.append(Exchange(data, ALGORITHMS["scatter_allgather"], network.ranks[rank], "step"))
        for one in exchanges:
            one.advance(wait=False)
        for one in exchanges:
            one.finish([np.empty(256, np.float32)])
        assert all(np.isfinite(residual).all() for residual in residuals)


def native_encode(residual):
    native.encode(randoms(10), QSGD(), 0, residual=residual)


@pytest.mark.parametrize(
    ("residual", "says"),
    [
        (np.zeros(9, np.float32), "residual has the wrong size"),
        (np.zeros(10), "residual has items of the wrong size"),
        (np.zeros(20, np.float32)[::2], "residual must be a contiguous"),
        (np.frombuffer(bytes(40), np.float32), "residual is read-only"),
    ],
)
def test_residuals_that_cannot_be_used_are_refused(residual, says):
    with pytest.raises(ValueError, match=says):
        native_encode(residual)
    layout = layout_of((0, 0, 10, "float32", QSGD()))
    message = np.empty(layout.size, np.uint8)
    with pytest.raises(ValueError, match=says):
        native.encode_message([randoms(10)], layout, noise_of(layout), message, [residual])
    with pytest.raises(ValueError, match="one residual an array"):
        native.encode_message([randoms(10)], layout, noise_of(layout), message, [residual] * 2)
