"""What to send: quantization schemes as values. How it is done is the codec's business."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

NORMS = ("max", "l2")
CODINGS = ("packed",)
ROUNDINGS = ("independent",)

MIN_BITS, MAX_BITS = 2, 8
MAX_BUCKET_SIZE = 2**63 - 1


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is no integer (a bool or a float is none) or out of range.

    Raises:
        TypeError: ``value`` is not an ``int``.
        ValueError: it is not in [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer from {low} to {high}, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of ``choices``.

    Raises:
        TypeError: ``value`` is not a string.
        ValueError: it is another string.
    """
    allowed = " or ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {allowed}, not {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be {allowed}, not {value!r}")


@dataclass(frozen=True)
class QSGD:
    """Stochastic rounding to uniform levels (QSGD, Alistarh et al., arXiv:1610.02132, section 3.1).

    Values are quantized in buckets. With N the bucket's norm and s = 2^(bits-1) - 1, a value v becomes
    N * sign(v) * j / s, with j one of the two integers around s |v| / N, chosen at random such that the
    expectation is v.

    Args:
        bits: bits a value on the wire, 2 to 8, sign included.
        norm: ``"max"``, the largest magnitude (the paper's practical variant, section 4), or ``"l2"``, the
            Euclidean norm (its analysed variant).
        bucket_size: values that share a norm, 1 or more. Smaller is more accurate, and 32 / bucket_size
            more bits a value.
        coding: ``"packed"``, every code in exactly ``bits`` bits.
        rounding: ``"independent"``, own noise on every rank.

    Raises:
        TypeError, ValueError: an argument is not of its type, or not in its range.
    """

    bits: int = 4
    norm: str = "max"
    bucket_size: int = 512
    coding: str = "packed"
    rounding: str = "independent"

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
    def steps(self) -> int:
        """s, the number of levels above zero: 2^(bits-1) - 1."""
        return 2 ** (self.bits - 1) - 1

    def levels(self) -> np.ndarray:
        """Magnitudes that a normalised value can take: j / s for j = 0 to s, float64 of shape (s + 1,)."""
        return np.arange(self.steps + 1) / self.steps

    def variance_bound(self, d: int) -> float:
        """Factor eps such that E |Q(v) - v|^2 <= eps |v|^2 for every v of d values.

        For ``norm="l2"``, min(d / s^2, sqrt(d) / s) (Lemma 3.1 of the paper). For ``norm="max"``,
        min(d / (4 s^2), sqrt(d) / s): a value's variance is at most (N / s)^2 / 4, and N <= |v|. Buckets
        are quantized apart, so d counts up to the bucket size.

        Raises:
            TypeError, ValueError: d is not an integer, or is negative.
        """
        check_integer("d", d, 0, MAX_BUCKET_SIZE)
        d = min(int(d), self.bucket_size)
        quadratic = d / self.steps**2 if self.norm == "l2" else d / (4 * self.steps**2)
        return min(quadratic, math.sqrt(d) / self.steps)
