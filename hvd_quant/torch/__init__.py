"""Quantized gradients for ``horovod.torch``.

Example:
    >>> import horovod.torch as hvd
    >>> import hvd_quant.torch as hq
    >>> optimizer = hvd.DistributedOptimizer(
    ...     optimizer,
    ...     named_parameters=model.named_parameters(),
    ...     compression=hq.QSGDCompressor(bits=4, named_parameters=model.named_parameters()),
    ... )

    or, shorter, with the drop-in that hands the names on:

    >>> optimizer = hq.DistributedOptimizer(
    ...     optimizer, named_parameters=model.named_parameters(), compression=hq.QSGDCompressor(bits=4)
    ... )
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("hvd_quant.torch needs PyTorch: pip install torch") from error

try:
    import horovod.torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "hvd_quant.torch needs Horovod 0.28 built with PyTorch (HOROVOD_WITH_PYTORCH=1); scripts/setup.sh of "
        f"hvd_quant builds it against current versions. Importing horovod.torch said: {error}"
    ) from error

from hvd_quant.reducer.errors import RankMismatchError, UnsupportedReductionError
from hvd_quant.torch.compressor import DQSGDCompressor, NUQSGDCompressor, QSGDCompressor, QuantizedCompressor
from hvd_quant.torch.optimizer import DistributedOptimizer

__all__ = [
    "DQSGDCompressor",
    "DistributedOptimizer",
    "NUQSGDCompressor",
    "QSGDCompressor",
    "QuantizedCompressor",
    "RankMismatchError",
    "UnsupportedReductionError",
]
