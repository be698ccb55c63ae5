"""DQ-SGD over MPI: the squared norms that its bits depend on, and the ends of its steps."""

from __future__ import annotations

import math

import numpy as np
from mpi4py import MPI

from hvd_quant.mpi.request import progress
from hvd_quant.reducer.state import TrainingState


class Norms:
    """Sends the squared norms of every call's values to all ranks; their mean is the call's.

    A step ends when a name comes again. Every rank makes the same calls in the same order, so that steps end
    at the same calls; and the norms of a step arrive before the next step begins, so that all have the same
    bits.

    Args:
        comm: for the use of one `hvd_quant.mpi.QuantizedComm` only.
        state: training state, with a schedule.
    """

    def __init__(self, comm: MPI.Intracomm, state: TrainingState) -> None:
        self._comm, self._state = comm, state
        self._seen: set[str] = set()  # names in this step
        self._pending: list[tuple[MPI.Request, np.ndarray]] = []  # requests, and the ranks' squares

    @property
    def in_step(self) -> bool:
        """Whether a step has begun."""
        return bool(self._seen)

    def begin_call(self, name: str) -> None:
        """Note a call; the first of a step waits for the norms of the last one."""
        if name in self._seen:
            self.end_step()
        self._seen.add(name)

    def send(self, values: np.ndarray | None, dtype: str) -> None:
        """Send the squared norm of a call's values, once per call.

        Args:
            values: values as the codec reads them; None if they are not quantized.
            dtype: their dtype.
        """
        own, everyones = np.array([_square(values, dtype)]), np.empty(self._comm.size)
        self._pending.append((self._comm.Iallgather(own, everyones), everyones))

    def end_step(self) -> None:
        """End the step, if one has begun, once all ranks' norms have arrived."""
        received = self.drain()
        if self._seen:
            for squares in received:
                self._state.note_square(math.fsum(squares) / len(squares))
            self._state.end_step()
            self._seen.clear()

    def drain(self) -> list[np.ndarray]:
        """Wait for the norms in flight, and return them."""
        received, self._pending = self._pending, []
        for request, _ in received:
            while not request.Test():
                progress()
        return [squares for _, squares in received]

    def forget(self) -> None:
        """Drop the step."""
        self.drain()
        self._seen.clear()


def _square(values: np.ndarray | None, dtype: str) -> float:
    """Return the squared norm; NaN if there is none, so that `hvd_quant.schedule` keeps its bits."""
    if values is None:
        return 0.0
    if dtype == "bfloat16":
        values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        wide = values.astype(np.float64 if dtype == "float64" else np.float32, copy=False)
        square = float(np.dot(wide, wide))
    return square if math.isfinite(square) else math.nan
