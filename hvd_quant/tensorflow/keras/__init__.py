"""Horovod for Keras 3, with or without quantized gradients, for ``model.fit``.

Horovod's own ``DistributedOptimizer`` reduces nothing under Keras 3, and says nothing. This one takes the
same arguments:

    >>> import hvd_quant.tensorflow as hq
    >>> import hvd_quant.tensorflow.keras as hqk
    >>> optimizer = hqk.DistributedOptimizer(keras.optimizers.Adam(), compression=hq.QSGDCompressor(bits=4))
    >>> model.compile(optimizer, loss, jit_compile=False)  # XLA compiles none of Horovod's operations
    >>> model.fit(x, y, callbacks=[hqk.BroadcastGlobalVariablesCallback(0), hqk.MetricAverageCallback()])

Optimizers of legacy Keras (tf_keras) are passed on to Horovod's own.
"""

from hvd_quant.tensorflow.keras.callbacks import BroadcastGlobalVariablesCallback, MetricAverageCallback
from hvd_quant.tensorflow.keras.learning_rate import LearningRateScheduleCallback, LearningRateWarmupCallback
from hvd_quant.tensorflow.keras.optimizer import DistributedOptimizer

__all__ = [
    "BroadcastGlobalVariablesCallback",
    "DistributedOptimizer",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]
