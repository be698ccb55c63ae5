"""Transport of bytes between ranks by MPI point-to-point messages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

COLLECTIVES = 4  # per transport at most
# Longer messages are split, because counts are 32-bit integers before MPI 4. A part of exactly this size is
# followed by another, which may be empty.
_PART = 2**30


class _Handle:
    """Sends a part to each rank and receives one from each, of whatever size it is."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        tag: int,
        parts: Sequence[np.ndarray],
        buffers: dict[str, np.ndarray],
    ) -> None:
        self._comm, self._tag, self._buffers = comm, tag, buffers
        self._status = MPI.Status()
        self._received: list[list[np.ndarray]] = [[] for _ in parts]
        self._received[comm.rank].append(parts[comm.rank])
        # Each rank starts with the next one, so that they do not all send to the same one at once.
        others = [(comm.rank + step) % comm.size for step in range(1, comm.size)]
        self._awaited = dict.fromkeys(reversed(others))
        self._requests = [
            comm.Isend([parts[other][start : start + _PART], MPI.BYTE], other, tag)
            for other in others
            for start in range(0, len(parts[other]) + 1, _PART)
        ]

    def ready(self) -> bool:
        for source in list(self._awaited):
            while (message := self._comm.Improbe(source, self._tag, self._status)) is not None:
                part = self._buffer(source, self._status.Get_count(MPI.BYTE))
                self._requests.append(message.Irecv([part, MPI.BYTE]))
                self._received[source].append(part)
                if len(part) < _PART:
                    del self._awaited[source]
                    break
        return not self._awaited and MPI.Request.Testall(self._requests)

    def wait(self) -> list[np.ndarray]:
        while not self.ready():
            pass
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in self._received]

    def _buffer(self, source: int, size: int) -> np.ndarray:
        """Return the buffer that received the same part last time, if it is large enough, or a new one."""
        key = f"received {self._tag % COLLECTIVES} {source} {len(self._received[source])}"
        if key not in self._buffers or len(self._buffers[key]) < size:
            self._buffers[key] = np.empty(size, np.uint8)
        return self._buffers[key][:size]


class MpiTransport:
    """Transport for one exchange of up to `COLLECTIVES`; see `hvd_quant.exchange.transport.Transport`.

    Collectives match in the order in which they start, whatever their names, so that ranks that disagree
    about the exchange still meet. Buffers are NumPy arrays.

    Args:
        comm: for the use of transports only.
        number: number of the exchange on ``comm``, the same on all ranks.
        buffers: memory to receive into, kept from one exchange to the next.
    """

    def __init__(self, comm: MPI.Intracomm, number: int, buffers: dict[str, np.ndarray]) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.collectives = 0  # started so far
        self._comm, self._buffers = comm, buffers
        tags = (MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) + 1) // COLLECTIVES  # exchanges until tags repeat
        self._first_tag = COLLECTIVES * (number % tags)

    def allgather(self, message: np.ndarray, sizes: Sequence[int | None], name: str) -> _Handle:
        """See `hvd_quant.exchange.transport.Transport`."""
        return self._begin([message] * self.size)

    def alltoall(self, message: np.ndarray, sizes: Sequence[int], name: str) -> _Handle:
        """See `hvd_quant.exchange.transport.Transport`."""
        ends = itertools.accumulate(sizes)
        return self._begin([message[end - size : end] for end, size in zip(ends, sizes, strict=True)])

    def _begin(self, parts: Sequence[np.ndarray]) -> _Handle:
        tag = self._first_tag + self.collectives
        self.collectives += 1
        return _Handle(self._comm, tag, parts, self._buffers)
