"""What of Horovod's operations and of gradients is in flight, for `hvd_quant.stall`."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable
from typing import Protocol

import horovod.torch as hvd
from horovod.torch import mpi_ops

from hvd_quant.stall import StallCheck, enumeration
from hvd_quant.torch.transport import abandoned_handles


class Watched(Protocol):
    """A compressor."""

    def describe_in_flight(self) -> str | None:
        """The gradients that are in flight; None if there are none. Called from another thread."""


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()


def watch(compressor: Watched) -> None:
    """Have a warning logged where operations stall, which names the compressor's gradients."""
    _watched.add(compressor)
    _check.start()


def in_flight() -> list[int]:
    """Horovod's numbers of operations that are not over, whether we or the user have submitted them."""
    if not hvd.is_initialized():
        return []
    return [handle for handle in list(mpi_ops._handle_map) if not _is_over(handle)]


def _is_over(handle: int) -> bool:
    with contextlib.suppress(ValueError):  # who waits for it has it now
        return handle in abandoned_handles() or hvd.poll(handle)
    return True


def describe(handles: list[Hashable]) -> list[str]:
    """The lines that say what these operations, and the gradients in flight, are."""
    last_first = enumeration(map(str, sorted(handles, reverse=True)))
    return [
        f"hvd_quant: rank {hvd.rank()} of {hvd.size()}",
        f"Horovod's operations in flight, by number, the last one first: {last_first}. One without a name is "
        f"called by its number, as allreduce.noname.{max(handles)}: where that differs, give it a name.",
        *filter(None, (compressor.describe_in_flight() for compressor in list(_watched))),
    ]


_check = StallCheck(in_flight, describe)
