"""``hvd.join()`` of TensorFlow, refused once all ranks have quantized gradients together."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd

_join = hvd.join


def refuse_join() -> None:
    """Have ``hvd.join()`` raise a RuntimeError from now on. Call it on all ranks.

    A rank that has joined takes part in allreduces only. Horovod's thread dies there when the others gather
    messages that it has gathered before, and they wait for it without end. Those of a smaller process set do
    not: joining is a matter of all ranks.
    """
    hvd.join = _refuse


def _refuse(*args: Any, **options: Any) -> Any:
    if hvd.size() == 1:  # as an elastic job may end
        return _join(*args, **options)
    raise RuntimeError(
        f"hvd.join() on rank {hvd.rank()} cannot be used with quantized gradients: the other ranks would "
        "wait for it without end. Give every rank equally many steps, by steps_per_epoch= or dataset.take(). "
        "To wait for the others after the last step, call hvd.allreduce(tf.zeros(1)) on all ranks, outside "
        "of a tf.function"
    )
