"""What a compressor knows while training runs, whatever graph its gradients come from."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hvd_quant.schedule import BitSchedule
from hvd_quant.schemes import DQSGD, Scheme
from hvd_quant.tensorflow.memory import Memory


class Progress:
    """Statistics, residuals and the schedule of bits. TensorFlow calls it from several threads.

    Args:
        scheme: what the user asked for.
    """

    def __init__(self, scheme: Scheme | DQSGD) -> None:
        self.lock = threading.RLock()
        self.memory = Memory()  # of the results, by gradient
        self.residuals: dict[str, np.ndarray] = {}  # of error feedback, flat float32, by gradient
        self.raw_bytes = self.wire_bytes = self.received_bytes = self.messages = 0
        self.bits: list[int] = []  # of each step, where there is a schedule
        # What has been sent and not received: groups of gradients, and what was asked; with a number each.
        self.in_flight: dict[str, int] = {}
        self._sent = itertools.count()
        self._scheme = scheme
        self.schedule = BitSchedule(scheme) if isinstance(scheme, DQSGD) else None
        self._seen: set[str] = set()  # groups that have come in this step
        self._squares: list[float] = []  # squared norms of the gradients that have come back in this step

    def scheme_at(self, bits: int) -> Scheme:
        """The scheme with so many bits; any number where there is no schedule."""
        return self._scheme.at(bits) if isinstance(self._scheme, DQSGD) else self._scheme

    def send(self, group: str) -> int:
        """Note that a group is sent; returns the bits of its step, 0 where there is no schedule.

        A step of the schedule ends when a group comes again: by then all of them have come back, because
        they have changed the parameters that the new gradient was computed from.
        """
        with self.lock:
            self.in_flight[f"group {group}"] = next(self._sent)
            if self.schedule is None:
                return 0
            if group in self._seen:
                self.end_step()
            self._seen.add(group)
            return self.schedule.bits

    def receive(self, group: str) -> None:
        """Note that a group has been received."""
        with self.lock:
            self.in_flight.pop(f"group {group}", None)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Note that something else is waited for."""
        with self.lock:
            self.in_flight[what] = next(self._sent)
        try:
            yield
        finally:
            with self.lock:
                self.in_flight.pop(what, None)

    def note_square(self, square: float) -> None:
        """Note the squared norm of a gradient that has come back."""
        with self.lock:
            self._squares.append(square)

    def end_step(self) -> None:
        """The next gradient is of another step, which may have another number of bits."""
        with self.lock:
            if self.schedule is None or not self._seen:
                return
            self.bits.append(self.schedule.bits)
            self.schedule.advance(*self._squares)
            self._seen.clear()
            self._squares.clear()

    def all_bits(self) -> list[int]:
        """Of each step, the present one included."""
        return [*self.bits, self.schedule.bits] if self._seen else list(self.bits)

    def forget_step(self) -> None:
        """Leave the present step."""
        with self.lock:
            self._seen.clear()
            self._squares.clear()
            self.in_flight.clear()

    def residuals_of(self, keys: Sequence[str], counts: Sequence[int]) -> list[np.ndarray]:
        """What has not been sent yet of these gradients.

        Raises:
            ValueError: the ones of these names were of other sizes.
        """
        with self.lock:
            for key, count in zip(keys, counts, strict=True):
                known = self.residuals.setdefault(key, np.zeros(count, np.float32))
                if known.size != count:
                    raise ValueError(
                        f"error_feedback=True has kept {known.size} values of gradient {key}, which has "
                        f"{count} now. One compressor serves one model, and one set of trained "
                        "variables: make another one for another."
                    )
            return [self.residuals[key] for key in keys]

    def load_residuals(self, residuals: Mapping[str, Any]) -> None:
        """Take over those of a state.

        Raises:
            ValueError: they are not finite.
        """
        loaded = {key: np.array(value, np.float32).reshape(-1) for key, value in residuals.items()}
        for key, value in loaded.items():
            if not np.isfinite(value).all():
                raise ValueError(f"what it has for gradient {key} is not finite")
        with self.lock:
            self.residuals = loaded
