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

from hvd_quant.require import require

require("torch", "PyTorch")

from hvd_quant.reducer.errors import RankMismatchError, UnsupportedReductionError
from hvd_quant.torch import elastic
from hvd_quant.torch.compressor import DQSGDCompressor, NUQSGDCompressor, QSGDCompressor, QuantizedCompressor
from hvd_quant.torch.join import join
from hvd_quant.torch.optimizer import DistributedOptimizer

elastic.register()

__all__ = [
    "DQSGDCompressor",
    "DistributedOptimizer",
    "NUQSGDCompressor",
    "QSGDCompressor",
    "QuantizedCompressor",
    "RankMismatchError",
    "UnsupportedReductionError",
    "join",
]
