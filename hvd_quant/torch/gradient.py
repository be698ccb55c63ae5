"""Gradients as torch tensors, as the codecs read and write them, with their residuals."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hvd_quant.codec import flat_array, native, torch_ops
from hvd_quant.exchange.layout import Entry
from hvd_quant.exchange.transport import Buffer
from hvd_quant.reducer import control_tensor
from hvd_quant.reducer.errors import Description
from hvd_quant.reducer.gradient import Gradient
from hvd_quant.reducer.state import Residuals

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class TorchControl(control_tensor.Control):
    """A control tensor that Horovod reduces.

    Args:
        fingerprint: fingerprint of the rank's configuration and of the gradient.
        rank: own rank.
        device: device of the gradient.
    """

    __slots__ = ("_array", "_bytes", "_memory", "_tensor")

    def __init__(self, fingerprint: int, rank: int, device: torch.device) -> None:
        super().__init__(fingerprint)
        self._array = np.array(control_tensor.values(fingerprint, rank))
        self._tensor = torch.from_numpy(self._array).to(device, non_blocking=True)
        self._bytes = self._array.tobytes()
        # On a CPU Horovod overwrites it. This is the quickest way to write it again.
        self._memory = memoryview(self._array).cast("B") if device.type == "cpu" else None

    def fresh(self, gradient: torch.Tensor | None) -> torch.Tensor:
        """Return the tensor, as it was before Horovod reduced it.

        Args:
            gradient: gradient whose squared norm is to be in it, if any. On a GPU nothing waits for that.
        """
        if self._memory is None:
            fresh = self._tensor.clone()
        else:
            self._memory[:] = self._bytes
            fresh = self._tensor
        if gradient is not None:
            fresh[control_tensor.SQUARE] = squared_norm(gradient)
        return fresh

    def reduced(self, tensor: torch.Tensor) -> list[float]:
        """Return the values of the reduced tensor, which may be the one that `fresh` has returned."""
        if tensor is self._tensor and self._memory is not None:
            return self._array.tolist()
        return tensor.tolist()


def squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of a gradient, a float64 scalar on its device."""
    wide = torch.promote_types(gradient.dtype, torch.float32)  # squares of halves overflow
    return torch.linalg.vector_norm(gradient.detach(), dtype=wide).double().square()


class TorchGradient(Gradient):
    """A gradient in torch tensors.

    Args:
        tensor: its first tensor.
        entry, named, description, control: see `Gradient`.
    """

    __slots__ = ("_in_place", "_result", "_tensor", "_version", "kind", "stream")

    def __init__(
        self,
        tensor: torch.Tensor,
        entry: Entry,
        named: bool,
        description: Description,
        control: TorchControl,
    ) -> None:
        super().__init__(entry, named, description, control)
        self.kind = (tensor.shape, tensor.dtype, tensor.device)
        self._tensor: torch.Tensor | None = None  # while it is in flight
        self.stream: torch.cuda.Stream | None = None  # that has written it, on a GPU
        self._version = 0  # version of the tensor when it was submitted
        self._in_place = False  # whether the mean overwrites the gradient
        self._result: torch.Tensor | None = None

    def fits(self, tensor: torch.Tensor) -> bool:
        """Return whether a gradient has the same properties as last time."""
        shape, dtype, device = self.kind
        return tensor.shape == shape and tensor.dtype == dtype and tensor.device == device

    def hold(self, tensor: torch.Tensor) -> None:
        """Keep this step's values, which are read when they are sent."""
        self._tensor = tensor
        if self.named:
            self._version = tensor._version
        if tensor.is_cuda:
            self.stream = torch.cuda.current_stream(tensor.device)

    @property
    def codec(self) -> Any:  # type: ignore[override]
        """Codec for the gradient's device."""
        return native if self.kind[2].type == "cpu" else torch_ops

    @classmethod
    def before_reading(cls, gradients: Sequence[TorchGradient]) -> None:  # type: ignore[override]
        """Make the current stream wait for the gradients' streams: autograd may use several."""
        if gradients[0].stream is None:
            return
        current = torch.cuda.current_stream(gradients[0]._tensor.device)
        others = [gradient for gradient in gradients if gradient.stream != current]
        for stream in {gradient.stream for gradient in others}:
            current.wait_stream(stream)
        for gradient in others:  # whose memory must not be reused before it has been read here
            gradient._tensor.record_stream(current)

    def values(self) -> Buffer:
        """See `Gradient`."""
        plain = is_plain(self._tensor)
        # A parameter's gradient is overwritten, as Horovod would do; any other tensor is the caller's.
        self._in_place = self.named and plain
        return values_of(self._tensor, plain)

    def out(self, values: Buffer) -> Buffer:
        """See `Gradient`."""
        if self.named and self._version != self._tensor._version:
            _warn_of_lost_change(self.key)
        if self._in_place:
            self._result = self._tensor
            return values
        self._result = torch.empty_like(self._tensor, memory_format=torch.contiguous_format)
        return values_of(self._result, plain=True)

    def scratch(self) -> torch.Tensor:
        """See `Gradient`."""
        shape, dtype, device = self.kind
        return torch.empty(shape, dtype=dtype, device=device)

    def buffer_of(self, scratch: torch.Tensor) -> Buffer:
        """See `Gradient`."""
        return values_of(scratch, plain=True)

    def replace_result(self, scratch: torch.Tensor) -> None:
        """See `Gradient`."""
        self._result.copy_(scratch)

    def release(self) -> torch.Tensor | None:
        """Return the result and keep no reference: gradients must not wait for the garbage collector."""
        result, self._result, self._tensor, self.stream = self._result, None, None, None
        return result


_lost_change = False  # whether the user has been warned


def _warn_of_lost_change(key: str) -> None:
    global _lost_change
    if not _lost_change:
        _lost_change = True
        warnings.warn(
            f"the gradient of {key!r} was changed between backward and step, as by clipping or by a loss "
            "scaler, and the ranks' mean overwrites that: it had been submitted. Call "
            "optimizer.synchronize() first, then change the gradients, and step within "
            "`with optimizer.skip_synchronize():`",
            stacklevel=2,
        )


class TorchResiduals(Residuals):
    """Residuals in tensors, on the gradients' devices."""

    def of(self, key: str, count: int, like: Buffer) -> Buffer:
        """See `Residuals`."""
        return values_of(super().of(key, count, like), plain=True)

    def _zeros(self, count: int, like: Buffer) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float32, device=_device(like))

    def _beside(self, residual: torch.Tensor, like: Buffer) -> torch.Tensor:
        return residual.to(_device(like))

    def _flat_copy(self, residual: Any) -> torch.Tensor:
        return torch.as_tensor(residual, dtype=torch.float32).detach().flatten().clone()


def _device(buffer: Buffer) -> torch.device | str:
    return "cpu" if isinstance(buffer, np.ndarray) else buffer.device


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether NumPy can see the tensor's own memory as it is."""
    return tensor.is_contiguous() and not tensor.is_neg() and tensor.data_ptr() % tensor.element_size() == 0


def values_of(tensor: torch.Tensor, plain: bool) -> Buffer:
    """Return the tensor as the codec of its device reads and, if it is plain, writes it."""
    if tensor.device.type != "cpu":
        return tensor.detach()
    if not plain:
        return flat_array(tensor)
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def check_supported(tensor: torch.Tensor) -> None:
    """Check that a tensor can be quantized.

    Raises:
        ValueError: it is sparse, or part of an autograd graph.
    """
    if tensor.layout != torch.strided:
        raise ValueError(
            f"a gradient of layout {tensor.layout} cannot be quantized: Horovod hands over sparse ones "
            "with groups, where neither it nor we support them"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "the quantized exchange is not differentiable: pass tensor.detach() to hvd.allreduce, "
            "or leave out compression= there"
        )
