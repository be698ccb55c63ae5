"""Quantized gradients for ``horovod.tensorflow``.

Example:
    >>> import horovod.tensorflow as hvd
    >>> import hvd_quant.tensorflow as hq
    >>> compression = hq.QSGDCompressor(bits=4)  # once, and not for every step
    >>> tape = hvd.DistributedGradientTape(tape, compression=compression)

For ``model.fit`` see `hvd_quant.tensorflow.keras`.
"""

try:
    import tensorflow  # noqa: F401
except ImportError as error:
    raise ImportError("hvd_quant.tensorflow needs TensorFlow: pip install tensorflow") from error

try:
    import horovod.tensorflow  # noqa: F401
except ImportError as error:
    raise ImportError(
        "hvd_quant.tensorflow needs Horovod 0.28 built with TensorFlow (HOROVOD_WITH_TENSORFLOW=1); "
        "scripts/setup.sh of hvd_quant builds it against current versions. Importing horovod.tensorflow "
        f"said: {error}"
    ) from error

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
