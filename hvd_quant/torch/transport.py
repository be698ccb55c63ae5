"""Bytes between ranks by Horovod's own collectives."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.torch import mpi_ops

from hvd_quant.codec.message import cut
from hvd_quant.exchange.transport import Buffer

POLL_SECONDS = 1e-3  # between two looks at what is waited for, as in Horovod itself


class Collective:
    """An operation of Horovod's on its way.

    After ``hvd.shutdown()`` and ``hvd.init()`` Horovod numbers its operations from 1 again, so that one from
    before is over for good: its number may be another's.

    Args:
        handle: Horovod's number of it, just received.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._era = mpi_ops._handle_map  # another one after every hvd.init()

    @property
    def handle(self) -> int | None:
        """Horovod's number of it; None after another ``hvd.init()``."""
        return None if self.lost else self._handle

    @property
    def lost(self) -> bool:
        """Whether Horovod has been initialised since."""
        return self._era is not mpi_ops._handle_map

    def poll(self) -> bool:
        """Whether it is over, so that `fetch` does not wait."""
        return self.lost or hvd.poll(self._handle)

    def fetch(self) -> Any:
        """What it has brought; to be called once.

        Raises:
            HorovodInternalError: it has failed, or Horovod has been shut down.
        """
        if self.lost:
            raise hvd.HorovodInternalError(
                "hvd.shutdown() was called while quantized gradients were on their way"
            )
        return hvd.synchronize(self._handle)


class _NoProcessSet:
    process_set_id = -1


def submit_as_many(others: int, own: int) -> None:
    """Have this rank's count of operations go up to another's.

    Horovod calls an operation without a name by how many its process has submitted, so that ranks that have
    counted differently wait for each other. It counts those that it refuses, too.

    Args:
        others: the greatest number of operations that a rank has submitted.
        own: this rank's.
    """
    for _ in range(others - own):
        with contextlib.suppress(IndexError, ValueError, hvd.HorovodInternalError):
            hvd.barrier(process_set=_NoProcessSet)


_abandoned: list[Collective] = []  # nobody waits for them, and some may never be over


def abandon(collective: Collective) -> None:
    """Let go of a collective."""
    _abandoned.append(collective)


def abandoned_handles() -> set[int | None]:
    """Horovod's numbers of what nobody waits for."""
    return {collective.handle for collective in list(_abandoned)}


def forget_abandoned() -> None:
    """Have Horovod forget those that are over by now: until then it keeps their tensors."""
    collectives, _abandoned[:] = _abandoned[:], []
    for collective in collectives:
        with contextlib.suppress(hvd.HorovodInternalError, ValueError):  # ValueError after hvd.shutdown
            if collective.poll():
                collective.fetch()
            else:
                _abandoned.append(collective)


class HorovodHandle:
    """See `hvd_quant.exchange.transport.Handle`."""

    def __init__(
        self, transport: HorovodTransport, handle: int, unpack: Callable[[Any], list[Buffer]]
    ) -> None:
        self._transport, self._collective, self._unpack = transport, Collective(handle), unpack
        transport.underway.add(self._collective)

    def ready(self) -> bool:
        """See `hvd_quant.exchange.transport.Handle`."""
        return self._collective.poll()

    def wait(self) -> list[Buffer]:
        """See `hvd_quant.exchange.transport.Handle`."""
        while not self.ready():
            self._transport.while_waiting()
            time.sleep(POLL_SECONDS)
        self._transport.underway.discard(self._collective)
        return self._unpack(self._collective.fetch())


class HorovodTransport:
    """See `hvd_quant.exchange.transport.Transport`. Buffers are NumPy arrays, or tensors on a GPU.

    Args:
        process_set: the ranks that take part.
        while_waiting: called again and again while a collective is waited for; may raise an exception.
    """

    def __init__(self, process_set: hvd.ProcessSet, while_waiting: Callable[[], object]) -> None:
        self._process_set, self.while_waiting = process_set, while_waiting
        self.rank, self.size = process_set.rank(), process_set.size()
        self.underway: set[Collective] = set()

    def allgather(self, message: Buffer, sizes: Sequence[int | None], name: str) -> HorovodHandle:
        """See `hvd_quant.exchange.transport.Transport`."""
        handle = hvd.allgather_async(_tensor(message), name, self._process_set)
        return HorovodHandle(self, handle, lambda out: _split(out, sizes))

    def alltoall(self, message: Buffer, sizes: Sequence[int], name: str) -> HorovodHandle:
        """See `hvd_quant.exchange.transport.Transport`."""
        splits = torch.tensor(sizes, dtype=torch.int32)
        handle = hvd.alltoall_async(_tensor(message), splits, name, self._process_set)
        return HorovodHandle(self, handle, lambda out: _split(out[0], out[1].tolist()))

    def abandon(self) -> None:
        """Let go of everything that is under way."""
        for collective in self.underway:
            abandon(collective)
        self.underway.clear()


def _split(received: torch.Tensor, sizes: Sequence[int | None]) -> list[Buffer]:
    """What each rank has sent; nothing of it, where that cannot be told."""
    if received.is_cuda:  # of Horovod's stream, and read on this one
        received.record_stream(torch.cuda.current_stream(received.device))
    return cut(received if received.is_cuda else received.numpy(), sizes)


def _tensor(buffer: Buffer) -> torch.Tensor:
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
