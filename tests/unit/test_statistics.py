"""Rounding is unbiased, has the stated variance, and its noise is independent (promise 2).

Seeds are fixed, so a test passes always or never. FALSE_ALARMS bounds the probability that ideal noise would
have failed any of them; every threshold is computed from the share of it that one comparison gets.
"""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from backends import EACH

from hvd_quant import NUQSGD, QSGD, decode, encode, wire

FALSE_ALARMS = 1e-9
COMPARISONS = 100_000  # more than this module makes
ALPHA = FALSE_ALARMS / COMPARISONS
Z = NormalDist().inv_cdf(1 - ALPHA / 2)  # 7.7 standard errors

KINDS = [QSGD, NUQSGD]
each_backend = pytest.mark.parametrize("backend", EACH, indirect=True)


def deviation(variance, largest):
    """What |sum of independent centred terms| exceeds with probability ALPHA at most: Bernstein's bound.

    Unlike Z standard errors it holds for any distribution, e.g. for values that are hardly ever rounded up.

    Args:
        variance: of the sum.
        largest: magnitude that no term exceeds.
    """
    log = math.log(2 / ALPHA)
    return largest * log / 3 + np.sqrt((largest * log / 3) ** 2 + 2 * variance * log)


# --- the schemes ----------------------------------------------------------------------------------------

D = 256  # values of a gradient, one bucket
COPIES, SEEDS = 512, 4  # of each gradient in an array, and of the noise


def gradients():
    rng = np.random.default_rng(7)
    one_hot = np.zeros(D)
    one_hot[100] = -3e-4
    return {
        "gaussian": rng.standard_normal(D),
        "heavy-tailed": rng.standard_t(1.1, D),
        "one-hot": one_hot,
        "constant": np.full(D, -0.017),
        "tiny": rng.standard_normal(D) * 1e-39,  # subnormal
        "bfloat16": torch.from_numpy(rng.standard_normal(D)).bfloat16().double().numpy(),
    }


@each_backend
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", gradients())
@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_with_the_exact_variance(backend, kind, name, bits, norm):
    v = gradients()[name].astype(np.float32)
    # A rank of several that round together is, alone, no different.
    scheme = kind(
        bits=bits, norm=norm, bucket_size=D, rounding="correlated" if bits in (3, 8) else "independent"
    )
    tiled, errors = np.tile(v, COPIES), []
    v = v.astype(np.float64)
    for seed in range(SEEDS):
        payload = encode(tiled, scheme, seed=seed, rank=5, size=7, backend=backend)
        errors.append(decode(payload, backend=backend).reshape(COPIES, D) - v)
    errors = np.concatenate(errors)
    samples = COPIES * SEEDS

    scale = float(payload[wire.HEADER_SIZE :][:4].view(np.float32)[0])  # N
    levels = scheme.levels() * scale
    j = np.clip(np.searchsorted(levels, np.abs(v), side="right") - 1, 0, scheme.num_levels - 1)
    step = levels[j + 1] - levels[j]
    below = np.minimum(np.abs(v) - levels[j], step)  # (r - l_j) N
    above = step - below  # (l_j+1 - r) N
    variance = below * above
    # What float32 arithmetic may shift an expectation by; a thousandth of what the tests can see.
    rounding = scale * 2.0**-22 + 2.0**-149

    # Per value: the mean of its errors.
    limit = deviation(samples * variance, step + rounding) / samples + rounding
    assert (np.abs(errors.mean(axis=0)) <= limit).all()

    # Per gradient: their sum, where a smaller bias shows, up or down, or towards zero or away from it.
    limit = deviation(samples * variance.sum(), step.max() + rounding) + samples * D * rounding
    assert abs(errors.sum()) <= limit
    assert abs((errors * np.sign(v)).sum()) <= limit

    # Per gradient: the mean of the squared errors, each of which is below^2 or above^2.
    if name == "one-hot":
        assert (errors == 0).all()
    else:
        unit = step.max()
        squares = (errors**2).sum() / unit**2
        spread = (variance * (above - below) ** 2).sum() / unit**4
        limit = deviation(samples * spread, 1.0) + samples * D * 3 * rounding / unit
        assert abs(squares - samples * variance.sum() / unit**2) <= limit

    # And the variance keeps the paper's bound, unless the norm was too small for torch's operations.
    if backend == "native" or name != "tiny":
        assert variance.sum() <= scheme.variance_bound(D) * (v @ v) * (1 + 1e-5)


# --- the noise ------------------------------------------------------------------------------------------

CHUNK = 2048  # values whose noise comes from one key, in pairs 1024 apart
COUNT = 2**19
CONFIGURATIONS = [(4, 0.5), (4, 0.25), (8, 0.9), (2, 1 / 64)]  # bits, and what of a level is to be rounded


def decisions(backend, kind, seed, bits, fraction, count=COUNT):
    """Which of ``count`` equal values are rounded up, centred and scaled to variance 1."""
    scheme = kind(bits=bits, norm="max", bucket_size=count + 1)
    norm = scheme.num_levels if kind is QSGD else 1  # with it, levels are numbers that float32 can hold
    low, high = scheme.levels()[scheme.num_levels // 2 :][:2] * norm
    values = np.full(count + 1, low + fraction * (high - low), np.float32)
    values[-1] = norm
    decoded = decode(encode(values, scheme, seed=seed, backend=backend), backend=backend)[:-1]
    ups = (decoded - low) / (high - low)
    assert ((ups == 0) | (ups == 1)).all()
    return (ups.astype(np.float64) - fraction) / math.sqrt(fraction * (1 - fraction))


def correlation_z(a, b):
    """The correlation of two samples in standard errors."""
    return float(a @ b) / math.sqrt(a.size)


@pytest.mark.parametrize("kind", KINDS)
@each_backend
@pytest.mark.parametrize(("bits", "fraction"), CONFIGURATIONS)
def test_noise_of_different_values_is_uncorrelated(backend, kind, bits, fraction):
    up = decisions(backend, kind, 11, bits, fraction)
    assert abs(up.sum()) <= Z * math.sqrt(up.size)
    # Neighbours, vectors and their halves, the two values of a hash, and neighbouring chunks.
    for lag in [
        *range(1, 33),
        64,
        128,
        512,
        1023,
        1024,
        1025,
        2047,
        CHUNK,
        CHUNK + 1,
        2 * CHUNK,
        100 * CHUNK,
    ]:
        assert abs(correlation_z(up[:-lag], up[lag:])) <= Z, lag
    # The two values of a hash apart from all others that are 1024 apart.
    chunks = up.reshape(-1, 2, CHUNK // 2)
    assert abs(correlation_z(chunks[:, 0].ravel(), chunks[:, 1].ravel())) <= Z


@pytest.mark.parametrize("kind", KINDS)
@each_backend
@pytest.mark.parametrize(("bits", "fraction"), CONFIGURATIONS)
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63])
def test_noise_of_different_seeds_is_uncorrelated(backend, kind, bits, fraction, seed):
    first, second, third = (decisions(backend, kind, seed + more, bits, fraction) for more in (0, 1, 2))
    for other in (second, third):
        assert abs(correlation_z(first, other)) <= Z
        for lag in (1, 1024, CHUNK):
            assert abs(correlation_z(first[lag:], other[:-lag])) <= Z
            assert abs(correlation_z(first[:-lag], other[lag:])) <= Z


@pytest.mark.parametrize("kind", KINDS)
@each_backend
@pytest.mark.parametrize("place", [0, 1, 777, 1023, 1024, 2047])
def test_noise_of_one_place_varies_between_chunks(backend, kind, place):
    # The same place in every chunk: as many values as there are keys.
    up = decisions(backend, kind, 3, 4, 0.5, 2**22).reshape(-1, CHUNK)[:, place]
    assert abs(up.sum()) <= Z * math.sqrt(up.size)
    assert abs(correlation_z(up[:-1], up[1:])) <= Z


@pytest.mark.parametrize("kind", KINDS)
@each_backend
@pytest.mark.parametrize("size", [16, 512, 2048, 4096])
@pytest.mark.parametrize(("bits", "fraction"), [(4, 0.5), (8, 0.3)])
def test_sums_of_errors_vary_as_independence_implies(backend, kind, size, bits, fraction):
    # Correlations of any kind within a bucket, too many to try one by one, would show here.
    ups = np.concatenate([decisions(backend, kind, seed, bits, fraction, 2**21) for seed in range(2)])
    sums = ups.reshape(-1, size).sum(axis=1) / math.sqrt(size)
    # The sum of n squared standard normals has a cube root that is nearly normal (Wilson and Hilferty).
    n = sums.size
    root = ((sums**2).mean()) ** (1 / 3)
    z = (root - (1 - 2 / (9 * n))) / math.sqrt(2 / (9 * n))
    assert abs(z) <= Z


@pytest.mark.parametrize("kind", KINDS)
@each_backend
@pytest.mark.parametrize(("bits", "smallest"), [(4, 12), (8, 16)])
def test_noise_is_fine_enough_for_small_probabilities(backend, kind, bits, smallest):
    # Values that are rounded up one time in 2^k: down to 2^-16, as documented, pairs are independent too.
    for k in range(8, smallest + 1, 4):
        up = decisions(backend, kind, 23, bits, 2.0**-k, 2**22)
        ups = np.count_nonzero(up > 0)
        expected = up.size * 2.0**-k
        assert abs(ups - expected) <= deviation(expected, 1.0)
