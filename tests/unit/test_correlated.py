"""Correlated rounding: the errors of all ranks cancel. That each alone is unbiased: test_statistics.py."""

import numpy as np
import pytest
import torch
from backends import EACH
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exchange import entries_of, mean_of

from hvd_quant import NUQSGD, QSGD, decode, encode
from hvd_quant.codec.noise import shift
from hvd_quant.exchange.layout import GroupLayout

KINDS = [QSGD, NUQSGD]
each_backend = pytest.mark.parametrize("backend", EACH, indirect=True)


def values_of(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def decoded(x, scheme, seed, rank, size, backend):
    return decode(encode(x, scheme, seed=seed, rank=rank, size=size, backend=backend), backend=backend)


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    norm=st.sampled_from(["max", "l2"]),
    size=st.integers(1, 70),
    seed=st.integers(0, 2**64 - 1),
)
@each_backend
def test_the_mean_of_equal_gradients_is_nearly_exact(backend, kind, bits, norm, size, seed):
    """The n ranks' noise lies at distances of 1/n, so that the mean is off by less than 1/n of a step."""
    scheme = kind(bits=bits, norm=norm, bucket_size=300, rounding="correlated")
    x = values_of(300, seed=bits)
    parts = [decoded(x, scheme, seed, rank, size, backend) for rank in range(size)]
    mean = np.mean(parts, axis=0, dtype=np.float64)
    n = np.abs(x).max() if norm == "max" else np.linalg.norm(x.astype(np.float64))
    levels = scheme.levels() * n
    j = np.clip(np.searchsorted(levels, np.abs(x), side="right") - 1, 0, scheme.num_levels - 1)
    step = levels[j + 1] - levels[j]
    assert (np.abs(mean - x) <= step / size + n * 2.0**-20).all()


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_rank_rounds_as_independent_ones_do(backend, kind):
    x = values_of(3000)
    independent = encode(x, kind(bits=4), seed=9, rank=3, size=5, backend=backend)
    correlated = encode(x, kind(bits=4, rounding="correlated"), seed=9, rank=0, size=5, backend=backend)
    assert np.array_equal(independent, correlated)


@pytest.mark.parametrize(
    ("rank", "size"), [(0, 0), (1, 1), (-1, 2), (5, 2), (0, 2**24 + 1), (0.0, 1), (0, True), ("0", 1)]
)
def test_ranks_that_cannot_be_are_refused(rank, size):
    with pytest.raises((TypeError, ValueError), match=r"rank|size"):
        encode(values_of(3), QSGD(rounding="correlated"), rank=rank, size=size)


def test_shifts_divide_the_circle():
    assert [shift(QSGD(rounding="correlated"), k, 4) for k in range(4)] == [0, 2**22, 2**23, 3 * 2**22]
    assert shift(QSGD(), 3, 4) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 8])
def test_errors_of_similar_gradients_cancel_in_the_exchange(ranks, kind):
    shared = values_of(100_000)
    gradients = [[shared + 0.03 * values_of(100_000, seed=k + 1)] for k in range(ranks)]
    exact = np.mean(gradients, axis=0, dtype=np.float64)[0]
    errors = {}
    for rounding in ("independent", "correlated"):
        scheme = kind(bits=4, norm="max", rounding=rounding)
        errors[rounding] = np.mean((mean_of(gradients, scheme, "allgather")[0] - exact) ** 2)
    assert errors["correlated"] < 0.6 * errors["independent"]


def test_ranks_share_the_noise_of_the_first_rounding_alone():
    entries = entries_of([5000, 5000], QSGD(rounding="correlated"))
    one, two = (GroupLayout(entries, 2, rank, seed=3) for rank in range(2))
    uses = np.array([4, 4], np.uint64)
    for stage in ("whole", "chunk"):
        layout = one.whole if stage == "whole" else one.chunks[1]
        a, b = one.noise(layout, stage, uses), two.noise(layout, stage, uses)
        assert np.array_equal(a.seeds, b.seeds)
        assert set(a.shifts.tolist()) == {0}
        assert set(b.shifts.tolist()) == {2**23}
    a, b = (bucket.noise(bucket.chunks[0], "mean", uses) for bucket in (one, two))
    assert not set(a.seeds.tolist()) & set(b.seeds.tolist())
    assert not b.shifts.any()


def test_tensors_take_the_same_arguments():
    x = torch.from_numpy(values_of(1000))
    scheme = QSGD(rounding="correlated")
    a, b = (encode(x, scheme, seed=1, rank=1, size=2, backend="torch") for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, encode(x, scheme, seed=1, rank=0, size=2, backend="torch"))
