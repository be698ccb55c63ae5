"""One rank of a launch of `benchmarks.step_time` that trains TensorFlow's rows in turn, and times each step.

A step is a tf.function: 8 dense layers, Horovod's gradient tape, and SGD. All rows train the same variables,
so slowly that these stay as they are. One thread computes an operation; independent operations may run at the
same time.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import horovod.tensorflow as hvd
import tensorflow as tf

from benchmarks.step_time import turns
from benchmarks.step_time.before import SUFFIX, front_end

LAYERS, WIDTH, BATCH = 8, 1024, 32
LEARNING_RATE = 1e-5


@dataclass
class Row:
    """A way to train; a `turns.Row`."""

    step: Callable[[tf.Tensor], tf.Tensor]
    sizes: list[int]
    compressor: Any = None


class Horovod:
    """TensorFlow's Horovod; a `turns.Library`."""

    def __init__(self) -> None:
        hvd.init()
        self.rank = hvd.rank()

    def barrier(self) -> None:
        self.maximum([0.0])  # horovod.tensorflow has no barrier

    def maximum(self, values: list[float]) -> list[float]:
        values = tf.constant(values, tf.float64)
        return hvd.allreduce(values, op=hvd.Max, name=f"maximum_{len(values)}").numpy().tolist()


class Network:
    """Dense layers, in variables of TensorFlow's own: Horovod's gradient tape knows none of Keras 3."""

    def __init__(self) -> None:
        deviation = WIDTH**-0.5  # outputs are as large as inputs
        self.layers = [
            (
                tf.Variable(tf.random.stateless_normal([WIDTH, WIDTH], [0, number], stddev=deviation)),
                tf.Variable(tf.zeros([WIDTH])),
            )
            for number in range(LAYERS)
        ]
        self.variables = [variable for layer in self.layers for variable in layer]

    def loss(self, x: tf.Tensor) -> tf.Tensor:
        """Squared output, a row of input."""
        for weight, bias in self.layers:
            x = x @ weight + bias
        return tf.reduce_sum(tf.square(x)) / BATCH


def make_step(name: str, network: Network, compression: Any) -> Callable[[tf.Tensor], tf.Tensor]:
    """A step that exchanges gradients by Horovod, or, without a compression, not at all."""

    @tf.function
    def step(x: tf.Tensor) -> tf.Tensor:
        # Horovod's cache knows tensors by names, which begin with this.
        with tf.name_scope(re.sub("[ ,]+", "_", name)):
            with tf.GradientTape() as tape:
                loss = network.loss(x)
            if compression is not None:
                tape = hvd.DistributedGradientTape(tape, compression=compression)
            gradients = tape.gradient(loss, network.variables)
            for variable, gradient in zip(network.variables, gradients, strict=True):
                variable.assign_sub(LEARNING_RATE * gradient)
            return loss

    return step


def make_rows(*, before: bool) -> dict[str, Row]:
    network = Network()
    sizes = [variable.shape.num_elements() for variable in network.variables]
    bits = {"hvd_quant 2 bits": 2, "hvd_quant 4 bits": 4}
    if before:
        bits |= {name + SUFFIX: number for name, number in bits.items()}
    ours = {name: front_end(name, "tensorflow").QSGDCompressor(number) for name, number in bits.items()}
    compressions = {
        "compute alone": None,
        "Horovod fp32": hvd.Compression.none,
        "Horovod fp16": hvd.Compression.fp16,
        **ours,
    }
    return {
        name: Row(make_step(name, network, compression), sizes, ours.get(name))
        for name, compression in compressions.items()
    }


def main() -> None:
    args = turns.parse(argparse.ArgumentParser(description=__doc__))
    tf.config.threading.set_intra_op_parallelism_threads(1)
    library = Horovod()
    batch = tf.random.stateless_normal([BATCH, WIDTH], [library.rank, 0])
    turns.write(library, args.folder, turns.measure(library, make_rows(before=args.before), batch, args))


if __name__ == "__main__":
    main()
