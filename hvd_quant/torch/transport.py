"""Transport of bytes between ranks by Horovod's own collectives."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch

from hvd_quant.codec.message import cut
from hvd_quant.exchange.transport import Buffer
from hvd_quant.horovod import initialisation


class HorovodHandle:
    """Handle of a Horovod operation in flight; see `hvd_quant.exchange.transport.Handle`.

    After ``hvd.shutdown()`` and ``hvd.init()`` Horovod numbers its operations from 1 again, so an earlier one
    is lost: its number may be another's.

    Args:
        number: Horovod's number of it, just received.
        unpack: converts its result to what each rank has sent.
    """

    def __init__(self, number: int, unpack: Callable[[Any], list[Buffer]]) -> None:
        self._number, self._unpack = number, unpack
        self._initialisation = initialisation()

    @property
    def number(self) -> int | None:
        """Horovod's number of it; None after another ``hvd.init()``."""
        return None if self.lost else self._number

    @property
    def lost(self) -> bool:
        """Whether Horovod has been initialised since."""
        return self._initialisation is not initialisation()

    def ready(self) -> bool:
        """See `hvd_quant.exchange.transport.Handle`."""
        return self.lost or hvd.poll(self._number)

    def wait(self) -> list[Buffer]:
        """See `hvd_quant.exchange.transport.Handle`.

        Raises:
            HorovodInternalError: it has failed, or Horovod has been shut down.
        """
        if self.lost:
            raise hvd.HorovodInternalError(
                "hvd.shutdown() was called while quantized gradients were in flight"
            )
        return self._unpack(hvd.synchronize(self._number))

    def abandon(self) -> None:
        """See `hvd_quant.exchange.transport.Handle`."""
        _abandoned.append(self)


_abandoned: list[HorovodHandle] = []  # nobody waits for them, and some may never complete
# Unanswered questions, by process set. They do not belong to a compressor: its number may be what differs.
_unanswered: dict[int | None, dict[str, HorovodHandle]] = {}


def abandoned_numbers() -> set[int | None]:
    """Return Horovod's numbers of what nobody waits for."""
    return {handle.number for handle in list(_abandoned)}


class _NoProcessSet:
    process_set_id = -1


def submit_as_many(others: int, own: int) -> None:
    """Raise this rank's count of operations to another's.

    Horovod names an unnamed operation by how many its process has submitted, so that ranks that have counted
    differently wait for each other. It counts those that it refuses, too.

    Args:
        others: the largest number of operations that a rank has submitted.
        own: this rank's number.
    """
    for _ in range(others - own):
        with contextlib.suppress(IndexError, ValueError, hvd.HorovodInternalError):
            hvd.barrier(process_set=_NoProcessSet)


class HorovodTransport:
    """See `hvd_quant.exchange.transport.CountedTransport`. Buffers are NumPy arrays, or tensors on a GPU.

    Args:
        process_set: the ranks that take part.
    """

    errors = (hvd.HorovodInternalError, ValueError)  # ValueError after hvd.shutdown()

    def __init__(self, process_set: hvd.ProcessSet) -> None:
        self._process_set = process_set
        self.rank, self.size = process_set.rank(), process_set.size()
        self.ranks = process_set.ranks

    def allgather(self, message: Buffer, sizes: Sequence[int | None], name: str) -> HorovodHandle:
        """See `hvd_quant.exchange.transport.Transport`."""
        number = hvd.allgather_async(_tensor(message), name, self._process_set)
        return HorovodHandle(number, lambda out: _split(out, sizes))

    def alltoall(self, message: Buffer, sizes: Sequence[int], name: str) -> HorovodHandle:
        """See `hvd_quant.exchange.transport.Transport`."""
        splits = torch.tensor(sizes, dtype=torch.int32)
        number = hvd.alltoall_async(_tensor(message), splits, name, self._process_set)
        return HorovodHandle(number, lambda out: _split(out[0], out[1].tolist()))

    @property
    def unanswered(self) -> MutableMapping[str, HorovodHandle]:
        """See `hvd_quant.exchange.transport.CountedTransport`."""
        questions = _unanswered.setdefault(self._process_set.process_set_id, {})
        for name in [name for name, handle in questions.items() if handle.lost]:
            del questions[name]
        return questions

    def count(self, handle: HorovodHandle) -> int:
        """See `hvd_quant.exchange.transport.CountedTransport`."""
        return handle.number or 0

    def level(self, others: int, own: int) -> None:
        """See `hvd_quant.exchange.transport.CountedTransport`."""
        submit_as_many(others, own)

    def forget_abandoned(self) -> None:
        """See `hvd_quant.exchange.transport.CountedTransport`: Horovod keeps their tensors until then."""
        handles, _abandoned[:] = _abandoned[:], []
        for handle in handles:
            with contextlib.suppress(*self.errors):
                if handle.ready():
                    handle.wait()
                else:
                    _abandoned.append(handle)


def gather_json(own: Any, name: str, process_set: hvd.ProcessSet) -> list[Any]:
    """Return every rank's JSON value; Horovod's ``allgather_object`` knows no process sets."""
    message = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
    sizes = hvd.allgather(torch.tensor([len(message)]), f"{name}.sizes", process_set).tolist()
    received = hvd.allgather(message, name, process_set)
    return [json.loads(part.numpy().tobytes()) for part in received.split(sizes)]


def _split(received: torch.Tensor, sizes: Sequence[int | None]) -> list[Buffer]:
    """Split what was received by rank; empty parts if that is impossible."""
    if received.is_cuda:  # written on Horovod's stream, and read on this one
        received.record_stream(torch.cuda.current_stream(received.device))
    return cut(received if received.is_cuda else received.numpy(), sizes)


def _tensor(buffer: Buffer) -> torch.Tensor:
    return torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
