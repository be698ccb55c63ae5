"""What is left of the exchange if there is one rank: gradients stay as they are, and training goes on.

As in an elastic job whose other workers are gone. Uses and the schedule of bits go on, for those that come.
"""

from __future__ import annotations

from hvd_quant.reducer.state import TrainingState


class Alone:
    """Counts the gradients of a rank that has no others.

    Args:
        state: state of the training.
    """

    def __init__(self, state: TrainingState) -> None:
        self.in_flight = 0
        self._state = state

    def submit(self, key: str, square: float | None) -> None:
        """Count a gradient.

        Args:
            key: its name.
            square: its squared norm, if the schedule of bits follows it.
        """
        self._state.use(key)
        if square is not None:
            self._state.note_square(square)
        self.in_flight += 1

    def take(self) -> None:
        """Note that a result has been taken. A step ends with the last one."""
        self.in_flight -= 1
        if self.in_flight == 0 and self._state.schedule is not None:
            self._state.end_step()
