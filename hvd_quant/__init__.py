"""Quantized gradients for data-parallel training on stock Horovod.

This package is the core and needs NumPy alone: what to send (`QSGD`, `NUQSGD`, `DQSGD`) and the codec
(`encode`, `decode`, `max_payload_size`). The front ends for the frameworks are sub-packages, imported
on demand: `hvd_quant.torch`, `hvd_quant.tensorflow` and `hvd_quant.mpi`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hvd_quant.version import __version__

if TYPE_CHECKING:
    from hvd_quant.codec import decode, encode, max_payload_size, native_isa
    from hvd_quant.schemes import DQSGD, NUQSGD, QSGD

_CODEC = ("decode", "encode", "max_payload_size", "native_isa")
__all__ = ["DQSGD", "NUQSGD", "QSGD", "__version__", "decode", "encode", "max_payload_size", "native_isa"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: so `hvd-quant doctor` can say what keeps them from it."""
    if name in ("codec", "schemes", "wire"):
        return import_module(f"hvd_quant.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "codec" if name in _CODEC else "schemes"
    value = globals()[name] = getattr(import_module(f"hvd_quant.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
