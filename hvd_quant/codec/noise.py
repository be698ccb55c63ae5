"""Noise of stochastic rounding: its keys, and how the ranks' noise is correlated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvd_quant.schemes import Scheme

FRACTION_BITS = 24  # bits of a value's noise, in fractions of a level


@dataclass(frozen=True)
class Noise:
    """Noise of the segments of a message.

    Args:
        seeds: seeds, uint64 of shape (segments,).
        shifts: offsets added to the noise, modulo 1, in units of 2^-FRACTION_BITS; uint32 of (segments,).
    """

    seeds: np.ndarray
    shifts: np.ndarray


def shift(scheme: Scheme, rank: int, size: int) -> int:
    """Return what rank ``rank`` of ``size`` adds to its noise, in units of 2^-FRACTION_BITS.

    With correlated rounding (Suresh et al., ICML 2022) the ranks share a uniform number U per value,
    and rank k of n rounds by U + k / n modulo 1. That is their (((k + h) mod n) + g) / n, with h the integer
    part and g the fraction of n U: h is uniform on 0 .. n - 1, g on [0, 1), and they are independent.
    """
    return (rank << FRACTION_BITS) // size if scheme.rounding == "correlated" else 0
