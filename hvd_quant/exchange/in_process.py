"""N ranks in one process, one of which runs at a time: a transport for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


class Network:
    """State shared by the ranks.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.ranks: list[InProcess] = [InProcess(self, rank) for rank in range(size)]
        self.received_bytes = [0] * size  # by each rank from the others
        self.between: Counter[tuple[int, int]] = Counter()  # bytes by (sender, receiver)
        self._collectives: dict[tuple[str, int], dict[int, list[np.ndarray]]] = {}
        self._posted: Counter[tuple[str, int]] = Counter()

    def post(self, name: str, rank: int, parts: list[np.ndarray]) -> _Handle:
        """Add a rank's parts, one per rank, to the next collective of that name."""
        number = self._posted[name, rank]
        self._posted[name, rank] += 1
        collective = self._collectives.setdefault((name, number), {})
        collective[rank] = parts
        if len(collective) == self.size:
            del self._collectives[name, number]  # the handles keep it
        return _Handle(self, collective, rank)


class _Handle:
    def __init__(self, network: Network, collective: dict[int, list[np.ndarray]], rank: int) -> None:
        self._network, self._collective, self._rank = network, collective, rank
        self.number = network.ranks[rank].operations

    def ready(self) -> bool:
        return len(self._collective) == self._network.size

    def wait(self) -> list[np.ndarray]:
        if not self.ready():
            raise RuntimeError("a rank waits for others, none of which can run meanwhile")
        received = [self._collective[rank][self._rank] for rank in range(self._network.size)]
        for rank, part in enumerate(received):
            self._network.between[rank, self._rank] += part.size
        self._network.received_bytes[self._rank] += sum(
            part.size for rank, part in enumerate(received) if rank != self._rank
        )
        return received

    def abandon(self) -> None:
        pass


class InProcess:
    """The transport of one rank of a `Network`; see `hvd_quant.exchange.transport.CountedTransport`."""

    errors: tuple[type[Exception], ...] = (ConnectionError,)
    ranks: Sequence[int] | None = None

    def __init__(self, network: Network, rank: int) -> None:
        self._network, self.rank, self.size = network, rank, network.size
        self.operations = 0  # submitted by this rank
        self.unanswered: dict[str, _Handle] = {}

    def allgather(self, message: np.ndarray, sizes: Sequence[int | None], name: str) -> _Handle:
        """See `hvd_quant.exchange.transport.Transport`."""
        self.operations += 1
        return self._network.post(name, self.rank, [message.copy()] * self.size)

    def alltoall(self, message: np.ndarray, sizes: Sequence[int], name: str) -> _Handle:
        """See `hvd_quant.exchange.transport.Transport`."""
        self.operations += 1
        ends = np.cumsum(sizes)
        parts = [message[end - size : end].copy() for end, size in zip(ends, sizes, strict=True)]
        return self._network.post(name, self.rank, parts)

    def count(self, handle: _Handle) -> int:
        """See `hvd_quant.exchange.transport.CountedTransport`."""
        return handle.number

    def level(self, others: int, own: int) -> None:
        """See `hvd_quant.exchange.transport.CountedTransport`."""
        self.operations += max(0, others - own)

    def forget_abandoned(self) -> None:
        """See `hvd_quant.exchange.transport.CountedTransport`."""
