"""Callbacks for learning rates of distributed training, named after Horovod's, which fail under Keras 3."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import keras


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to ``initial_lr * multiplier(epoch)``, and reports it in the logs as ``lr``.

    Args:
        initial_lr: learning rate that is multiplied.
        multiplier: a function of the epoch; or a number m, for m ** (epoch - start_epoch).
        start_epoch: first epoch in which the rate is set.
        end_epoch: first epoch in which it is not any more; None for no end.
        staircase: set it at the beginning of an epoch; otherwise before each batch, and epochs are fractions.
        momentum_correction: as in Horovod. Keras 3 traces an optimizer's momentum as a constant, so that it
            cannot be corrected; a warning says so where there is one.
        steps_per_epoch: batches of an epoch, without ``staircase``; by default what ``fit`` knows.

    Raises:
        ValueError: when training begins: the number of batches is unknown, or the optimizer's learning rate
            is a schedule of its own.
    """

    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: int = 0,
        end_epoch: int | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(multiplier):
            base = multiplier
            multiplier = lambda epoch: base ** (epoch - start_epoch)  # noqa: E731
        self._initial_lr, self._multiplier = initial_lr, multiplier
        self._start_epoch, self._end_epoch = start_epoch, end_epoch
        self._staircase, self._momentum_correction = staircase, momentum_correction
        self._steps_per_epoch = steps_per_epoch
        self._epoch = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Check that the rate can be set."""
        optimizer = self.model.optimizer
        if isinstance(optimizer._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            raise ValueError("the optimizer's learning rate is a schedule already, and cannot be set")
        if not self._staircase and self._steps_per_epoch is None:
            self._steps_per_epoch = self.params.get("steps")
            if self._steps_per_epoch is None:
                raise ValueError(f"{type(self).__name__} needs steps_per_epoch: fit does not know it")
        if self._momentum_correction and getattr(optimizer, "momentum", 0.0):
            warnings.warn(
                f"Keras 3 has no momentum that could be corrected in training: pass {type(self).__name__} "
                "momentum_correction=False",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note the epoch."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the rate, if it is time."""
        if self._epoch < self._start_epoch or (
            self._end_epoch is not None and self._epoch >= self._end_epoch
        ):
            return
        if not self._staircase:
            self._set(self._epoch + batch / self._steps_per_epoch)
        elif batch == 0:
            self._set(self._epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Report the rate."""
        if logs is not None:
            logs["lr"] = float(self.model.optimizer.learning_rate)

    def _set(self, epoch: float) -> None:
        self.model.optimizer.learning_rate = self._initial_lr * self._multiplier(epoch)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from ``initial_lr / hvd.size()`` to ``initial_lr``, batch by batch.

    Goyal et al., "Accurate, Large Minibatch SGD", 2017: in epoch e of w it is
    ``initial_lr / size * (e * (size - 1) / w + 1)``.

    Args:
        initial_lr: learning rate after the warm-up.
        warmup_epochs: epochs that it takes.
        momentum_correction: see `LearningRateScheduleCallback`.
        steps_per_epoch: see `LearningRateScheduleCallback`.
        verbose: 1 for a line when the warm-up ends.
    """

    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: int = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ) -> None:
        def multiplier(epoch: float) -> float:
            epoch += 1.0 / self._steps_per_epoch  # round numbers at the ends of epochs
            return (epoch * (hvd.size() - 1) / warmup_epochs + 1.0) / hvd.size()

        super().__init__(
            initial_lr,
            multiplier,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self._verbose = verbose

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Report the rate."""
        super().on_epoch_end(epoch, logs)
        if epoch == self._end_epoch - 1 and self._verbose and hvd.rank() == 0:
            rate = float(self.model.optimizer.learning_rate)
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.")
