"""What the two TensorFlow examples share."""

from __future__ import annotations

import os

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


def set_threads() -> None:
    """Ranks on one machine share its cores."""
    threads = max(1, (os.cpu_count() or 1) // hvd.local_size())
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    if gpus := tf.config.list_physical_devices("GPU"):
        tf.config.set_visible_devices(gpus[hvd.local_rank() % len(gpus)], "GPU")


def make_model() -> keras.Model:
    """A CNN of 422 thousand parameters."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Reshape((28, 28, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def make_optimizer(peak: float, total_steps: int) -> keras.optimizers.Optimizer:
    """SGD, whose learning rate goes up in three tenths of the run, and down again by a cosine."""
    warmup = max(1, total_steps * 3 // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        peak / 25, max(1, total_steps - warmup), warmup_target=peak, warmup_steps=warmup
    )
    return keras.optimizers.SGD(schedule, momentum=0.9, weight_decay=5e-4)
