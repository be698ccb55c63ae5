"""Numbers <-> payloads, for NumPy arrays and torch tensors.

Two backends make and read the same payloads: `native` (C++, CPU memory) and `torch_ops` (torch tensors, any
device). torch is imported only where a tensor, or ``backend="torch"``, asks for it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hvd_quant.codec import native
from hvd_quant.codec.extension import _native
from hvd_quant.codec.noise import shift
from hvd_quant.schemes import Scheme, check_choice, check_integer

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

BACKENDS = ("auto", "native", "torch")


def native_isa() -> str:
    """The instruction set that the native kernels were chosen for, e.g. ``"avx512"``.

    ``HVD_QUANT_ISA`` in the environment overrides the choice. Payloads do not depend on it.
    """
    return _native.isa()


def encode(
    x: Array, scheme: Scheme, *, seed: int = 0, rank: int = 0, size: int = 1, backend: str = "auto"
) -> Array:
    """Encode an array or tensor into a self-describing payload.

    Args:
        x: float32, float64, float16 or bfloat16, of any shape; read in row-major order. Magnitudes that
            float32 cannot hold make their bucket non-finite.
        scheme: how, e.g. ``QSGD(bits=4)``.
        seed: of the rounding noise, 0 to 2^64 - 1.
        rank: which of the payloads that are to be averaged this is, for ``rounding="correlated"``. All of
            them need the same seed.
        size: how many they are.
        backend: ``"native"``, ``"torch"``, or ``"auto"``: native for CPU memory, torch elsewhere.

    Returns:
        The payload, one-dimensional uint8: an array for an array, a tensor on the same device for a tensor.

    Raises:
        TypeError: ``x`` is no array or tensor of a floating type named above, or ``scheme`` is no scheme.
        ValueError: ``seed``, ``rank``, ``size`` or ``backend`` is out of range.

    Example:
        >>> payload = hvd_quant.encode(gradient, hvd_quant.QSGD(bits=4))
        >>> approximation = hvd_quant.decode(payload).reshape(gradient.shape)
    """
    if not isinstance(scheme, Scheme):
        raise TypeError(f"scheme must be a scheme such as hvd_quant.QSGD(bits=4), not {scheme!r}")
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
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in native.DTYPES:
        raise TypeError(f"x must be of dtype {', '.join(native.DTYPES)}, not {dtype}")
    if backend == "native":
        payload = native.encode(
            flat_array(x), scheme, int(seed), shift(scheme, int(rank), int(size)), dtype=dtype
        )
        return _tensor(payload) if tensor_given else payload
    from hvd_quant.codec import torch_ops

    tensor = x.detach() if tensor_given else _tensor(_writable(x))
    payload = torch_ops.encode(tensor.reshape(-1), scheme, int(seed), shift(scheme, int(rank), int(size)))
    return payload if tensor_given else payload.numpy()


def decode(payload: Array | bytes, backend: str = "auto") -> Array:
    """Decode a payload.

    Args:
        payload: one-dimensional uint8, as `encode` returns it, or bytes.
        backend: as in `encode`.

    Returns:
        The values, one-dimensional float32: a tensor on the same device for a tensor, else an array.

    Raises:
        TypeError: ``payload`` is not of a type named above.
        ValueError: the payload is damaged, or ``backend`` is unknown.
    """
    if isinstance(payload, (bytes, bytearray, memoryview)):
        payload = np.frombuffer(payload, np.uint8)
    tensor_given = is_tensor(payload)
    if not tensor_given and not isinstance(payload, np.ndarray):
        raise TypeError(f"payload must be bytes, an array or a tensor, not {type(payload).__name__}")
    if str(payload.dtype).removeprefix("torch.") != "uint8" or payload.ndim != 1:
        raise TypeError(
            f"payload must be one-dimensional uint8, not {payload.dtype} of {payload.ndim} dimensions"
        )
    if _backend(backend, payload) == "native":
        values = native.decode_mean([flat_array(payload)])
        return _tensor(values) if tensor_given else values
    from hvd_quant.codec import torch_ops

    tensor = payload.contiguous() if tensor_given else _tensor(_writable(payload))
    values = torch_ops.decode_mean([tensor])
    return values if tensor_given else values.numpy()


def is_tensor(x: object) -> bool:
    """Whether x is a torch tensor, found out without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _backend(backend: str, x: Any) -> str:
    check_choice("backend", backend, BACKENDS)
    on_cpu = not is_tensor(x) or x.device.type == "cpu"
    if backend == "auto":
        return "native" if on_cpu else "torch"
    if backend == "native" and not on_cpu:
        raise ValueError(f"backend='native' reads CPU memory, but the tensor is on {x.device}")
    return backend


def _writable(x: np.ndarray) -> np.ndarray:
    """A contiguous array that torch shares without a warning; a copy where ``x`` is read-only."""
    x = np.ascontiguousarray(x)
    return x if x.flags.writeable else x.copy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def flat_array(x: np.ndarray | torch.Tensor) -> np.ndarray:
    """The values of an array or CPU tensor, contiguous and one-dimensional; a view where that is possible.

    bfloat16, which NumPy lacks, comes as its 16-bit patterns.
    """
    if is_tensor(x):
        import torch

        x = x.detach().reshape(-1).resolve_neg().contiguous()
        x = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return np.require(x, requirements=("C", "ALIGNED")).reshape(-1)
