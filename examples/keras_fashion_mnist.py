#!/usr/bin/env python3
"""Train a small CNN on Fashion-MNIST with Keras 3, Horovod and quantized gradients.

    horovodrun -np 2 python examples/keras_fashion_mnist.py --compression qsgd --bits 4

By model.fit, with hvd_quant's DistributedOptimizer: Horovod's own does not work under Keras 3.
"""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow says much when it is imported

import horovod.tensorflow as hvd
import keras
import numpy as np
from fashion_mnist import Report, arguments, load, make_compression, steps_per_epoch
from tf_common import make_model, make_optimizer, set_threads

import hvd_quant.tensorflow as hq
import hvd_quant.tensorflow.keras as hqk


class Batches(keras.utils.PyDataset):
    """A permutation an epoch that all ranks draw alike, of which each takes a share of whole batches."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, size: int, steps: int, seed: int) -> None:
        super().__init__()
        self._images, self._labels, self._size, self._steps = images, labels, size, steps
        self._seed = seed
        self.on_epoch_begin()

    def on_epoch_begin(self) -> None:
        self._seed += 1
        self._own = np.random.default_rng(self._seed).permutation(len(self._labels))[hvd.rank() :: hvd.size()]

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        share = self._own[i * self._size : (i + 1) * self._size]
        return self._images[share], self._labels[share]


class Reporter(keras.callbacks.Callback):
    """Shows a bar and the epochs' results as the other examples do."""

    def __init__(self, report: Report, steps: int) -> None:
        super().__init__()
        self._report, self._steps = report, steps

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._begin = time.perf_counter()
        self._seconds = 0.0
        self._bar = self._report.progress(epoch + 1, self._steps)
        self._advance = self._bar.__enter__()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._advance()

    def on_test_begin(self, logs: Any = None) -> None:
        self._seconds = time.perf_counter() - self._begin
        self._bar.__exit__(None, None, None)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._report.epoch(
            epoch + 1,
            (epoch + 1) * self._steps,
            seconds=self._seconds,
            train_loss=logs["loss"],
            test_loss=logs["val_loss"],
            test_accuracy=logs["val_accuracy"],
        )


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
    model.compile(
        hqk.DistributedOptimizer(optimizer, compression=compression),  # <- the one argument
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,  # XLA compiles none of Horovod's operations
    )
    report = Report(args, hvd, compression, model.count_params())
    model.fit(
        Batches(train_images, train_labels, args.batch_size, steps, 1000 * args.seed),
        epochs=args.epochs,
        verbose=0,
        validation_data=(test_images[hvd.rank() :: hvd.size()], test_labels[hvd.rank() :: hvd.size()]),
        validation_batch_size=500,
        callbacks=[
            hqk.BroadcastGlobalVariablesCallback(0),
            hqk.MetricAverageCallback(),
            Reporter(report, steps),
        ],
    )
    return report.finish(variable.numpy() for variable in model.trainable_variables)


if __name__ == "__main__":
    raise SystemExit(main())
