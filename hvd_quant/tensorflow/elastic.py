"""Elastic training with TensorFlow: a state that commits and restores a compressor too.

    >>> import hvd_quant.tensorflow as hq
    >>> from hvd_quant.tensorflow import elastic
    >>> state = elastic.TensorFlowState(model.variables, compressor=compressor, batch=0)
    >>> @elastic.run
    ... def train(state): ...

For ``model.fit`` of Keras 3 see `hvd_quant.tensorflow.keras.elastic`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.common.elastic import ObjectState, run_fn
from horovod.common.exceptions import HorovodInternalError
from horovod.tensorflow import elastic
from horovod.tensorflow.functions import broadcast_object

from hvd_quant.tensorflow.broadcast import broadcast
from hvd_quant.tensorflow.compressor import QuantizedCompressor

_OPERATIONS = re.compile("Horovod(Grouped)?(Allreduce|Allgather|Broadcast|Alltoall|Reducescatter)")


def run(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a training function in an elastic job, again whenever workers come or go.

    As ``hvd.elastic.run``, which takes fewer errors for those of a lost worker, and drops other errors of
    TensorFlow of the same kind, as if the training were done. This one raises them.

    Args:
        function: function whose first argument is the state.
    """

    @functools.wraps(function)
    def attempt(state: ObjectState, *args: Any, **options: Any) -> Any:
        try:
            return function(state, *args, **options)
        except tf.errors.UnknownError as error:
            if _OPERATIONS.search(error.message):
                raise HorovodInternalError(error) from error
            raise

    return run_fn(attempt, elastic._reset)


class TensorFlowState(ObjectState):
    """State of TensorFlow variables, of a compressor, and of whatever else is given by keywords.

    A worker that joins gets the noise and the schedule of bits from the others, and starts with residuals of
    zero. Horovod's own ``TensorFlowState`` waits in its construction for the others, which do not come there.

    Args:
        variables: variables, as many on every rank, in the same order.
        compressor: the compressor of their gradients, if there is one.
        **options: other objects, which become attributes: pickled, and the same on all ranks.
    """

    def __init__(
        self,
        variables: Iterable[tf.Variable],
        compressor: QuantizedCompressor | None = None,
        **options: Any,
    ) -> None:
        self.variables, self.compressor = list(variables), compressor
        self._commit()
        super().__init__(broadcast_object, hvd.rank, **options)

    def save(self) -> None:
        """Commit everything."""
        self._commit()
        super().save()

    def restore(self) -> None:
        """Go back to what was committed."""
        for variable, value in zip(self.variables, self._values, strict=True):
            variable.assign(value)
        if self.compressor is not None:
            self.compressor.restore(self._of_compressor)
        super().restore()

    def sync(self) -> None:
        """Take over rank 0's state, but for residuals, which are each rank's own.

        Raises:
            ValueError: the ranks have other variables.
        """
        broadcast(self._shared(), root_rank=0)
        if self.compressor is not None:
            self.compressor.synchronize_state(broadcast_object)
        self._commit()
        super().sync()

    def _shared(self) -> list[tf.Variable]:
        """Return the variables that are the same on all ranks."""
        return self.variables

    def _commit(self) -> None:
        self._values = [variable.numpy() for variable in self.variables]
        self._of_compressor = self.compressor.state_dict() if self.compressor is not None else None
