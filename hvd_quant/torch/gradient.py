"""A gradient as the compressor keeps it, from step to step and while it is on its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hvd_quant.codec import flat_array
from hvd_quant.exchange import control
from hvd_quant.exchange.driver import Exchange
from hvd_quant.exchange.layout import Entry
from hvd_quant.exchange.transport import Buffer

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(slots=True)
class Known:
    """What stays the same about a gradient from step to step.

    It is called by its parameter's name, or by its place in the order of arrival.
    """

    key: str
    named: bool
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    entry: Entry
    description: control.Description
    fingerprint: int
    control: torch.Tensor  # what Horovod is to reduce
    values: np.ndarray  # of the control tensor
    memory: np.ndarray | None = None  # of the control tensor on a CPU, which Horovod overwrites
    reduced: list[float] | None = None  # the control tensor as it came back last, but for the squared norm
    factor: float = 1.0  # in it

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a gradient is what it was last time."""
        return tensor.shape == self.shape and tensor.dtype == self.dtype and tensor.device == self.device

    def fresh_control(self, gradient: torch.Tensor | None) -> torch.Tensor:
        """The control tensor, as it was before Horovod reduced it.

        Args:
            gradient: whose squared norm is to be in it, if any. On a GPU nothing waits for that.
        """
        if self.memory is None:
            fresh = self.control.clone()
        else:
            self.memory[:] = self.values
            fresh = self.control
        if gradient is not None:
            wide = torch.promote_types(gradient.dtype, torch.float32)  # squares of halves overflow
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=wide)
            fresh[control.SQUARE] = norm.double().square()
        return fresh


@dataclass(slots=True, eq=False)
class Pending:
    """A gradient on its way, from ``compress`` to ``decompress``."""

    known: Known
    gradient: torch.Tensor | None
    stream: torch.cuda.Stream | None = None  # that has written it, on a GPU
    use: int = 0  # how often the gradient has been exchanged before
    in_place: bool = False  # whether the mean is to overwrite the gradient
    result: torch.Tensor | None = None
    shipment: Shipment | None = None
    abandoned: bool = False

    def release(self) -> torch.Tensor | None:
        """The result, of which nothing is kept here: gradients must not wait for the garbage collector."""
        result, self.result, self.gradient, self.shipment = self.result, None, None, None
        return result


@dataclass(slots=True)
class Shipment:
    """Gradients that travel together."""

    exchange: Exchange
    members: list[Pending]
    factor: float | None = None  # that the results have been multiplied by, once they are there


def wait_for_streams(members: Sequence[Pending]) -> None:
    """Have the current stream wait for what gradients come from: autograd may use several streams."""
    current = torch.cuda.current_stream(members[0].gradient.device)
    others = [member for member in members if member.stream != current]
    for stream in {member.stream for member in others}:
        current.wait_stream(stream)
    for member in others:  # whose memory is not to be given out again before it has been read here
        member.gradient.record_stream(current)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether NumPy can see the tensor's own memory as it is."""
    return tensor.is_contiguous() and not tensor.is_neg() and tensor.data_ptr() % tensor.element_size() == 0


def values_of(tensor: torch.Tensor, plain: bool) -> Buffer:
    """The tensor as the codec of its device reads and, if it is plain, writes it."""
    if tensor.device.type != "cpu":
        return tensor.detach()
    if not plain:
        return flat_array(tensor)
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
