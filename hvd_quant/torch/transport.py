"""Bytes between ranks by Horovod's own collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import horovod.torch as hvd
import numpy as np
import torch

from hvd_quant.exchange.transport import Buffer


class _Handle:
    def __init__(self, handle: int, unpack: Callable[[object], list[Buffer]]) -> None:
        self._handle, self._unpack = handle, unpack

    def ready(self) -> bool:
        return hvd.poll(self._handle)

    def wait(self) -> list[Buffer]:
        return self._unpack(hvd.synchronize(self._handle))


class HorovodTransport:
    """See `hvd_quant.exchange.transport.Transport`. Buffers are NumPy arrays, or tensors on a GPU.

    Args:
        process_set: the ranks that take part.
    """

    def __init__(self, process_set: hvd.ProcessSet) -> None:
        self._process_set = process_set
        self.rank, self.size = process_set.rank(), process_set.size()

    def allgather(self, message: Buffer, name: str) -> _Handle:
        """An alltoall in which all others get the same: Open MPI's allgather takes longer."""
        tensor = _tensor(message)
        copies = tensor if self.size == 2 else tensor.repeat(self.size - 1)
        sizes = [len(message)] * self.size
        sizes[self.rank] = 0  # what a rank sends to itself need not travel
        return self._alltoall(copies, sizes, message, name)

    def alltoall(self, message: Buffer, sizes: Sequence[int], name: str) -> _Handle:
        """See `hvd_quant.exchange.transport.Transport`."""
        return self._alltoall(_tensor(message), sizes, None, name)

    def _alltoall(self, tensor: torch.Tensor, sizes: Sequence[int], own: Buffer | None, name: str) -> _Handle:
        splits = torch.tensor(sizes, dtype=torch.int32)
        handle = hvd.alltoall_async(tensor, splits, name, self._process_set)

        def unpack(result: tuple[torch.Tensor, torch.Tensor]) -> list[Buffer]:
            received, received_sizes = result
            parts = [
                part if tensor.is_cuda else part.numpy() for part in received.split(received_sizes.tolist())
            ]
            if own is not None:
                parts[self.rank] = own
            return parts

        return _Handle(handle, unpack)


def _tensor(buffer: Buffer) -> torch.Tensor:
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
