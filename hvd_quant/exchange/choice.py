"""Choice of the exchange algorithm, by the link between the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hvd_quant.exchange.algorithms import choose
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.topology import NOT_HIERARCHICAL, Topology

_KEPT = 1024  # choices remembered, since estimating them takes longer than the rest of a small bucket


@dataclass
class ExchangeChoice:
    """Chooses the algorithm: the same on all ranks.

    Args:
        exchange: the user's choice.
        size: number of ranks.
        link: link between the ranks, as if each had its own host.
        elastic: whether hosts come and go: then ``"hierarchical"`` means the quickest of the others where it
            does not fit them, instead of an error.
        topology: hosts of the ranks; None until all have announced theirs.
    """

    exchange: str
    size: int
    link: Link
    elastic: bool = False
    topology: Topology | None = None
    _chosen: dict[tuple[int, int, bool], str] = field(default_factory=dict, init=False, repr=False)

    def locate(self, topology: Topology) -> None:
        """Set the hosts of the ranks.

        Raises:
            ValueError: the user's exchange does not fit them; on every rank.
        """
        if self.exchange == "hierarchical" and topology.ranks_per_host == 1 and self.size > 1:
            if not self.elastic:
                raise ValueError(NOT_HIERARCHICAL)
            self.exchange = "auto"
        self.topology = topology
        self._chosen.clear()

    def algorithm(self, nbytes: int, count: int, *, hierarchical: bool = True) -> str:
        """Return the name of the algorithm for a number of values and their bytes."""
        key = (nbytes, count, hierarchical)
        if key not in self._chosen:
            if len(self._chosen) == _KEPT:
                self._chosen.clear()
            ranks_per_host = self.topology.ranks_per_host if self.topology is not None else 1
            link = replace(self.link, ranks_per_host=ranks_per_host)
            self._chosen[key] = choose(
                self.exchange, link, self.size, nbytes, count, hierarchical=hierarchical
            )
        return self._chosen[key]
