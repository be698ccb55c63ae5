"""Users' buffers, as the codec reads and writes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvd_quant.codec import flat_array, is_tensor, native

Array = Any  # np.ndarray | torch.Tensor: only callers import torch


def values_of(name: str, buffer: Array, *, written: bool) -> tuple[np.ndarray, str]:
    """Return a buffer as the codec reads and writes it, and its dtype.

    Args:
        name: the user's name of it.
        buffer: the buffer.
        written: whether it will be written.

    Raises:
        TypeError, ValueError: it violates the rules of `hvd_quant.mpi.QuantizedComm.Allreduce`.
    """
    tensor = is_tensor(buffer)
    if not tensor and (not isinstance(buffer, np.ndarray) or isinstance(buffer, np.ma.MaskedArray)):
        raise TypeError(f"{name} must be a NumPy array or a torch tensor, not {type(buffer).__name__}")
    if not tensor:
        buffer = np.asarray(buffer)  # subclasses may copy where arrays do not
    if tensor and (buffer.device.type != "cpu" or str(buffer.layout) != "torch.strided"):
        raise TypeError(f"{name} must be a dense tensor on the CPU, not {buffer.layout} on {buffer.device}")
    dtype = str(buffer.dtype).removeprefix("torch.")
    if dtype not in native.DTYPES:
        raise TypeError(
            f"{name} must be of dtype {', '.join(native.DTYPES)}, in this machine's byte order, not {dtype}"
        )
    if tensor:
        plain = buffer.is_contiguous() and not buffer.is_neg()
        plain &= buffer.data_ptr() % buffer.element_size() == 0
    else:
        plain = buffer.flags.c_contiguous and buffer.flags.aligned
    if not plain:
        raise ValueError(f"{name} must be contiguous in C order, and aligned; pass a contiguous copy")
    if tensor and buffer.grad_fn is not None:
        raise ValueError(f"{name} is part of an autograd graph, through which nothing flows: detach() it")
    if written and not tensor and not buffer.flags.writeable:
        raise ValueError(f"{name} is read-only")
    return flat_array(buffer), dtype
