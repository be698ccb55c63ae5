"""How many bits DQ-SGD spends in each step. Ranks with the same norms spend the same."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_quant.schemes import DQSGD, check_integer

_FORECAST = 64  # steps that stand for all future ones
_PRECISION = 2.0**-10  # precision of log2 k
# The last bits of logarithms differ between processors. Norms and bits must not.
_NORM_PRECISION = 2.0**-30
_MOST = 2**53  # steps or bits of a run
_LARGEST = 1100.0  # log2 of a norm, in magnitude
_TOLERANCE = 2.0**-20  # bits; a step's number of bits may be too small by this


class BitSchedule:
    """The bits of each step: read `bits`, take the step, then `advance`.

    |g_t| is not known before step t is exchanged. Step t uses the norm of the step before, and the first one
    ``mean_bits``, or ``max_bits`` where ``k`` is given.

    With ``mean_bits`` a step's k is the one that would spend the rest of the budget, if all future norms
    were the (geometric) mean of those so far. Near the end the bits are bounded such that the budget can
    still be met exactly: the sum over the run differs from ``mean_bits * total_steps`` by less than one bit,
    whatever the norms.

    Args:
        scheme: the user's scheme.
    """

    def __init__(self, scheme: DQSGD) -> None:
        self.scheme = scheme
        self.step = 0  # steps taken
        self.spent = 0  # bits per value, over all of them
        self._log_norm: float | None = None  # log2 |g| of the last step with a usable norm
        self._log_norms = 0.0  # the sum of these
        self._norms = 0
        self._warned = False
        first = scheme.max_bits if scheme.mean_bits is None else round(scheme.mean_bits)
        self._bits = self._within_budget(first)

    @property
    def bits(self) -> int:
        """Bits of the next step: min_bits to max_bits."""
        return self._bits

    def advance(self, *squares: float) -> None:
        """Note that a step has been taken with `bits`.

        Args:
            *squares: the squared norms of its gradients, the same on all ranks, in whatever order. If their
                sum is 0 or not finite, the next step keeps the bits.
        """
        square = _sum(squares)
        self.step += 1
        self.spent += self._bits
        if 0.0 < square < math.inf:
            self._log_norm = round(math.log2(square) / 2 / _NORM_PRECISION) * _NORM_PRECISION
            self._log_norms += self._log_norm
            self._norms += 1
        total = self.scheme.total_steps
        if total is not None and self.step >= total:
            if self.step > total and not self._warned:
                self._warned = True
                warnings.warn(
                    f"DQ-SGD was planned for total_steps={total}, and training goes on: every further step "
                    f"has {self._bits} bits, as the last one",
                    stacklevel=2,
                )
            return
        if self._log_norm is not None and 0.0 < square < math.inf:
            log_k = math.log2(self.scheme.k) if self.scheme.k is not None else self._log_k()
            self._bits = math.ceil(self._continuous(log_k + self._log_norm, self.step) - _TOLERANCE)
        self._bits = self._within_budget(self._bits)

    def _continuous(self, log_levels: float | np.ndarray, step: float | np.ndarray) -> float | np.ndarray:
        """Return log2(s_t + 1) + 1, clipped to the bounds; ``log_levels`` is log2(k |g_t|)."""
        if self.scheme.alpha != 1.0:
            log_levels = log_levels + math.log2(self.scheme.alpha) * (self.scheme.total_steps - step) / 2
        return np.clip(np.logaddexp2(log_levels, 0.0) + 1.0, self.scheme.min_bits, self.scheme.max_bits)

    def _log_k(self) -> float:
        """Return log2 of the k that spends what is left, less half a bit, which rounding up spends."""
        scheme, left = self.scheme, self.scheme.total_steps - self.step
        target = (scheme.mean_bits * scheme.total_steps - self.spent) / left - 0.5
        steps = self.step + (np.arange(min(left, _FORECAST)) + 0.5) * left / min(left, _FORECAST) - 0.5
        mean_norm = self._log_norms / self._norms
        # From k with min_bits in all steps to k with max_bits.
        reach = -math.log2(scheme.alpha) * left / 2
        low, high = -mean_norm - 1.0, scheme.max_bits - mean_norm + reach
        for _ in range(math.ceil(math.log2((high - low) / _PRECISION))):
            middle = (low + high) / 2
            if self._continuous(middle + mean_norm, steps).mean() < target:
                low = middle
            else:
                high = middle
        return high

    def _within_budget(self, bits: int) -> int:
        """Return the nearest number of bits after which min_bits to max_bits per step can meet the budget."""
        scheme = self.scheme
        if scheme.mean_bits is None:
            return bits
        left = scheme.total_steps - self.step
        rest = math.floor(scheme.mean_bits * scheme.total_steps) - self.spent
        bits = max(bits, rest - scheme.max_bits * (left - 1))
        bits = min(bits, rest - scheme.min_bits * (left - 1))
        return min(max(bits, scheme.min_bits), scheme.max_bits)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same schedule."""
        return {
            "step": self.step,
            "spent": self.spent,
            "bits": self._bits,
            "log_norm": self._log_norm,
            "log_norms": self._log_norms,
            "norms": self._norms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            KeyError, TypeError, ValueError: the state is invalid.
        """
        for name in ("step", "spent", "norms"):
            check_integer(name, state[name], 0, _MOST)
        check_integer("bits", state["bits"], self.scheme.min_bits, self.scheme.max_bits)
        log_norm = None if state["log_norm"] is None else float(state["log_norm"])
        log_norms = float(state["log_norms"])
        if not abs(log_norms) <= _LARGEST * state["norms"] or not abs(log_norm or 0.0) <= _LARGEST:
            raise ValueError("its norms are none that float64 holds")
        # Plain numbers, not NumPy's: ranks compare them as text.
        self.step, self.spent, self._norms = (int(state[name]) for name in ("step", "spent", "norms"))
        self._bits, self._log_norm, self._log_norms = int(state["bits"]), log_norm, log_norms

    # --- as integers, which ranks send to each other ----------------------------------------------------

    INTEGERS = 6
    _FORMAT = "<4q2d"

    def to_integers(self) -> list[int]:
        """Return the state as INTEGERS int64; of two states, the more advanced one is the larger."""
        log_norm = math.nan if self._log_norm is None else self._log_norm
        packed = struct.pack(
            self._FORMAT, self.step, self.spent, self._bits, self._norms, log_norm, self._log_norms
        )
        return list(struct.unpack(f"<{self.INTEGERS}q", packed))

    def load_integers(self, integers: Sequence[int]) -> None:
        """Continue from the state of `to_integers`."""
        packed = struct.pack(f"<{self.INTEGERS}q", *integers)
        self.step, self.spent, self._bits, self._norms, log_norm, self._log_norms = struct.unpack(
            self._FORMAT, packed
        )
        self._log_norm = None if math.isnan(log_norm) else log_norm


def _sum(squares: Sequence[float]) -> float:
    """Return the exactly rounded sum: the same in every order."""
    if not all(map(math.isfinite, squares)):
        return math.nan
    try:
        return math.fsum(squares)
    except OverflowError:
        return math.inf
