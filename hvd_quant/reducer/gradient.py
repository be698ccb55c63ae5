"""Gradients and parameters as front ends describe them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

from hvd_quant.exchange.algorithms import Codec
from hvd_quant.exchange.layout import Entry
from hvd_quant.exchange.transport import Buffer
from hvd_quant.reducer.control_tensor import Control
from hvd_quant.reducer.errors import Description

if TYPE_CHECKING:
    from hvd_quant.reducer.in_flight import SentBucket

DTYPES = ("float32", "float64", "float16", "bfloat16")  # that are quantized


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, as ranks compare it.

    Args:
        shape, dtype, device: those of its gradient.
        trained: whether it gets one.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    trained: bool

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def describe(self) -> list[Any]:
        """Describe what must be the same on all ranks."""
        return [list(self.shape), self.dtype, *([] if self.trained else ["frozen"])]


class State(IntEnum):
    """State of a gradient, from ``compress`` to ``decompress``."""

    IDLE = 0  # not in flight
    SUBMITTED = 1  # held back until the ranks have agreed
    GROUPED = 2  # waits for the rest of its fused bucket, or that for a slot
    SENT = 3
    ANNOUNCED = 4  # announced to all ranks with the rest of its round
    RECEIVED = 5  # the result has been written
    ABANDONED = 6


class Gradient:
    """A front end's record of a gradient, in all steps. Subclasses override what raises an exception here.

    It is identified by its parameter's name, or by its place in the order of arrival.

    Args:
        entry: its place in a fused bucket, with its key, its size, and its scheme.
        named: whether its key is a parameter's name.
        description: properties that must be the same on all ranks.
        control: its control tensor.
    """

    __slots__ = ("control", "description", "entry", "named", "sent", "use", "waits_as")

    codec: ClassVar[Codec]  # or an attribute, if devices differ

    def __init__(self, entry: Entry, named: bool, description: Description, control: Control) -> None:
        self.entry, self.named, self.description, self.control = entry, named, description, control
        self.waits_as = State.IDLE  # where it is, while it has not been sent
        self.use = 0  # how often it has been exchanged before
        self.sent: SentBucket | None = None  # until its result has been taken

    @property
    def state(self) -> State:
        """Where it is."""
        return self.waits_as if self.sent is None else self.sent.state

    @property
    def key(self) -> str:
        """Its name on every rank."""
        return self.entry.key

    @classmethod
    def before_reading(cls, gradients: Sequence[Gradient]) -> None:
        """Called before the values of gradients that travel together are read."""

    def hold(self, tensor: Any) -> None:
        """Keep this step's values, which are read when they are sent."""
        raise NotImplementedError

    def values(self) -> Buffer:
        """Return the gradient as its codec reads it."""
        raise NotImplementedError

    def out(self, values: Buffer) -> Buffer:
        """Return the output buffer for its codec; ``values`` to overwrite these."""
        raise NotImplementedError

    def scratch(self) -> Any:
        """Allocate a buffer for another result, of the front end's type."""
        raise NotImplementedError

    def buffer_of(self, scratch: Any) -> Buffer:
        """Return that buffer as the codec writes it."""
        raise NotImplementedError

    def replace_result(self, scratch: Any) -> None:
        """Use what has been written there as the result."""
        raise NotImplementedError

    def release(self) -> None:
        """Drop the references to the gradient and to its result."""
        raise NotImplementedError
