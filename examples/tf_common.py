"""What the two TensorFlow examples share."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

import hvd_quant.tensorflow as hq


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


def make_schedule(peak: float, total_steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Up in three tenths of the run, and down again by a cosine."""
    warmup = max(1, total_steps * 3 // 10)
    return keras.optimizers.schedules.CosineDecay(
        peak / 25, max(1, total_steps - warmup), warmup_target=peak, warmup_steps=warmup
    )


def replicas_identical(model: keras.Model) -> bool:
    """Whether every rank's variables are the same, bit by bit."""
    digest = hashlib.sha256()
    for variable in model.trainable_variables:
        digest.update(variable.numpy().tobytes())
    return len(set(hvd.allgather_object(digest.hexdigest(), name="replicas"))) == 1


def sent_bytes(compression: Any, model: keras.Model, steps: int) -> tuple[int, int]:
    """What a rank has contributed to the reductions: as float32, and as it was sent."""
    raw = 4 * model.count_params() * steps
    if hvd.size() == 1:
        return raw, 0  # nothing is reduced then
    if isinstance(compression, hq.QuantizedCompressor):
        return raw, compression.stats()["wire_bytes"]
    return raw, raw // 2 if compression is hvd.Compression.fp16 else raw
