"""Quantization schemes as values. The codec implements them."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

NORMS = ("max", "l2")
CODINGS = ("packed", "elias", "huffman")
ROUNDINGS = ("independent", "correlated", "nearest")
SPACINGS = ("uniform", "exponential")

MIN_BITS, MAX_BITS = 2, 8
MAX_BUCKET_SIZE = 2**63 - 1


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Refuse anything but an integer (bool and float are none) in range.

    Raises:
        TypeError: ``value`` is not an ``int``.
        ValueError: it is not in [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer from {low} to {high}, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {value}")


def check_number(name: str, value: object, above: float, high: float) -> None:
    """Refuse anything but a number (bool is none) in range.

    Raises:
        TypeError: ``value`` is neither an ``int`` nor a ``float``.
        ValueError: it is not in (above, high].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number above {above:g}, at most {high:g}, not {value!r}")
    if not above < value <= high:
        raise ValueError(f"{name} must be above {above:g} and at most {high:g}, not {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse anything but one of ``choices``.

    Raises:
        TypeError: ``value`` is not a string.
        ValueError: it is another string.
    """
    allowed = " or ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {allowed}, not {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be {allowed}, not {value!r}")


def rounding_for(given: str | None, error_feedback: bool) -> str:
    """Return the rounding of a compressor for which the user gives none.

    Nearest with error feedback: stochastic rounding to few levels would add more error than is fed back.
    """
    if given is not None:
        return given
    return "nearest" if error_feedback else "independent"


@dataclass(frozen=True)
class Scheme(ABC):
    """Stochastic rounding to levels; use one of the schemes below, which define the levels.

    Values are quantized in buckets. With N the bucket's norm and 0 = l_0 < l_1 < ... < l_s = 1 the levels,
    s = 2^(bits-1) - 1, a value v becomes N * sign(v) * l_j, with l_j one of the two levels around |v| / N,
    chosen at random such that the expectation is v.

    Args:
        bits: bits per value on the wire, 2 to 8, sign included.
        norm: ``"max"``, the largest magnitude, or ``"l2"``, the Euclidean norm.
        bucket_size: values that share a norm, 1 or more. Smaller is more accurate, and costs 32 / bucket_size
            more bits per value.
        coding: how codes are written. ``"packed"``: each in exactly ``bits`` bits. ``"elias"``: Elias omega
            codes, as in the papers, shorter if most values are zero or nearly so. ``"huffman"``: codes made
            for each payload from its histogram, within a few percent of the entropy. Both are lossless, fall
            back on packed codes if these are not longer, and trade time for bytes; how many they save depends
            on the values.
        rounding: ``"independent"``, own noise on every rank, or ``"correlated"``, noise spread evenly over
            the ranks, so that the errors of similar gradients cancel in the mean. Both are unbiased.
            ``"nearest"`` is biased; it is for error feedback, which makes up for that.

    Raises:
        TypeError, ValueError: an argument is not of its type, or not in its range.
    """

    bits: int = 4
    norm: str = "max"
    bucket_size: int = 512
    coding: str = "packed"
    rounding: str = "independent"

    name: ClassVar[str]  # in files of overrides
    wire_id: ClassVar[int]  # in payloads
    spacing: ClassVar[str]  # of the levels, one of SPACINGS

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, MIN_BITS, MAX_BITS)
        check_choice("norm", self.norm, NORMS)
        check_integer("bucket_size", self.bucket_size, 1, MAX_BUCKET_SIZE)
        check_choice("coding", self.coding, CODINGS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        # A NumPy integer would bring its narrow range into every size computed from it.
        object.__setattr__(self, "bits", int(self.bits))
        object.__setattr__(self, "bucket_size", int(self.bucket_size))

    @property
    def num_levels(self) -> int:
        """Number of levels above zero, s: 2^(bits-1) - 1."""
        return 2 ** (self.bits - 1) - 1

    @abstractmethod
    def levels(self) -> np.ndarray:
        """Return the magnitudes of a normalised value's levels, l_0 to l_s: float64 of shape (s + 1,)."""

    def variance_bound(self, d: int) -> float:
        """Return eps such that E |Q(v) - v|^2 <= eps |v|^2 for every v of d values.

        Buckets are quantized separately, so d counts up to the bucket size.

        Raises:
            TypeError, ValueError: d is not an integer, or is negative.
        """
        check_integer("d", d, 0, MAX_BUCKET_SIZE)
        return self._variance_bound(min(int(d), self.bucket_size))

    @abstractmethod
    def _variance_bound(self, d: int) -> float:
        """Return the same for d values of one bucket."""


@dataclass(frozen=True)
class QSGD(Scheme):
    """Uniform levels (QSGD, Alistarh et al., arXiv:1610.02132, section 3.1): l_j = j / s.

    The default ``norm="max"`` is the paper's practical variant (section 4), ``"l2"`` its analysed one. The
    arguments are those of `Scheme`.

    The variance bound for ``"l2"`` is min(d / s^2, sqrt(d) / s) (Lemma 3.1 of the paper). For ``"max"`` it is
    min(d / (4 s^2), sqrt(d) / s): a value's variance is at most (N / s)^2 / 4, and N <= |v|.
    """

    name: ClassVar[str] = "qsgd"
    wire_id: ClassVar[int] = 1
    spacing: ClassVar[str] = "uniform"

    def levels(self) -> np.ndarray:
        return np.arange(self.num_levels + 1) / self.num_levels

    def _variance_bound(self, d: int) -> float:
        quadratic = d / self.num_levels**2 if self.norm == "l2" else d / (4 * self.num_levels**2)
        return min(quadratic, math.sqrt(d) / self.num_levels)


@dataclass(frozen=True)
class NUQSGD(Scheme):
    """Exponential levels (NUQSGD, Ramezani-Kebrya et al., JMLR 22(114), 2021): l_j = 2^(j - s) for j >= 1.

    Above l_1 two neighbouring levels differ by less than the value between them, so small values are rounded
    as accurately as large ones, in proportion. That pays where most values are small beside the norm, as they
    are beside the Euclidean one, the default.
    The arguments are those of `Scheme`.

    The variance bound, for both norms, is 1/8 + (2/9) l_1^2 d where l_1 sqrt(d) <= 9/4, else
    l_1 sqrt(d) - 1. For values above l_1 add at most 1/8 of their own squared mass, and those below add
    N^2 (l_1 r - r^2): with q the share of these in |v|^2, and N <= |v|, at most
    l_1 sqrt(d q) - q + (1 - q) / 8 in all, which is largest at sqrt(q) = (4/9) l_1 sqrt(d), or at q = 1.
    """

    norm: str = "l2"

    name: ClassVar[str] = "nuqsgd"
    wire_id: ClassVar[int] = 2
    spacing: ClassVar[str] = "exponential"

    def levels(self) -> np.ndarray:
        return np.append(0.0, 2.0 ** np.arange(1 - self.num_levels, 1))

    def _variance_bound(self, d: int) -> float:
        reach = 2.0 ** (1 - self.num_levels) * math.sqrt(d)  # l_1 sqrt(d)
        return 1 / 8 + 2 / 9 * reach**2 if reach <= 9 / 4 else reach - 1


SCHEMES = (QSGD, NUQSGD)  # all that payloads can have; a wire_id is never used again


@dataclass(frozen=True)
class DQSGD:
    """QSGD whose number of bits follows the training (DQ-SGD, Yan et al., arXiv:2107.14575).

    At step t of T the number of levels is s_t = k alpha^((T - t) / 2) |g_t|, with |g_t| the norm of the
    gradient, and the number of bits ceil(log2(s_t + 1)) + 1, held between ``min_bits`` and ``max_bits``. That
    minimises the bits of all steps for a given sum of alpha^(T - t) d |g_t|^2 / (4 s_t^2), the error that
    quantization leaves at the end. `hvd_quant.schedule.BitSchedule` carries it out.

    Args:
        k: levels for a gradient of norm 1. Give either this or ``mean_bits``.
        mean_bits: mean over all steps, min_bits to max_bits; k is then chosen, and corrected at every step.
        total_steps: T; needed for ``mean_bits``, and for ``alpha`` below 1.
        alpha: in (0, 1]; what an error shrinks by in one step. 1 where errors do not fade (non-convex
            training), less for strongly convex problems, whose early errors matter less.
        min_bits, max_bits: 2 to 8.
        norm, bucket_size, coding, rounding: see `QSGD`.

    Raises:
        TypeError, ValueError: an argument is not of its type or not in its range, or does not go with others.
    """

    k: float | None = None
    mean_bits: float | None = None
    total_steps: int | None = None
    alpha: float = 1.0
    min_bits: int = MIN_BITS
    max_bits: int = MAX_BITS
    norm: str = "max"
    bucket_size: int = 512
    coding: str = "packed"
    rounding: str = "independent"

    def __post_init__(self) -> None:
        check_integer("min_bits", self.min_bits, MIN_BITS, MAX_BITS)
        check_integer("max_bits", self.max_bits, self.min_bits, MAX_BITS)
        check_number("alpha", self.alpha, 0.0, 1.0)
        if (self.k is None) == (self.mean_bits is None):
            raise ValueError("DQSGD needs either k= or mean_bits=, and not both")
        if self.k is not None:
            check_number("k", self.k, 0.0, sys.float_info.max)
        else:
            check_number("mean_bits", self.mean_bits, 0.0, self.max_bits)
            if self.mean_bits < self.min_bits:
                raise ValueError(
                    f"mean_bits must be at least min_bits, {self.min_bits}, not {self.mean_bits}"
                )
        if self.total_steps is not None:
            check_integer("total_steps", self.total_steps, 1, 2**53)
        elif self.mean_bits is not None or self.alpha != 1.0:
            raise ValueError("DQSGD needs total_steps= for mean_bits=, and for alpha= below 1")
        # Plain numbers, not NumPy's: ranks compare them as text.
        for name, kind in (("k", float), ("mean_bits", float), ("alpha", float), ("total_steps", int)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))
        for name, value in asdict(self.at(self.min_bits)).items():  # it checks the rest
            if name != "bits":
                object.__setattr__(self, name, value)
        object.__setattr__(self, "min_bits", int(self.min_bits))
        object.__setattr__(self, "max_bits", int(self.max_bits))

    def at(self, bits: int) -> QSGD:
        """Return the scheme of a step with a number of bits."""
        return QSGD(bits, self.norm, self.bucket_size, self.coding, self.rounding)
