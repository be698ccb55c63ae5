"""A compressor's state while training runs, in whatever graphs."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from hvd_quant.reducer.state import TrainingState
from hvd_quant.tensorflow.buffer_pool import BufferPool


class GraphState:
    """State of the training, and what is in flight. TensorFlow calls it from several threads.

    Args:
        state: state of the training.
    """

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self.lock = threading.RLock()
        self.buffers = BufferPool()  # for the results, by gradient
        # Groups of gradients and other operations in flight, each with a sequence number.
        self.in_flight: dict[str, int] = {}
        self._sent = itertools.count()
        self._seen: set[str] = set()  # groups that have come in this step
        self._uses: dict[str, tf.Variable] = {}  # how often each group has come; part of the noise key

    def uses_of(self, group: str) -> tf.Variable:
        """Return how often a group has come. A variable, because a number would be constant in the graph."""
        if group not in self._uses:
            uses = max(self.state.uses[group], self.state.least_use)
            self._uses[group] = variable(uses, tf.int64, "hvd_quant_uses")
        return self._uses[group]

    def note_uses(self) -> None:
        """Write the uses of each group to the training state."""
        for group, uses in self._uses.items():
            self.state.uses[group] = int(uses.numpy())

    def set_uses(self) -> None:
        """Set the uses of each group to those of the training state."""
        for group, uses in self._uses.items():
            uses.assign(max(self.state.uses[group], self.state.least_use))

    def send(self, group: str) -> int:
        """Note that a group is sent; returns the bits of its step, 0 without a schedule.

        A step of the schedule ends when a group comes again: by then all results have arrived, because they
        have changed the parameters that the new gradient was computed from.
        """
        with self.lock:
            self.in_flight[f"group {group}"] = next(self._sent)
            if self.state.schedule is None:
                return 0
            if group in self._seen:
                self.end_step()
            self._seen.add(group)
            return self.state.schedule.bits

    def receive(self, group: str) -> None:
        """Note that a group has been received."""
        with self.lock:
            self.in_flight.pop(f"group {group}", None)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Note that another operation is in flight."""
        with self.lock:
            self.in_flight[what] = next(self._sent)
        try:
            yield
        finally:
            with self.lock:
                self.in_flight.pop(what, None)

    def note_square(self, square: float) -> None:
        """Note the squared norm of a reduced gradient."""
        with self.lock:
            self.state.note_square(square)

    def count(
        self, raw_bytes: int = 0, wire_bytes: int = 0, received_bytes: int = 0, messages: int = 0
    ) -> None:
        """Add to the statistics."""
        with self.lock:
            statistics = self.state.statistics
            statistics.raw_bytes += raw_bytes
            statistics.wire_bytes += wire_bytes
            statistics.received_bytes += received_bytes
            statistics.messages += messages

    @property
    def in_step(self) -> bool:
        """Whether a step of the schedule has begun."""
        return bool(self._seen)

    def end_step(self) -> None:
        """End the step; the next one may have another number of bits."""
        with self.lock:
            if self._seen:
                self.state.end_step()
                self._seen.clear()

    def forget_step(self) -> None:
        """Drop the present step."""
        with self.lock:
            self.state.forget_step()
            self._seen.clear()
            self.in_flight.clear()

    def residuals_of(self, keys: Sequence[str], counts: Sequence[int]) -> Sequence[np.ndarray]:
        """Return the residuals of these gradients; none without error feedback.

        Raises:
            ValueError: those of these names have other sizes.
        """
        residuals = self.state.residuals
        if residuals is None:
            return ()
        with self.lock:
            for key, count in zip(keys, counts, strict=True):
                known = residuals.kept.get(key)
                if known is not None and known.size != count:
                    raise ValueError(
                        f"error_feedback=True has kept {known.size} values of gradient {key}, which has "
                        f"{count} now. One compressor serves one model, and one set of trained "
                        "variables: make another one for another."
                    )
            return [residuals.of(key, count, None) for key, count in zip(keys, counts, strict=True)]


def variable(value: object, dtype: tf.DType, name: str) -> tf.Variable:
    """Make a variable, also while a function is traced."""
    # This class itself: tf.function allows no new tf.Variable after its first call.
    with tf.init_scope(), tf.device("/CPU:0"):
        return ResourceVariable(value, trainable=False, dtype=dtype, name=name)
