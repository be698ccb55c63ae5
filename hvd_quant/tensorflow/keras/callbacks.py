"""Callbacks for distributed training with Keras, named after Horovod's."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives all ranks the root's variables, of the model and of the optimizer, when training begins.

    Args:
        root_rank: whose.
        device: where they are broadcast; by default where Horovod has it.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        super().__init__()
        self._root_rank, self._device = root_rank, device
        self._done = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Broadcast, if all ranks have variables already.

        Raises:
            ValueError: the ranks have different ones.
        """
        # A rank that has loaded a checkpoint has the optimizer's, which others would make in the first step.
        if self.model.built and not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        self._done = self._broadcast()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Broadcast after the first batch, which has made the variables, otherwise."""
        if not self._done:
            self._done = self._broadcast()

    def _broadcast(self) -> bool:
        variables = None
        if self.model.built and self.model.optimizer.built:
            # Not the state of random generators, which ranks may want apart.
            variables = [one.value for one in (*self.model.weights, *self.model.optimizer.variables)]
        mine = variables and [(tuple(one.shape), one.dtype.name) for one in variables]
        everyones = hvd.allgather_object(mine, name="hvd_quant.broadcast")
        if None in everyones:
            return False
        if any(one != mine for one in everyones):
            raise ValueError(
                "the ranks have different models or optimizers: the numbers of their variables are "
                f"{[len(one) for one in everyones]}, on this rank of shapes and types {mine}"
            )

        @tf.function
        def broadcast() -> None:
            # Under names of our own: the variables' own have numbers, which may differ between ranks.
            for i, variable in enumerate(variables):
                name = f"hvd_quant.broadcast.{i}"
                variable.assign(hvd.broadcast(variable, self._root_rank, name=name))

        with tf.device(self._device):
            broadcast()
        return True


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages the metrics over the ranks at the end of an epoch.

    It must come before callbacks that act by the metrics, such as ``ReduceLROnPlateau``.

    Args:
        device: where they are reduced; by default where Horovod has it.
        process_set: the ranks.
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
