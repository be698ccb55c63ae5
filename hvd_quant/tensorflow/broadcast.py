"""Broadcast of variables whose names may differ between ranks."""

from __future__ import annotations

from collections.abc import Sequence

import horovod.tensorflow as hvd
import tensorflow as tf


def broadcast(variables: Sequence[tf.Variable], root_rank: int) -> None:
    """Broadcast variables of any shapes and dtypes.

    Args:
        variables: as many on every rank, in the same order.
        root_rank: rank whose values all get.

    Raises:
        ValueError: the ranks have other variables; on all of them.
    """
    mine = [(tuple(one.shape), one.dtype.name) for one in variables]
    everyones = hvd.allgather_object(mine, name="hvd_quant.broadcast")
    if any(one != everyones[0] for one in everyones):
        raise ValueError(
            "the ranks have different models or optimizers: the numbers of their variables are "
            f"{[len(one) for one in everyones]}, on this rank of shapes and types {mine}"
        )

    @tf.function
    def run() -> None:
        # Under our own names: the variables' own have numbers, which may differ between ranks.
        for i, variable in enumerate(variables):
            name = f"hvd_quant.broadcast.{i}"
            variable.assign(hvd.broadcast(variable, root_rank, name=name))

    run()
