"""Elastic training with Keras 3: the state, and the callbacks that keep it, named after Horovod's.

Horovod's own state fails under Keras 3.

    >>> from hvd_quant.tensorflow.keras import elastic
    >>> state = elastic.KerasState(model, compressor=compressor, batch=0, epoch=0)
    >>> @elastic.run
    ... def train(state):
    ...     callbacks = [
    ...         elastic.UpdateEpochStateCallback(state),
    ...         elastic.UpdateBatchStateCallback(state),
    ...         elastic.CommitStateCallback(state),
    ...     ]
    ...     model.fit(dataset, steps_per_epoch=100, epochs=10 - state.epoch, callbacks=callbacks)
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from horovod.common.elastic import State

from hvd_quant.tensorflow.compressor import QuantizedCompressor
from hvd_quant.tensorflow.elastic import TensorFlowState, run
from hvd_quant.tensorflow.keras.callbacks import shared_variables

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]


class KerasState(TensorFlowState):
    """State of a Keras 3 model and its optimizer, and whatever else is given by keywords.

    Args:
        model: the model, built.
        optimizer: its optimizer; by default the one that it was compiled with.
        compressor: the optimizer's compressor, if it has one.
        **options: other objects, which become attributes: pickled, and the same on all ranks.

    Raises:
        ValueError: the model has no variables yet, or no optimizer.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer | None = None,
        compressor: QuantizedCompressor | None = None,
        **options: Any,
    ) -> None:
        if not model.built:
            raise ValueError("build the model first, as by model.build(input_shape): it has no variables yet")
        self.model = model
        self.optimizer = optimizer if optimizer is not None else model.optimizer
        if self.optimizer is None:
            raise ValueError("compile the model first, or give the state an optimizer")
        if not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        variables = [variable.value for variable in (*model.variables, *self.optimizer.variables)]
        super().__init__(variables, compressor=compressor, **options)

    def _shared(self) -> list[tf.Variable]:
        """Return the variables that are the same on all ranks: not the state of random generators."""
        shared = (*self.model.weights, *shared_variables(self.optimizer))
        return [variable.value for variable in shared]


class CommitStateCallback(keras.callbacks.Callback):
    """Commits the state, and asks for changes of the hosts; after the callbacks that write to it.

    Args:
        state: state to commit.
        batches_per_commit: how often: every so many batches, and at the end of an epoch.
    """

    def __init__(self, state: State, batches_per_commit: int = 1) -> None:
        super().__init__()
        self._state, self._batches = state, batches_per_commit
        self._left = batches_per_commit

    def on_train_begin(self, logs: Any = None) -> None:
        """Count anew, so that all ranks commit together."""
        self._left = self._batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Commit, if it is time."""
        self._left -= 1
        if self._left == 0:
            self._left = self._batches
            self._state.commit()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Commit."""
        self._state.commit()


class UpdateBatchStateCallback(keras.callbacks.Callback):
    """Keeps the number of the epoch's batches that are done in ``state.batch``.

    After workers have come or gone, ``fit`` begins the epoch again. This callback ends it after as many
    batches as were left: put it before callbacks that stop training at the end of an epoch.

    Args:
        state: state with a ``batch``, and an ``epoch`` if another callback counts these.
        steps_per_epoch: batches of a whole epoch; by default those that ``fit`` has, which must not be fewer
            after a change: give it ``steps_per_epoch``.
    """

    def __init__(self, state: State, steps_per_epoch: int | None = None) -> None:
        super().__init__()
        self._state, self._steps = state, steps_per_epoch
        self._ends_early = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Check that the end of an epoch is known.

        Raises:
            ValueError: it is not.
        """
        if self._whole_epoch() is None:
            raise ValueError("give fit, or UpdateBatchStateCallback, steps_per_epoch: it is not known")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Go on after the batches that are done."""
        self._ends_early = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the batch; and the epoch with its last one, because the state may be committed now."""
        state, steps = self._state, self.params.get("steps")
        state.batch += 1
        if state.batch < self._whole_epoch():
            return
        state.batch = 0
        if hasattr(state, "epoch"):
            state.epoch += 1
        if (steps is None or batch + 1 < steps) and not self.model.stop_training:
            self.model.stop_training = self._ends_early = True  # which Keras reads after every batch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Let training go on with the next epoch."""
        self._state.batch = 0
        if self._ends_early:
            self.model.stop_training = False

    def _whole_epoch(self) -> int | None:
        return self._steps if self._steps is not None else self.params.get("steps")


class UpdateEpochStateCallback(keras.callbacks.Callback):
    """Keeps the number of the epochs that are done in ``state.epoch``.

    Args:
        state: state with an ``epoch``.
    """

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state
        self._before = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Count from the epochs that were done before: ``fit`` numbers its own from 0."""
        self._before = self._state.epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Count the epoch."""
        self._state.epoch = self._before + epoch + 1
