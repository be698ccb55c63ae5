"""Quantized gradients for data-parallel training on stock Horovod.

This package is the core and needs NumPy alone: what to send (`QSGD`, `NUQSGD`, `DQSGD`) and the codec
(`encode`, `decode`). The plugs for the frameworks are sub-packages, imported by whoever uses them:
`hvd_quant.torch`, `hvd_quant.tensorflow` and `hvd_quant.mpi`.
"""

from hvd_quant.codec import decode, encode, native_isa
from hvd_quant.schemes import DQSGD, NUQSGD, QSGD
from hvd_quant.version import __version__

__all__ = ["DQSGD", "NUQSGD", "QSGD", "__version__", "decode", "encode", "native_isa"]
