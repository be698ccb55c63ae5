"""Quantized gradients for ``horovod.tensorflow``.

Example:
    >>> import horovod.tensorflow as hvd
    >>> import hvd_quant.tensorflow as hq
    >>> compression = hq.QSGDCompressor(bits=4)  # once, and not for every step
    >>> tape = hvd.DistributedGradientTape(tape, compression=compression)

For ``model.fit`` see `hvd_quant.tensorflow.keras`.
"""

from hvd_quant.require import require

require("tensorflow", "TensorFlow")

from hvd_quant.reducer.errors import RankMismatchError, UnsupportedReductionError
from hvd_quant.tensorflow.compressor import (
    DQSGDCompressor,
    NUQSGDCompressor,
    QSGDCompressor,
    QuantizedCompressor,
)
from hvd_quant.tensorflow.tape import DistributedGradientTape

__all__ = [
    "DQSGDCompressor",
    "DistributedGradientTape",
    "NUQSGDCompressor",
    "QSGDCompressor",
    "QuantizedCompressor",
    "RankMismatchError",
    "UnsupportedReductionError",
]
