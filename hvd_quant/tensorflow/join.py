"""``hvd.join()`` of TensorFlow, refused while gradients are quantized."""

from __future__ import annotations

import functools
from typing import Any

import horovod.tensorflow as hvd

from hvd_quant.horovod import any_used


def refuse_join() -> None:
    """Have ``hvd.join()`` raise a RuntimeError on a rank of several whose gradients have been quantized.

    A rank that has joined takes part in allreduces only. Horovod's thread dies there when the others gather
    messages that it has gathered before, and they wait for it without end.
    """
    join = hvd.join
    if hasattr(join, "__wrapped__"):
        return

    @functools.wraps(join)
    def refusing(*args: Any, **options: Any) -> Any:
        if any_used() and hvd.size() > 1:
            raise RuntimeError(
                f"hvd.join() on rank {hvd.rank()} cannot be used with quantized gradients: the other ranks "
                "would wait for it without end. Give every rank equally many steps, by steps_per_epoch= or "
                "dataset.take(). After the last quantized step, delete the compressor and what holds it"
            )
        return join(*args, **options)

    hvd.join = refusing
