"""Which ranks share a host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cached_property

NOT_HIERARCHICAL = (
    'exchange="hierarchical" is for several hosts with equally many ranks, two or more, on each: use '
    'exchange="auto", which takes it where it is quicker'
)


class Topology:
    """Ranks on hosts.

    Args:
        hosts: what each rank's host is called, in rank order; the same on all ranks.
    """

    def __init__(self, hosts: Sequence[Hashable]) -> None:
        self.hosts = tuple(hosts)

    @cached_property
    def ranks_per_host(self) -> int:
        """Ranks on every host; 1 where there is one host, or not all have equally many.

        Where it is more, hosts are several, and an exchange by hosts is to be had.
        """
        sizes = Counter(self.hosts)
        return self.hosts.count(self.hosts[0]) if len(sizes) > 1 and len(set(sizes.values())) == 1 else 1

    def neighbours(self, rank: int) -> list[int]:
        """The ranks on a rank's host, itself among them."""
        return [other for other, host in enumerate(self.hosts) if host == self.hosts[rank]]

    def counterparts(self, rank: int) -> list[int]:
        """The ranks that have a rank's place among their neighbours, one on every host.

        They stand in the order of their hosts' first ranks, which is the same for all ranks.
        """
        place = self.neighbours(rank).index(rank)
        first = [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]
        return [self.neighbours(other)[place] for other in first]
