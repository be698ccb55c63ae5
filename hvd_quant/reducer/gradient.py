"""A gradient as a front end hands it over, and a parameter as it describes it."""

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
    """A parameter of the model, as ranks compare it, and as its gradient will come.

    Args:
        shape, dtype, device: of its gradient.
        trained: whether it gets one.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    trained: bool

    @property
    def count(self) -> int:
        """Values in it."""
        return math.prod(self.shape)

    def describe(self) -> list[Any]:
        """What must be the same on all ranks."""
        return [list(self.shape), self.dtype, *([] if self.trained else ["frozen"])]


class State(IntEnum):
    """Where a gradient is, from ``compress`` to ``decompress``."""

    IDLE = 0  # not in flight
    SUBMITTED = 1  # held back, until the ranks have agreed
    GROUPED = 2  # waits for others of its fused bucket, or that for a slot
    SENT = 3
    ANNOUNCED = 4  # all ranks are told of what is sent with it
    RECEIVED = 5  # its result is there
    ABANDONED = 6


class Gradient:
    """What a front end knows of a gradient, from step to step. It overrides what raises an exception here.

    It is called by its parameter's name, or by its place in the order of arrival.

    Args:
        entry: its place in a fused bucket; has its key, its size, and how it is quantized.
        named: whether its key is a parameter's name.
        description: what must be the same on all ranks.
        control: its control tensor.
    """

    __slots__ = ("control", "description", "entry", "named", "sent", "use", "waits_as")

    codec: ClassVar[Codec]  # or an attribute, where devices differ

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
        """What it is called on every rank."""
        return self.entry.key

    @classmethod
    def before_reading(cls, gradients: Sequence[Gradient]) -> None:
        """Called before the values of gradients that travel together are read."""

    def hold(self, tensor: Any) -> None:
        """Take this step's values, which are read when they are sent."""
        raise NotImplementedError

    def values(self) -> Buffer:
        """The gradient, as its codec reads it."""
        raise NotImplementedError

    def out(self, values: Buffer) -> Buffer:
        """Where its result is to be written, as its codec writes it; ``values`` to overwrite these."""
        raise NotImplementedError

    def scratch(self) -> Any:
        """Memory for another result, in the front end's terms."""
        raise NotImplementedError

    def buffer_of(self, scratch: Any) -> Buffer:
        """That memory, as the codec writes it."""
        raise NotImplementedError

    def replace_result(self, scratch: Any) -> None:
        """Take what has been written there for the result."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of the gradient and of its result."""
        raise NotImplementedError
