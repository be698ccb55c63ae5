"""Callbacks for distributed training with Keras, named after Horovod's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from hvd_quant.tensorflow.broadcast import broadcast


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Broadcasts the root's variables, of the model and of its optimizer, to all ranks.

    It does so when training begins, and again after the first batch if some rank had not built all of them.

    Args:
        root_rank: rank whose variables are broadcast.
        device: device of the broadcast; by default Horovod's.

    Raises:
        ValueError: when training begins, or after the first batch: the ranks have different variables.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        super().__init__()
        self._root_rank, self._device = root_rank, device
        self._done = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast the variables that all ranks have."""
        model, optimizer = self.model, self.model.optimizer
        has_optimizer = bool(optimizer and optimizer.built)
        built, optimizers = zip(
            *hvd.allgather_object((model.built, has_optimizer), name="hvd_quant.built"), strict=True
        )
        # Keras never considers a model built that has its own training step, and no call.
        has_model = [one or other for one, other in zip(built, optimizers, strict=True)]
        if any(optimizers) and not all(has_model):
            raise ValueError(
                "some rank's optimizer has variables already, and some rank has none, nor its model's: "
                "build the model and its optimizer on all ranks before fit"
            )
        if any(optimizers) and not has_optimizer:
            # For example after one rank has loaded a checkpoint. If others made theirs in the first step,
            # they would trace that twice, with other names for their gradients.
            optimizer.build(model.trainable_variables)
        if all(has_model):
            self._broadcast([*model.weights, *(shared_variables(optimizer) if any(optimizers) else ())])
        self._done = all(built) and any(optimizers)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Broadcast everything, if some rank lacked variables before the first batch."""
        if not self._done:
            optimizer = self.model.optimizer
            self._broadcast([*self.model.weights, *(shared_variables(optimizer) if optimizer else ())])
            self._done = True

    def _broadcast(self, variables: Sequence[keras.Variable]) -> None:
        """Broadcast variables, which must not include the state of random generators."""
        with tf.device(self._device):
            broadcast([variable.value for variable in variables], self._root_rank)


def shared_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Return an optimizer's variables without accumulated gradients, which differ between ranks."""
    own = {id(variable) for variable in getattr(optimizer, "_accumulated_gradients", ())}
    return [variable for variable in optimizer.variables if id(variable) not in own]


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages the metrics over the ranks at the end of an epoch.

    It must come before callbacks that use the metrics, such as ``ReduceLROnPlateau``.

    Args:
        device: device of the reduction; by default Horovod's.
        process_set: the ranks that take part.
    """

    def __init__(self, device: str = "", process_set: hvd.ProcessSet = hvd.global_process_set) -> None:
        super().__init__()
        self._device, self._process_set = device, process_set

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Replace the metrics by their means."""
        if not logs or not self._process_set.included() or self._process_set.size() == 1:
            return
        numbers = sorted(key for key, value in logs.items() if isinstance(value, (int, float)))
        with tf.device(self._device):
            values = tf.constant([float(logs[key]) for key in numbers], tf.float64)
            means = hvd.allreduce(values, name="hvd_quant.metrics", process_set=self._process_set)
        logs.update(zip(numbers, means.numpy().tolist(), strict=True))
