"""Horovod's operations and the gradients in flight, for `hvd_quant.reducer.stall`."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable

import horovod.torch as hvd
from horovod.torch import mpi_ops

from hvd_quant.reducer.reducer import Reducer
from hvd_quant.reducer.stall import StallCheck, enumeration
from hvd_quant.torch.transport import abandoned_numbers


def in_flight(reducers: list[Reducer]) -> list[int]:
    """Return Horovod's numbers of operations that are not over, whether submitted by us or by the user."""
    if not hvd.is_initialized():
        return []
    return [number for number in list(mpi_ops._handle_map) if not _is_over(number)]


def _is_over(number: int) -> bool:
    with contextlib.suppress(ValueError):  # whoever waits for it has its handle
        return number in abandoned_numbers() or hvd.poll(number)
    return True


def describe(numbers: list[Hashable], reducers: list[Reducer]) -> list[str]:
    """Describe these operations and the gradients in flight, in lines."""
    last_first = enumeration(map(str, sorted(numbers, reverse=True)))
    return [
        f"hvd_quant: rank {hvd.rank()} of {hvd.size()}",
        f"Horovod's operations in flight, by number, the last one first: {last_first}. One without a name is "
        f"called by its number, as allreduce.noname.{max(numbers)}: where that differs, give it a name.",
        *filter(None, (reducer.describe_in_flight() for reducer in reducers)),
    ]


check: StallCheck[Reducer] = StallCheck(in_flight, describe)
