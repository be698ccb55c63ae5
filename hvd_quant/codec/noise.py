"""The randomness of stochastic rounding: whose it is, and how that of one rank goes with another's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvd_quant.schemes import Scheme

FRACTION_BITS = 24  # of a level: that a value's noise has


@dataclass(frozen=True)
class Noise:
    """Of the segments of a message.

    Args:
        seeds: what it is generated from, uint64 of shape (segments,).
        shifts: what is added to it, modulo 1, in units of 2^-FRACTION_BITS: uint32 of shape (segments,).
    """

    seeds: np.ndarray
    shifts: np.ndarray


def shift(scheme: Scheme, rank: int, size: int) -> int:
    """What rank ``rank`` of ``size`` adds to its noise, in units of 2^-FRACTION_BITS.

    With correlated rounding (Suresh et al., ICML 2022) the ranks share a uniform number U for every value,
    and rank k of n rounds by U + k / n modulo 1. That is their (((k + h) mod n) + g) / n, with h the integer
    part and g the fraction of n U: h is uniform on 0 .. n - 1, g on [0, 1), and they are independent.
    """
    return (rank << FRACTION_BITS) // size if scheme.rounding == "correlated" else 0
