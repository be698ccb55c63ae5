#!/usr/bin/env python3
"""Train a small CNN on Fashion-MNIST with TensorFlow, Horovod and quantized gradients.

    horovodrun -np 2 python examples/tf2_fashion_mnist.py --compression qsgd --bits 4

A loop of one's own, with Horovod's DistributedGradientTape, which gets the compressor. For model.fit see
keras_fashion_mnist.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow says much when it is imported

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from fashion_mnist import Report, arguments, load, make_compression, steps_per_epoch
from tf_common import make_model, make_optimizer, set_threads

import hvd_quant.tensorflow as hq

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """A permutation that all ranks draw alike, of which each takes a share of equally many whole batches."""
    own = np.random.default_rng(seed).permutation(count)[hvd.rank() :: hvd.size()]
    yield from np.split(own[: steps * size], steps)


def evaluate(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Loss and accuracy over the whole set, of which each rank computes its share."""
    x, y = images[hvd.rank() :: hvd.size()], labels[hvd.rank() :: hvd.size()]
    output = model.predict(x, batch_size=500, verbose=0)
    mine = [float(LOSS(y, output)) * len(y), float((output.argmax(1) == y).sum())]
    loss, accuracy = hvd.allreduce(tf.constant(mine, tf.float64), op=hvd.Sum).numpy() / len(labels)
    return float(loss), float(accuracy)


def main() -> int:
    args = arguments(__doc__)
    hvd.init()
    set_threads()
    keras.utils.set_random_seed(args.seed)
    train_images, train_labels = (array[: args.limit] for array in load(args.data_dir, "train"))
    test_images, test_labels = load(args.data_dir, "t10k")
    steps = steps_per_epoch(len(train_labels), args, hvd.size())

    model = make_model()
    compression = make_compression(args, args.epochs * steps, hq, hvd.Compression)
    optimizer = make_optimizer(args.lr, args.epochs * steps)
    optimizer.build(model.trainable_variables)
    hvd.broadcast_variables([v.value for v in (*model.variables, *optimizer.variables)], root_rank=0)

    @tf.function
    def train_step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = LOSS(labels, model(images, training=True))
        tape = hvd.DistributedGradientTape(tape, compression=compression)  # <- the one argument
        variables = [variable.value for variable in model.trainable_variables]
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), model.trainable_variables, strict=True))
        return loss

    report = Report(args, hvd, compression, model.count_params())
    for epoch in range(1, args.epochs + 1):
        begin = time.perf_counter()
        losses = []
        with report.progress(epoch, steps) as advance:
            for share in batches(len(train_labels), args.batch_size, steps, 1000 * args.seed + epoch):
                losses.append(train_step(tf.constant(train_images[share]), tf.constant(train_labels[share])))
                advance()
        train_loss = float(hvd.allreduce(tf.reduce_mean(losses), name="train.loss"))
        seconds = time.perf_counter() - begin
        loss, accuracy = evaluate(model, test_images, test_labels)
        report.epoch(
            epoch,
            epoch * steps,
            seconds=seconds,
            train_loss=train_loss,
            test_loss=loss,
            test_accuracy=accuracy,
        )
    return report.finish(variable.numpy() for variable in model.trainable_variables)


if __name__ == "__main__":
    raise SystemExit(main())
