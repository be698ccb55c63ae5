"""Which exchange algorithm gradients take, by what lies between the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hvd_quant.exchange.algorithms import choose
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.topology import NOT_HIERARCHICAL, Topology


@dataclass
class ExchangeChoice:
    """What decides on the algorithm: the same on all ranks.

    Args:
        exchange: what the user asked for.
        size: ranks.
        link: between them, as if each had a host of its own.
        topology: where they are; None until all have told.
    """

    exchange: str
    size: int
    link: Link
    topology: Topology | None = None

    def locate(self, topology: Topology) -> None:
        """Note where the ranks are.

        Raises:
            ValueError: the exchange that the user asked for is none for that; on every rank.
        """
        if self.exchange == "hierarchical" and topology.ranks_per_host == 1 and self.size > 1:
            raise ValueError(NOT_HIERARCHICAL)
        self.topology = topology

    def algorithm(self, nbytes: int, count: int, *, hierarchical: bool = True) -> str:
        """The name of the algorithm for so many values in so many bytes."""
        ranks_per_host = self.topology.ranks_per_host if self.topology is not None else 1
        link = replace(self.link, ranks_per_host=ranks_per_host)
        return choose(self.exchange, link, self.size, nbytes, count, hierarchical=hierarchical)
