"""Bytes between ranks by Horovod's own collectives."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from hvd_quant.exchange.transport import Buffer

POLL_SECONDS = 1e-3  # between two looks at what is waited for, as in Horovod itself


class _Handle:
    def __init__(
        self, handle: int, unpack: Callable[[Any], list[Buffer]], while_waiting: Callable[[], None]
    ) -> None:
        self._handle, self._unpack, self._while_waiting = handle, unpack, while_waiting

    def ready(self) -> bool:
        return hvd.poll(self._handle)

    def wait(self) -> list[Buffer]:
        while not self.ready():
            self._while_waiting()
            time.sleep(POLL_SECONDS)
        return self._unpack(hvd.synchronize(self._handle))


class HorovodTransport:
    """See `hvd_quant.exchange.transport.Transport`. Buffers are NumPy arrays, or tensors on a GPU.

    Args:
        process_set: the ranks that take part.
        while_waiting: called again and again while a collective is waited for; may raise an exception.
    """

    def __init__(self, process_set: hvd.ProcessSet, while_waiting: Callable[[], None]) -> None:
        self._process_set, self._while_waiting = process_set, while_waiting
        self.rank, self.size = process_set.rank(), process_set.size()

    def allgather(self, message: Buffer, sizes: Sequence[int], name: str) -> _Handle:
        """See `hvd_quant.exchange.transport.Transport`."""
        tensor = _tensor(message)
        handle = hvd.allgather_async(tensor, name, self._process_set)
        return _Handle(handle, lambda out: _split(out, sizes), self._while_waiting)

    def alltoall(self, message: Buffer, sizes: Sequence[int], name: str) -> _Handle:
        """See `hvd_quant.exchange.transport.Transport`."""
        tensor = _tensor(message)
        splits = torch.tensor(sizes, dtype=torch.int32)
        handle = hvd.alltoall_async(tensor, splits, name, self._process_set)
        return _Handle(handle, lambda out: _split(out[0], out[1].tolist()), self._while_waiting)


def _split(received: torch.Tensor, sizes: Sequence[int]) -> list[Buffer]:
    """What each rank has sent; nothing of it, where that cannot be told."""
    if received.numel() != sum(sizes):
        sizes = [0] * len(sizes)
        received = received[:0]
    buffer = received if received.is_cuda else received.numpy()
    ends = list(itertools.accumulate(sizes))
    return [buffer[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _tensor(buffer: Buffer) -> torch.Tensor:
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
