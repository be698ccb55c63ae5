"""The control tensor: the few numbers that Horovod itself reduces in place of a gradient.

The gradient's payload is exchanged by us, without knowing the reduction that the user asked for or whether
the ranks agree. The control tensor carries both. Horovod reduces it under the parameter's own name, exactly
as it would have reduced the gradient.

Each rank r of n contributes the float64 vector c_r = [1, f, f^2, w_r, g_r], where f < 2^26 is a fingerprint
of the rank's configuration and of the tensor, w_r a large number of that rank's own, and g_r the squared norm
of its gradient, where some scheme asks for it, or 0. Any linear reduction
(Average, Sum, predivide, pre- and postscale) gives sum_r k c_r / n with a factor k of its own, 1 for Average
and n for Sum, hence:

- its first entry is k, by which the decoded mean is to be multiplied;
- its fourth entry is k times the mean of the w_r. These dominate the vectors, unless a g_r is as large, and
  differ from rank to rank, so for reductions that are not linear (Adasum, Min, Max, Product), or that took
  place over other ranks than we believe, it is something else;
- its last entry is k times the mean of the g_r;
- mean and mean square of f are f and f^2 only if all ranks have the same f. If they have not, no rank finds
  its own, so that every rank notices.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence

from hvd_quant.reducer.errors import Description, UnsupportedReductionError

FINGERPRINT_BITS = 26  # f^2 < 2^52: sums of either over the ranks are exact, or nearly
SIZE = 5
SQUARE = 4  # index of the squared norm
NBYTES = 8 * SIZE
# Gradients that look like a control tensor, float64 of shape (SIZE,), get this shape: Horovod notices if
# ranks differ.
OTHER_SHAPE = (1, 1, 1, 1, SIZE)


class FingerprintMismatch(Exception):  # noqa: N818  it is caught and turned into a RankMismatchError
    """The reduced control tensor shows that some rank's fingerprint differs."""


def fingerprint(description: Description) -> int:
    """Hash a description to FINGERPRINT_BITS bits, the same in every process."""
    text = json.dumps(description, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**FINGERPRINT_BITS


def _weight(rank: int) -> float:
    """Return w_r: from 2^60 to 2^61, in steps of 2^40, so that sums over the ranks are exact."""
    digest = hashlib.blake2b(rank.to_bytes(8, "little"), digest_size=8).digest()
    return 2.0**60 + 2.0**40 * (int.from_bytes(digest, "little") % 2**20)


@functools.cache
def _mean_weight(size: int) -> float:
    return sum(map(_weight, range(size))) / size


def values(own: int, rank: int) -> list[float]:
    """Return what rank ``rank`` with fingerprint ``own`` contributes: SIZE float64 values."""
    return [one + other for one, other in zip(part_of_gradient(own), part_of_rank(rank), strict=True)]


def part_of_gradient(own: int) -> list[float]:
    """Return what depends on the fingerprint, which is the same on all ranks."""
    return [1.0, float(own), float(own) ** 2, 0.0, 0.0]


def part_of_rank(rank: int) -> list[float]:
    """Return what depends on the rank; `values` is the sum of both."""
    return [0.0, 0.0, 0.0, _weight(rank), 0.0]


def check(reduced: Sequence[float], own: int, size: int) -> float:
    """Return the factor for the decoded mean.

    Args:
        reduced: the SIZE reduced values. Fewer come from a reduce-scatter.
        own: this rank's fingerprint.
        size: the number of ranks that took part in the exchange.

    Raises:
        UnsupportedReductionError: no linear reduction over ``size`` ranks gives these values.
        FingerprintMismatch: the ranks' fingerprints differ.
    """

    def close(value: float, expected: float) -> bool:
        return math.isclose(value, expected, rel_tol=1e-12 * max(1, size))

    factor, mean, mean_square, weight = reduced[:SQUARE] if len(reduced) >= SQUARE else [math.nan] * SQUARE
    if not math.isfinite(factor) or factor == 0.0 or not close(weight, factor * _mean_weight(size)):
        raise UnsupportedReductionError(
            "Horovod applied a reduction that quantized gradients do not support. Use op=Average or op=Sum "
            "(not Adasum, Min, Max or Product, and no reducescatter), over the same "
            f"{size} ranks as the compressor: an optimizer with a process_set needs a compressor with the "
            "same process_set. And hvd.join() cannot be used: give every rank equally many steps, or call "
            "hvd_quant.torch.join(optimizer)."
        )
    if not (close(mean, factor * own) and close(mean_square, factor * own**2)):
        raise FingerprintMismatch
    nearest = round(factor)  # Sum and Average are exact, but Horovod's scaling may have rounded
    return float(nearest) if nearest and close(factor, nearest) else factor


class Control:
    """The control tensor of one gradient, in all steps; the front end decides how it is stored.

    Args:
        fingerprint: fingerprint of the rank's configuration and of the gradient.
    """

    __slots__ = ("_factor", "_reduced", "fingerprint")

    def __init__(self, fingerprint: int) -> None:
        self.fingerprint = fingerprint
        self._reduced: list[float] | None = None  # as last reduced, without the squared norm
        self._factor = 1.0  # the factor found in it

    @property
    def last_factor(self) -> float:
        """Factor of the last step's mean."""
        return self._factor

    def factor(self, reduced: list[float], size: int) -> float:
        """Return the result of `check` for the reduced tensor; cached, because it rarely changes."""
        reduced = reduced[:SQUARE]
        if reduced != self._reduced:
            self._factor = check(reduced, self.fingerprint, size)
            self._reduced = reduced
        return self._factor
