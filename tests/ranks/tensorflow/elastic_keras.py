"""A worker of an elastic job of ``model.fit``, which ../test_elastic.py starts: see ../torch/elastic.py.

    elastic_keras.py FOLDER KIND EXCHANGE PLAN

Events happen after so many batches of both epochs.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from plan import follow
from shared import make

import hvd_quant.tensorflow as hq
import hvd_quant.tensorflow.keras as hqk
from hvd_quant.tensorflow.keras import elastic

STEPS = 12  # in each of two epochs
ROW = 512


class Rows(keras.layers.Layer):
    """Has a row for every batch of an epoch."""

    def build(self, shape):
        self.rows = self.add_weight(shape=(STEPS, ROW), initializer="zeros", name="rows")

    def call(self, x):
        return tf.matmul(tf.one_hot(tf.reshape(x, [-1]), STEPS), self.rows)


class Events(keras.callbacks.Callback):
    """Has what the plan says happen."""

    def __init__(self, state, plan, folder):
        super().__init__()
        self.state, self.plan, self.folder = state, plan, folder

    def on_train_batch_end(self, batch, logs=None):
        done = STEPS * self.state.epoch + self.state.batch
        if follow(self.plan, self.state, done, hvd, self.folder) is not None:
            os._exit(1)


def main():
    folder, kind, exchange, plan = Path(sys.argv[1]), *sys.argv[2:4], json.loads(sys.argv[4])
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    model = keras.Sequential([keras.Input((1,), dtype="int32"), Rows()])
    compressor = make(hq, kind, exchange=exchange)
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compressor)
    model.compile(optimizer, lambda _, y: tf.reduce_sum(y), jit_compile=False)
    state = elastic.KerasState(model, compressor=compressor, batch=0, epoch=0, event=0)
    sizes = []

    @elastic.run
    def train(state):
        sizes.append(hvd.size())
        data = tf.data.Dataset.range(STEPS).map(lambda i: (tf.reshape(i, [1, 1]), 0.0)).repeat()
        callbacks = [
            elastic.UpdateEpochStateCallback(state),
            elastic.UpdateBatchStateCallback(state),
            Events(state, plan, folder),
            elastic.CommitStateCallback(state, 2),
        ]
        epochs = 2 - state.epoch
        model.fit(
            data.skip(state.batch), steps_per_epoch=STEPS, epochs=epochs, callbacks=callbacks, verbose=0
        )

    train(state)
    rows = model.weights[0].numpy()
    digests = hvd.allgather_object(hashlib.sha1(rows.tobytes()).hexdigest(), name="digests")
    report = {
        "rank": hvd.rank(),
        "sizes": sizes,
        "identical": len(set(digests)) == 1,
        "exact": bool((rows == -2).all()),
        "uses": compressor.stats()["steps"],
        "epoch": state.epoch,
    }
    (folder / f"report.{hvd.rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
