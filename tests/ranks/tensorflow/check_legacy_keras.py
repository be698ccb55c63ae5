"""Legacy Keras (tf_keras), through Horovod's own optimizer. Needs TF_USE_LEGACY_KERAS=1 from the start."""

import os

import numpy as np
import pytest
import tensorflow as tf
from common_tf import own_randn, same_everywhere

import hvd_quant.tensorflow as hq
import hvd_quant.tensorflow.keras as hqk

pytestmark = pytest.mark.skipif(os.environ.get("TF_USE_LEGACY_KERAS") != "1", reason="is of legacy Keras")


@pytest.mark.parametrize("wrapper", ["horovod", "ours"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", ["legacy", "new"])
def check_fit(wrapper, passes, kind):
    import horovod.tensorflow.keras as hvd_keras

    keras = tf.keras
    compressor = hq.QSGDCompressor()
    make = hvd_keras.DistributedOptimizer if wrapper == "horovod" else hqk.DistributedOptimizer
    optimizer = make(
        (keras.optimizers.legacy if kind == "legacy" else keras.optimizers).SGD(0.1),
        compression=compressor,
        backward_passes_per_step=passes,
    )
    model = keras.Sequential(
        [keras.layers.Dense(64, activation="tanh", input_shape=(32,)), keras.layers.Dense(32)]
    )
    model.compile(optimizer, "mse", experimental_run_tf_function=False)
    start = model.get_weights()
    x, y = own_randn(64, 32).numpy(), own_randn(64, 32, seed=1).numpy()
    broadcast = hvd_keras.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(x, y, batch_size=16, epochs=2, verbose=0, callbacks=[broadcast])
    assert same_everywhere(*model.get_weights())
    assert not np.array_equal(start[0], model.get_weights()[0])
    assert compressor.stats()["messages"] == 2 * 2 * 4 // passes


def check_overrides_are_refused():
    """Horovod's own optimizer reduces, and tells no names."""
    import horovod.tensorflow.keras as hvd_keras

    sgd = tf.keras.optimizers.legacy.SGD(0.1)
    with pytest.raises(ValueError, match="overrides need the variables' names"):
        hqk.DistributedOptimizer(sgd, compression=hq.QSGDCompressor(overrides={"*": None}))
    compressor = hq.QSGDCompressor(overrides={"*": None})
    optimizer = hvd_keras.DistributedOptimizer(sgd, compression=compressor)
    variable = tf.Variable(tf.zeros([40, 50]))
    with pytest.raises(ValueError, match="overrides need the variables' names"):
        optimizer.minimize(lambda: tf.reduce_sum(variable * own_randn(40, 50)), [variable])
