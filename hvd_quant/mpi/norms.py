"""DQ-SGD over MPI: the norms that its bits follow, and where its steps end."""

from __future__ import annotations

import math

import numpy as np
from mpi4py import MPI

from hvd_quant.mpi.request import progress
from hvd_quant.reducer.state import TrainingState


class Norms:
    """Tells all ranks the squared norms of every call's values, whose mean is the call's.

    A step ends when a name comes again. Every rank makes the same calls in the same order, so that all have
    the same ends; and what is told in a call arrives before the next step begins, so that all have the same
    bits.

    Args:
        comm: for the use of one `hvd_quant.mpi.QuantizedComm` alone.
        state: of the training; with a schedule.
    """

    def __init__(self, comm: MPI.Intracomm, state: TrainingState) -> None:
        self._comm, self._state = comm, state
        self._seen: set[str] = set()  # names in this step
        self._told: list[tuple[MPI.Request, np.ndarray]] = []  # all ranks' squares, when the request is over

    @property
    def in_step(self) -> bool:
        """Whether calls of a step have been begun."""
        return bool(self._seen)

    def begin_call(self, name: str) -> None:
        """Note a call; waits for the norms of the last step if it is the first of another."""
        if name in self._seen:
            self.end_step()
        self._seen.add(name)

    def tell(self, values: np.ndarray | None, dtype: str) -> None:
        """Tell the others of a call, once in every call.

        Args:
            values: as the codec reads them; None if they are not quantized.
            dtype: theirs.
        """
        own, everyones = np.array([_square(values, dtype)]), np.empty(self._comm.size)
        self._told.append((self._comm.Iallgather(own, everyones), everyones))

    def end_step(self) -> None:
        """End the step, if one has begun, when all ranks have told their norms."""
        told = self.drain()
        if self._seen:
            for squares in told:
                self._state.note_square(math.fsum(squares) / len(squares))
            self._state.end_step()
            self._seen.clear()

    def drain(self) -> list[np.ndarray]:
        """Wait for what is being told, and forget it."""
        told, self._told = self._told, []
        for request, _ in told:
            while not request.Test():
                progress()
        return [squares for _, squares in told]

    def forget(self) -> None:
        """Leave the step."""
        self.drain()
        self._seen.clear()


def _square(values: np.ndarray | None, dtype: str) -> float:
    """The squared norm; NaN where it is none, so that `hvd_quant.schedule` keeps its bits."""
    if values is None:
        return 0.0
    if dtype == "bfloat16":
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = values.astype(np.float64 if dtype == "float64" else np.float32, copy=False)
        square = float(np.dot(wide, wide))
    return square if math.isfinite(square) else math.nan
