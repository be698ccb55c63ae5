import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_quant import NUQSGD, QSGD
from hvd_quant.schemes import Scheme


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 2**70])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"bits must be from 2 to 8, not {bits}"):
        QSGD(bits=bits)


@pytest.mark.parametrize("bits", [4.0, True, "4", None, [4]])
def test_bits_not_an_integer(bits):
    with pytest.raises(TypeError, match="bits must be an integer from 2 to 8, not "):
        QSGD(bits=bits)


@pytest.mark.parametrize("bucket_size", [0, -1, 2**63])
def test_bucket_size_out_of_range(bucket_size):
    with pytest.raises(ValueError, match=f"bucket_size must be from 1 to {2**63 - 1}, not {bucket_size}"):
        QSGD(bucket_size=bucket_size)


@pytest.mark.parametrize("bucket_size", [2.5, 512.0, False, "512", None])
def test_bucket_size_not_an_integer(bucket_size):
    with pytest.raises(TypeError, match="bucket_size must be an integer from 1 to "):
        QSGD(bucket_size=bucket_size)


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("norm", "'max' or 'l2'"),
        ("coding", "'packed' or 'elias' or 'huffman'"),
        ("rounding", "'independent' or 'correlated' or 'nearest'"),
    ],
)
def test_unknown_choice(field, allowed):
    for value in ("", "MAX", "morse"):
        with pytest.raises(ValueError, match=f"{field} must be {allowed}, not {value!r}"):
            QSGD(**{field: value})
    for value in (None, 2, b"max", ["max"]):
        with pytest.raises(TypeError, match=f"{field} must be {allowed}, not "):
            QSGD(**{field: value})


def test_unknown_field():
    with pytest.raises(TypeError, match="bucket"):
        QSGD(bucket=512)


def test_defaults():
    assert QSGD() == QSGD(bits=4, norm="max", bucket_size=512, coding="packed", rounding="independent")


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels(bits):
    scheme = QSGD(bits=bits)
    levels = scheme.levels()
    assert scheme.num_levels == 2 ** (bits - 1) - 1
    # With a sign each, and one zero, they are 2^bits - 1 codes.
    assert 2 * levels.size - 1 == 2**bits - 1
    assert levels.dtype == np.float64
    assert levels[0] == 0
    assert levels[-1] == 1
    np.testing.assert_allclose(np.diff(levels), 1 / scheme.num_levels)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_nuqsgd(bits):
    scheme = NUQSGD(bits=bits)
    levels = scheme.levels()
    assert (levels.dtype, levels.size) == (np.float64, scheme.num_levels + 1)
    assert (levels[0], levels[1], levels[-1]) == (0, 2.0 ** -(scheme.num_levels - 1), 1)
    assert (levels[2:] == 2 * levels[1:-1]).all()


@pytest.mark.parametrize(
    ("scheme", "d", "bound"),
    [
        (QSGD(bits=8, norm="l2"), 16, 16 / 127**2),
        (QSGD(bits=2, norm="l2"), 16, 4.0),
        (QSGD(bits=8, norm="max"), 16, 16 / (4 * 127**2)),
        (QSGD(bits=2, norm="max"), 4, 1.0),
        (QSGD(bits=2, norm="max"), 64, 8.0),
        (QSGD(bits=3, norm="l2"), 0, 0.0),
        (QSGD(bits=3, norm="l2"), 9, 1.0),  # where both terms meet: d = s^2
        # Buckets are quantized apart, so what counts is the bucket.
        (QSGD(bits=4, norm="l2", bucket_size=10), 1000, 10 / 49),
        (QSGD(bits=4, norm="max", bucket_size=10), 1000, 10 / (4 * 49)),
        (NUQSGD(bits=2), 4, 1 / 8 + 2 / 9 * 4),
        (NUQSGD(bits=2), 100, 9.0),
        (NUQSGD(bits=4), 512, 1 / 8 + 2 / 9 * 512 / 2**12),
        (NUQSGD(bits=4, norm="max"), 512, 1 / 8 + 2 / 9 * 512 / 2**12),
        (NUQSGD(bits=3, bucket_size=81), 10**6, 1.25),  # where both terms meet: l_1 sqrt(d) = 9 / 4
        (NUQSGD(bits=8), 512, 1 / 8),
    ],
)
def test_variance_bound(scheme, d, bound):
    assert scheme.variance_bound(d) == pytest.approx(bound)


@given(
    kind=st.sampled_from([QSGD, NUQSGD]),
    bits=st.integers(2, 8),
    norm=st.sampled_from(["max", "l2"]),
    values=st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=50),
)
def test_no_vector_varies_more_than_the_bound(kind, bits, norm, values):
    scheme = kind(bits=bits, norm=norm)
    v = np.array(values)
    total = float(v @ v)
    if total < 1e-200:
        return
    scale = np.abs(v).max() if norm == "max" else np.sqrt(total)
    variance = scale**2 * rounding_variance(np.abs(v) / scale, scheme.levels())
    assert variance <= scheme.variance_bound(v.size) * total * (1 + 1e-9)


def rounding_variance(r, levels):
    """The sum of (l_j+1 - r)(r - l_j) over the values."""
    j = np.clip(np.searchsorted(levels, r, side="right") - 1, 0, levels.size - 2)
    return np.maximum((levels[j + 1] - r) * (r - levels[j]), 0).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("d", [4, 64, 512])
def test_the_bound_of_nuqsgd_is_nearly_reached(bits, d):
    # The gradients of its derivation: one large value 3/4 of a power of two, the others small and equal.
    scheme = NUQSGD(bits=bits, bucket_size=d)
    largest = 0.0
    for small in np.geomspace(1e-5, 1, 400):
        v = np.full(d, small)
        v[0] = 0.75
        norm = np.sqrt(v @ v)
        largest = max(largest, rounding_variance(v / norm, scheme.levels()) / 1.0)
    bound = scheme.variance_bound(d)
    assert bound * 0.5 <= largest <= bound


@pytest.mark.parametrize("d", [-1, 2**63])
def test_variance_bound_of_no_size(d):
    with pytest.raises(ValueError, match="d must be from 0 to "):
        QSGD().variance_bound(d)
    with pytest.raises(TypeError, match="d must be an integer"):
        QSGD().variance_bound(float(d))


def test_kinds_differ():
    assert NUQSGD() == NUQSGD(bits=4, norm="l2", bucket_size=512, coding="packed", rounding="independent")
    assert NUQSGD(norm="max") != QSGD(norm="max")
    with pytest.raises(ValueError, match="bits must be from 2 to 8, not 9"):
        NUQSGD(bits=9)


def test_the_base_is_no_scheme():
    with pytest.raises(TypeError, match="abstract"):
        Scheme()


def test_is_a_value():
    scheme = QSGD(bits=3, norm="l2")
    assert scheme == QSGD(bits=3, norm="l2")
    assert hash(scheme) == hash(QSGD(bits=3, norm="l2"))
    assert len({scheme, QSGD(bits=3), QSGD(bits=4), QSGD(bits=3, bucket_size=64)}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.bits = 4
    assert dataclasses.replace(scheme, bits=4) == QSGD(bits=4, norm="l2")
    with pytest.raises(ValueError, match="bits"):
        dataclasses.replace(scheme, bits=9)


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int64])
def test_numpy_integers_become_int(integer):
    # A NumPy integer kept as it is would bring its narrow range into every size computed from it.
    scheme = QSGD(bits=integer(4), bucket_size=integer(100))
    assert (type(scheme.bits), type(scheme.bucket_size)) == (int, int)
    assert scheme == QSGD(bits=4, bucket_size=100)
    assert scheme.variance_bound(integer(100)) == scheme.variance_bound(100)
