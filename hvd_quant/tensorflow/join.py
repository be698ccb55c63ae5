"""``hvd.join()`` of TensorFlow, refused once gradients have been quantized."""

from __future__ import annotations

from typing import Any, NoReturn

import horovod.tensorflow as hvd


def refuse_join() -> None:
    """Have ``hvd.join()`` raise a RuntimeError from now on. Call it on all ranks.

    A rank that has joined takes part in allreduces only. Horovod's thread dies there when the others gather
    messages that it has gathered before, and they wait for it without end.
    """
    hvd.join = _refuse


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        f"hvd.join() on rank {hvd.rank()} cannot be used with quantized gradients: the other ranks would "
        "wait for it without end. Give every rank equally many steps, by steps_per_epoch= or dataset.take(). "
        "To wait for the others after the last step, call hvd.allreduce(tf.zeros(1))"
    )
