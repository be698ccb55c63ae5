"""A worker of an elastic job, which ../test_elastic.py starts: see ../torch/elastic.py.

    elastic.py FOLDER KIND EXCHANGE PLAN WHOSE

The loop is ours or Horovod's, with a state of the user's. Workers die before, in, or after the traced step.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.common.elastic import ObjectState
from plan import follow
from shared import make

import hvd_quant.tensorflow as hq
from hvd_quant.tensorflow import elastic

STEPS = 24
ROW = 512


class Plain(ObjectState):
    """What a user might write, who gives no compressor to the state."""

    def __init__(self, variables, **options):
        self.variables = variables
        self.values = [variable.numpy() for variable in variables]
        super().__init__(hvd.broadcast_object, hvd.rank, **options)

    def save(self):
        self.values = [variable.numpy() for variable in self.variables]
        super().save()

    def restore(self):
        for variable, value in zip(self.variables, self.values, strict=True):
            variable.assign(value)
        super().restore()

    def sync(self):
        hvd.broadcast_variables(self.variables, root_rank=0)
        super().sync()


def main():
    folder, kind, exchange, plan, whose = (
        Path(sys.argv[1]),
        *sys.argv[2:4],
        json.loads(sys.argv[4]),
        sys.argv[5],
    )
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    rows, noise = tf.Variable(tf.zeros([STEPS, ROW])), tf.Variable(tf.zeros([4, 1000]))
    compressor = make(hq, kind, exchange=exchange)
    doomed = None

    def die_in():
        if doomed == "in":
            os._exit(1)
        return np.float32(0.0)

    @tf.function
    def train_step(batch):
        own = tf.random.stateless_normal([4, 1000], [batch, hvd.rank()])
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.one_hot(batch, STEPS)[:, tf.newaxis] * rows) + tf.reduce_sum(noise * own)
        tape = hvd.DistributedGradientTape(tape, compression=compressor)
        with tf.control_dependencies([tf.numpy_function(die_in, [], tf.float32)]):
            gradients = tape.gradient(loss, [rows, noise])
        for variable, gradient in zip([rows, noise], gradients, strict=True):
            variable.assign_sub(gradient)

    if whose == "ours":
        state = elastic.TensorFlowState([rows, noise], compressor=compressor, batch=0, event=0, alone=0)
        run = elastic.run
    else:
        state = Plain([rows, noise], batch=0, event=0, alone=0)
        run = hvd.elastic.run
    sizes = []

    @run
    def train(state):
        nonlocal doomed
        sizes.append(hvd.size())
        while state.batch < STEPS:
            doomed = follow(plan, state, state.batch, hvd, folder)
            if doomed == "before":
                os._exit(1)
            train_step(tf.constant(state.batch))
            if doomed in ("after", "step"):
                os._exit(1)
            hvd.allreduce(tf.constant(1.0), name="metric")
            state.batch += 1
            state.alone += hvd.size() == 1
            if state.batch % 2 == 0:
                state.commit()

    train(state)
    parameters = rows.numpy().tobytes() + noise.numpy().tobytes()
    digests = hvd.allgather_object(hashlib.sha1(parameters).hexdigest(), name="digests")
    report = {
        "rank": hvd.rank(),
        "sizes": sizes,
        "identical": len(set(digests)) == 1,
        "exact": bool((rows.numpy() == -1).all()),
        # Horovod calls no compressor where a worker is alone, and the user's state does not roll it back.
        "uses": compressor.stats()["steps"] + state.alone if whose == "ours" else STEPS,
        "stats": compressor.stats(),
    }
    (folder / f"report.{hvd.rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
