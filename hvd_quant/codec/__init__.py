"""Numbers <-> payloads, for NumPy arrays and torch tensors.

Two backends make and read the same payloads: `native` (C++, CPU memory) and `torch_ops` (torch tensors, any
device). torch is imported only where a tensor, or ``backend="torch"``, asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hvd_quant import wire
from hvd_quant.codec import native
from hvd_quant.codec.extension import _native
from hvd_quant.codec.noise import shift
from hvd_quant.schemes import Scheme, check_choice, check_integer

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

BACKENDS = ("auto", "native", "torch")


def native_isa() -> str:
    """Return the instruction set that the native kernels were chosen for, e.g. ``"avx512"``.

    ``HVD_QUANT_ISA`` in the environment overrides the choice. Payloads do not depend on it.
    """
    return _native.isa()


def max_payload_size(scheme: Scheme, count: int) -> int:
    """Return the most bytes that `encode` writes: the size of the buffer to pass as ``out``.

    Packed codes take exactly as many; Elias and Huffman codes take fewer, depending on the values.

    Args:
        scheme: how the values are encoded.
        count: number of values.

    Raises:
        TypeError: ``scheme`` is not a scheme, or ``count`` not an integer.
        ValueError: ``count`` is out of range.

    Example:
        >>> scheme = hvd_quant.QSGD(bits=4)
        >>> buffer = numpy.empty(hvd_quant.max_payload_size(scheme, gradient.size), numpy.uint8)
        >>> payload = hvd_quant.encode(gradient, scheme, out=buffer)
    """
    _check_scheme(scheme)
    check_integer("count", count, 0, 2**64 - 1)
    return wire.max_payload_size(scheme, int(count))


def encode(
    x: Array,
    scheme: Scheme,
    *,
    seed: int = 0,
    rank: int = 0,
    size: int = 1,
    backend: str = "auto",
    out: Array | None = None,
) -> Array:
    """Encode an array or tensor into a self-describing payload.

    Args:
        x: float32, float64, float16 or bfloat16, of any shape; read in row-major order. Magnitudes that
            float32 cannot hold make their bucket non-finite.
        scheme: how, e.g. ``QSGD(bits=4)``.
        seed: seed of the rounding noise, 0 to 2^64 - 1.
        rank: number of this payload among those to be averaged, for ``rounding="correlated"``. All of
            them need the same seed.
        size: number of payloads to be averaged.
        backend: ``"native"``, ``"torch"``, or ``"auto"``: native for CPU memory, torch elsewhere.
        out: buffer for the payload, because a new one may cost more than encoding: contiguous one-dimensional
            uint8 that does not overlap ``x``, an array for an array, a tensor on the same device for a
            tensor. It has `max_payload_size` bytes, or more unless the scheme's codes are packed. By
            default a new one.

    Returns:
        The payload, one-dimensional uint8: an array for an array, a tensor on the same device for a tensor.
        With ``out`` that itself, or a view of its first bytes where the payload is smaller.

    Raises:
        TypeError: ``x`` is not an array or tensor of a floating type named above, ``scheme`` is not a scheme,
            or ``out`` is of another type or dtype.
        ValueError: ``seed``, ``rank``, ``size`` or ``backend`` is out of range; or ``out`` is of another
            size or shape, on another device, not contiguous, read-only, or overlaps ``x``.

    Example:
        >>> payload = hvd_quant.encode(gradient, hvd_quant.QSGD(bits=4))
        >>> approximation = hvd_quant.decode(payload).reshape(gradient.shape)
    """
    _check_scheme(scheme)
    check_integer("seed", seed, 0, 2**64 - 1)
    check_integer("size", size, 1, 2**24)
    check_integer("rank", rank, 0, size - 1)
    backend = _backend(backend, x)
    tensor_given = is_tensor(x)
    if not tensor_given and not isinstance(x, np.ndarray):
        raise TypeError(f"x must be a NumPy array or a torch tensor, not {type(x).__name__}")
    if tensor_given and str(x.layout) != "torch.strided":
        raise TypeError(f"x must be a dense tensor, not of layout {x.layout}")
    if not tensor_given:
        x = x.astype(x.dtype.newbyteorder("="), copy=False)
    dtype = _dtype(x)
    if dtype not in native.DTYPES:
        raise TypeError(f"x must be of dtype {', '.join(native.DTYPES)}, not {dtype}")
    if out is not None:
        _check_out(out, ("uint8",), x, "x")
        _check_size(out, scheme, x.numel() if tensor_given else x.size)
        _announce_writing(out)
    options = (scheme, int(seed), shift(scheme, int(rank), int(size)))
    if backend == "native":
        buffer = None if out is None else flat_array(out)
        payload = native.encode(flat_array(x), *options, dtype=dtype, out=buffer)
    else:
        from hvd_quant.codec import torch_ops

        tensor = x.detach() if tensor_given else _tensor(_writable(x))
        buffer = None if out is None else _flat_tensor(out)
        payload = torch_ops.encode(tensor.reshape(-1), *options, out=buffer)
    if out is None:
        return _as_given(payload, tensor_given)
    return out if len(payload) == len(out) else out[: len(payload)]


def decode(payload: Array | bytes, backend: str = "auto", *, out: Array | None = None) -> Array:
    """Decode a payload.

    Args:
        payload: one-dimensional uint8, as `encode` returns it, or bytes.
        backend: as in `encode`.
        out: buffer for the values, because a new one may cost more than decoding: contiguous, of any shape
            with as many values, of dtype float32, float64, float16 or bfloat16, and not overlapping the
            payload. A tensor on the same device for a tensor, else an array. By default a new float32 one.

    Returns:
        The values: ``out``, or else one-dimensional float32, a tensor on the same device for a tensor, an
        array otherwise.

    Raises:
        TypeError: ``payload`` is not of a type named above, or ``out`` is of another type or dtype.
        ValueError: the payload is damaged, and ``out`` may then hold anything; ``backend`` is unknown; or
            ``out`` is of another size, on another device, not contiguous, read-only, or overlaps the payload.

    Example:
        >>> hvd_quant.decode(payload, out=approximation)
    """
    if isinstance(payload, (bytes, bytearray, memoryview)):
        payload = np.frombuffer(payload, np.uint8)
    tensor_given = is_tensor(payload)
    if not tensor_given and not isinstance(payload, np.ndarray):
        raise TypeError(f"payload must be bytes, an array or a tensor, not {type(payload).__name__}")
    if _dtype(payload) != "uint8" or payload.ndim != 1:
        raise TypeError(
            f"payload must be one-dimensional uint8, not {payload.dtype} of {payload.ndim} dimensions"
        )
    backend = _backend(backend, payload)
    if out is not None:
        _check_out(out, native.DTYPES, payload, "the payload")
        _announce_writing(out)
    if backend == "native":
        buffer, dtype = (None, None) if out is None else (flat_array(out), _dtype(out))
        values = native.decode_mean([flat_array(payload)], buffer, dtype=dtype)
    else:
        from hvd_quant.codec import torch_ops

        tensor = payload.contiguous() if tensor_given else _tensor(_writable(payload))
        values = torch_ops.decode_mean([tensor], None if out is None else _flat_tensor(out))
    if out is None:
        return _as_given(values, tensor_given)
    return out


def is_tensor(x: object) -> bool:
    """Return whether x is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _check_scheme(scheme: object) -> None:
    if not isinstance(scheme, Scheme):
        raise TypeError(f"scheme must be a scheme such as hvd_quant.QSGD(bits=4), not {scheme!r}")


def _check_out(out: Any, dtypes: Sequence[str], source: Any, name: str) -> None:
    """Check everything about a caller's ``out`` but its size.

    Args:
        out: the caller's array or tensor.
        dtypes: allowed dtypes.
        source: the array or tensor that is read.
        name: its name in messages.

    Raises:
        TypeError, ValueError: ``out`` cannot be written to, or should not be.
    """
    is_array = isinstance(out, np.ndarray) and not isinstance(out, np.ma.MaskedArray)
    if not (is_tensor(out) if is_tensor(source) else is_array):
        kind = f"a torch tensor, as {name} is," if is_tensor(source) else "a NumPy array,"
        raise TypeError(f"out must be {kind} not {type(out).__name__}")
    if is_tensor(out) and str(out.layout) != "torch.strided":
        raise TypeError(f"out must be a dense tensor, not of layout {out.layout}")
    if _dtype(out) not in dtypes:
        order = "" if is_tensor(out) or out.dtype.isnative else ", in this machine's byte order"
        raise TypeError(f"out must be of dtype {', '.join(dtypes)}{order}, not {_dtype(out)}")
    if is_tensor(out):
        if out.device != source.device:
            raise ValueError(f"out must be on {source.device}, as {name} is, not on {out.device}")
        if out.grad_fn is not None:
            raise ValueError("out is part of an autograd graph, through which nothing flows: detach() it")
        plain = out.is_contiguous() and not out.is_neg() and out.data_ptr() % out.element_size() == 0
    else:
        plain = out.flags.c_contiguous and out.flags.aligned
        if not out.flags.writeable:
            raise ValueError("out must be writable, but it is read-only")
    if not plain:
        raise ValueError("out must be contiguous in C order, and aligned")
    (begin, end), (other_begin, other_end) = _extent(out), _extent(source)
    if begin < other_end and other_begin < end:
        raise ValueError(f"out must not overlap {name} in memory")


def _check_size(out: Any, scheme: Scheme, count: int) -> None:
    """Check that a payload fits.

    Raises:
        ValueError: it does not, or ``out`` is not one-dimensional.
    """
    if out.ndim != 1:
        raise ValueError(f"out must be one-dimensional, not of {out.ndim} dimensions")
    size, is_packed = wire.max_payload_size(scheme, count), scheme.coding == "packed"
    if len(out) != size if is_packed else len(out) < size:
        least = "" if is_packed else "at least "
        raise ValueError(f"out must have {least}{size} bytes for {count} values of {scheme}, not {len(out)}")


def _extent(x: Any) -> tuple[int, int]:
    """Return the start and end addresses of an array or tensor in its device's memory."""
    if is_tensor(x):
        begin, shape, item_size = x.data_ptr(), x.shape, x.element_size()
        strides = [stride * item_size for stride in x.stride()]
    else:
        begin, shape, item_size, strides = x.ctypes.data, x.shape, x.itemsize, x.strides
    if 0 in shape:
        return begin, begin
    reach = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    return begin + sum(min(0, one) for one in reach), begin + sum(max(0, one) for one in reach) + item_size


def _announce_writing(out: Any) -> None:
    """Tell autograd about a write that it cannot see: it may have saved the tensor for a backward pass."""
    if is_tensor(out) and not out.is_inference():
        import torch

        torch.autograd.graph.increment_version(out)


def _dtype(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _backend(backend: str, x: Any) -> str:
    check_choice("backend", backend, BACKENDS)
    on_cpu = not is_tensor(x) or x.device.type == "cpu"
    if backend == "auto":
        return "native" if on_cpu else "torch"
    if backend == "native" and not on_cpu:
        raise ValueError(f"backend='native' reads CPU memory, but the tensor is on {x.device}")
    return backend


def _writable(x: np.ndarray) -> np.ndarray:
    """Return a contiguous array that torch shares without a warning; a copy where ``x`` is read-only."""
    x = np.ascontiguousarray(x)
    return x if x.flags.writeable else x.copy()


def _as_given(result: Any, tensor_given: bool) -> Any:
    """Convert a backend's result to the kind that the caller passed."""
    if is_tensor(result) == tensor_given:
        return result
    return _tensor(result) if tensor_given else result.numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def _flat_tensor(out: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return the same contiguous memory as a one-dimensional tensor."""
    if is_tensor(out):
        return out.detach().view(-1)
    flat = np.asarray(out).reshape(-1)
    if _dtype(out) == "bfloat16":  # ml_dtypes', which torch does not know
        import torch

        return _tensor(flat.view(np.int16)).view(torch.bfloat16)
    return _tensor(flat)


def flat_array(x: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return an array or CPU tensor as contiguous and one-dimensional; a view where that is possible.

    bfloat16, which NumPy lacks, comes as its 16-bit patterns.
    """
    if is_tensor(x):
        import torch

        x = x.detach().reshape(-1).resolve_neg().contiguous()
        x = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return np.require(np.asarray(x), requirements=("C", "ALIGNED")).reshape(-1)
