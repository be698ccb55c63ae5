"""A compressor's state of the training: noise, schedule of bits, residuals, statistics."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_quant.exchange.layout import digest
from hvd_quant.exchange.transport import Buffer
from hvd_quant.schedule import BitSchedule
from hvd_quant.schemes import DQSGD, MAX_BITS, MIN_BITS, Scheme, check_integer


@dataclass
class Statistics:
    """Statistics of this rank.

    Args:
        messages: fused buckets that were sent.
        raw_bytes: bytes of the uncompressed gradients.
        wire_bytes: bytes that they were encoded into: messages, control tensors, uncompressed gradients.
        received_bytes: bytes received from other ranks by our own exchanges.
    """

    messages: int = 0
    raw_bytes: int = 0
    wire_bytes: int = 0
    received_bytes: int = 0

    def report(self) -> dict[str, Any]:
        """Return the statistics as ``stats()`` does."""
        ratio = self.raw_bytes / self.wire_bytes if self.wire_bytes else 1.0
        return {**vars(self), "compression_ratio": ratio}


class Residuals:
    """Residuals of error feedback: what has not been sent of each gradient, flat float32.

    This class uses NumPy arrays; a framework's own overrides the three methods at the end.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def of(self, key: str, count: int, like: Any) -> Buffer:
        """Return a gradient's residual on its device; zeros if there is none, or one of another size."""
        residual = self.kept.get(key)
        if residual is None or len(residual) != count:
            residual = self._zeros(count, like)
        self.kept[key] = residual = self._beside(residual, like)
        return residual

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all."""
        return {key: self._flat_copy(residual) for key, residual in self.kept.items()}

    def of_all(self, residuals: Mapping[str, Sequence[Any]], rank: int, size: int) -> dict[str, Any]:
        """Return a rank's residuals from those of all ranks at the time, by key.

        Its own; or the mean of all, if there are more ranks now, or fewer: so what has not been sent of the
        mean gradient stays the same.
        """
        of_ranks = {key: [self._flat_copy(one) for one in rows] for key, rows in residuals.items()}
        return {
            key: rows[rank] if len(rows) == size else sum(rows) / len(rows) for key, rows in of_ranks.items()
        }

    def load(self, residuals: Mapping[str, Any]) -> dict[str, Any]:
        """Check and convert the residuals of a state.

        Raises:
            ValueError: they are not finite.
        """
        loaded = {key: self._flat_copy(residual) for key, residual in residuals.items()}
        for key, residual in loaded.items():
            if len(residual) and not abs(residual).max() < float("inf"):  # nor NaN
                raise ValueError(f"what it has for parameter {key!r} is not finite")
        return loaded

    def _zeros(self, count: int, like: Any) -> Any:
        return np.zeros(count, np.float32)

    def _beside(self, residual: Any, like: Any) -> Any:
        return residual

    def _flat_copy(self, residual: Any) -> Any:
        return np.array(residual, np.float32).reshape(-1)


class TrainingState:
    """A compressor's state of the training.

    Args:
        scheme: the user's scheme.
        seed: seed of the rounding noise.
        residuals: residuals of error feedback; None without it.
    """

    def __init__(self, scheme: Scheme | DQSGD, seed: int, residuals: Residuals | None = None) -> None:
        self.scheme, self.seed, self.residuals = scheme, seed, residuals
        self.uses: Counter[str] = Counter()  # how often each gradient has come; part of the noise key
        self.least_use = 0  # lower bound for every gradient
        self.statistics = Statistics()
        self.schedule = BitSchedule(scheme) if isinstance(scheme, DQSGD) else None
        self.present_scheme: Scheme = self._scheme()
        self._squares: list[float] = []  # squared norms of this step's reduced gradients
        self._bits: list[int] = []  # bits of each step
        self.was_loaded = False
        self.place: tuple[int, int] | None = None  # rank, and number of ranks, where they are known

    # --- uses -------------------------------------------------------------------------------------------

    def use(self, key: str) -> int:
        """Return how often a gradient has come before, and count it."""
        use = self.uses[key]
        if use < self.least_use:
            use = self.least_use
        self.uses[key] = use + 1
        return use

    def most_uses(self) -> int:
        """Uses of the most frequent gradient."""
        return max([self.least_use, *self.uses.values()])

    # --- schedule of bits -------------------------------------------------------------------------------

    def _scheme(self) -> Scheme:
        return self.scheme if self.schedule is None else self.scheme.at(self.schedule.bits)

    def note_square(self, square: float) -> None:
        """Note the squared norm of a reduced gradient."""
        self._squares.append(square)

    def end_step(self) -> None:
        """End the step; the next one may have another number of bits."""
        self._bits.append(self.schedule.bits)
        self.schedule.advance(*self._squares)
        self._squares.clear()
        if self.schedule.bits != self.present_scheme.bits:
            self.present_scheme = self._scheme()

    def forget_step(self) -> None:
        """Drop the present step."""
        self._squares.clear()

    def schedule_state(self) -> dict[str, Any] | None:
        """Return the schedule, as ranks compare it."""
        return self.schedule.state_dict() if self.schedule is not None else None

    # --- between ranks ----------------------------------------------------------------------------------

    def position(self) -> list[int]:
        """Return this rank's position, as int64 that are sent with every proposal."""
        uses = digest(sorted(self.uses.items()), self.least_use)
        schedule = self.schedule.to_integers() if self.schedule is not None else [0] * BitSchedule.INTEGERS
        return [int.from_bytes(uses, "little", signed=True), self.most_uses(), *schedule]

    def catch_up(self, positions: Sequence[Sequence[int]]) -> None:
        """Continue from the position of the most advanced rank, if they differ.

        After a step that was left, or a state that some have loaded, ranks may be at different positions. The
        positions that were sent decide, not this rank's present one: it may have loaded a state since.
        """
        if all(one == positions[0] for one in positions):
            return
        self.least_use = max(most_uses for _, most_uses, *_ in positions)
        self.uses.clear()
        if self.schedule is not None:
            self.schedule.load_integers(max(schedule for _, _, *schedule in positions))
            self.present_scheme = self._scheme()

    # --- a step that is none ----------------------------------------------------------------------------

    def mark(self) -> tuple[Any, ...]:
        """Return where the training is, but for residuals and statistics."""
        schedule = self.schedule_state()
        return dict(self.uses), self.least_use, schedule, len(self._bits)

    def go_back(self, mark: tuple[Any, ...]) -> None:
        """Go on from a mark, as if what has come since had not."""
        uses, self.least_use, schedule, bits = mark
        self.uses = Counter(uses)
        del self._bits[bits:]
        if schedule is not None:
            self.schedule.load_state_dict(schedule)
            self.present_scheme = self._scheme()

    # --- what users see ---------------------------------------------------------------------------------

    def stats(self, *, in_step: bool = False) -> dict[str, Any]:
        """Return what ``stats()`` of the front ends returns.

        Args:
            in_step: whether a step has begun and not ended.
        """
        bits = {}
        if self.schedule is not None:
            bits = {"bits": [*self._bits, self.schedule.bits] if in_step else list(self._bits)}
        return {**bits, "steps": self.most_uses(), **self.statistics.report()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same noise, bits, residuals and statistics."""
        state: dict[str, Any] = {"seed": self.seed, "uses": dict(self.uses), "least_use": self.least_use}
        state["statistics"] = dict(vars(self.statistics))
        if self.schedule is not None:
            state["schedule"] = self.schedule.state_dict()
            state["bits"] = list(self._bits)
        if self.residuals is not None:
            state["residuals"] = self.residuals.state_dict()
            if self.place is not None:
                state["rank"], state["size"] = self.place
        return state

    def load_state_dict(
        self, state: Mapping[str, Any], check: Callable[[Mapping[str, Any]], object] = lambda residuals: None
    ) -> None:
        """Continue where `state_dict` was taken.

        Args:
            state: state of a compressor with the same scheme.
            check: called with the residuals; raises ValueError if they do not fit the parameters.

        Raises:
            ValueError: the state is invalid.
        """
        try:
            seed, uses, least_use = state["seed"], Counter(state["uses"]), state.get("least_use", 0)
            check_integer("seed", seed, 0, 2**64 - 1)
            for key, count in {**uses, "any gradient": least_use}.items():
                check_integer(f"uses of {key}", count, 0, 2**63 - 1)
            statistics = Statistics(**state.get("statistics", {}))
            for name, number in vars(statistics).items():
                check_integer(name, number, 0, 2**63 - 1)
            bits = state.get("bits", [])
            for one in bits:
                check_integer("bits", one, MIN_BITS, MAX_BITS)
            if self.residuals is not None:
                residuals = self.residuals.load(self._own_residuals(state))
                check(residuals)
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a state of this hvd_quant compressor: {error}") from error
        if self.residuals is not None:
            self.residuals.kept = residuals
        self.seed, self.least_use = int(seed), int(least_use)
        self.uses = Counter({key: int(count) for key, count in uses.items()})
        self.statistics, self._bits, self.was_loaded = statistics, list(bits), True
        self.present_scheme = self._scheme()
        self._squares.clear()

    def _own_residuals(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return this rank's residuals in a state, which may be that of all ranks."""
        if (of_ranks := state.get("residuals_of_ranks")) is not None:
            if self.place is None:
                raise ValueError("it is of all ranks: initialise Horovod before loading it")
            return self.residuals.of_all(of_ranks, *self.place)
        if "residuals" not in state:
            raise ValueError("it is of a compressor without error_feedback, and has no residuals")
        whose = state.get("rank"), state.get("size")
        if None not in (*whose, self.place) and whose != self.place:
            warnings.warn(
                "rank {2} of {3} has loaded a compressor's state with the residuals of rank {0} of {1}. "
                "With error_feedback=True every rank needs its own state, or all load what "
                "gather_state_dict() has returned on rank 0".format(*whose, *self.place),
                stacklevel=5,
            )
        return state["residuals"]


def taken_over(own: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return another rank's state, but with this rank's own residuals, and statistics if it has any."""
    kept = ["residuals", "rank", "size", *(["statistics"] if own["uses"] else [])]
    return {**others, **{name: own[name] for name in kept if name in own}}


def without_own(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a state other ranks can take over."""
    return {name: one for name, one in state.items() if name not in ("residuals", "rank", "size")}
