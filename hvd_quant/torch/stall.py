"""What of Horovod's operations and of gradients is in flight, for `hvd_quant.reducer.stall`."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable

import horovod.torch as hvd
from horovod.torch import mpi_ops

from hvd_quant.reducer.reducer import Reducer
from hvd_quant.reducer.stall import StallCheck, enumeration
from hvd_quant.torch.transport import abandoned_numbers


def in_flight(reducers: list[Reducer]) -> list[int]:
    """Horovod's numbers of operations that are not over, whether we or the user have submitted them."""
    if not hvd.is_initialized():
        return []
    return [number for number in list(mpi_ops._handle_map) if not _is_over(number)]


def _is_over(number: int) -> bool:
    with contextlib.suppress(ValueError):  # who waits for it has it now
        return number in abandoned_numbers() or hvd.poll(number)
    return True


def describe(numbers: list[Hashable], reducers: list[Reducer]) -> list[str]:
    """The lines that say what these operations, and the gradients in flight, are."""
    last_first = enumeration(map(str, sorted(numbers, reverse=True)))
    return [
        f"hvd_quant: rank {hvd.rank()} of {hvd.size()}",
        f"Horovod's operations in flight, by number, the last one first: {last_first}. One without a name is "
        f"called by its number, as allreduce.noname.{max(numbers)}: where that differs, give it a name.",
        *filter(None, (reducer.describe_in_flight() for reducer in reducers)),
    ]


check: StallCheck[Reducer] = StallCheck(in_flight, describe)
