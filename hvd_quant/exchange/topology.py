"""Assignment of ranks to hosts."""

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
        hosts: name of each rank's host, in rank order; the same on all ranks.
    """

    def __init__(self, hosts: Sequence[Hashable]) -> None:
        self.hosts = tuple(hosts)

    @cached_property
    def ranks_per_host(self) -> int:
        """Ranks per host; 1 if there is one host, or not all have equally many.

        Above 1 there are several hosts, and the hierarchical exchange is available.
        """
        sizes = Counter(self.hosts)
        return self.hosts.count(self.hosts[0]) if len(sizes) > 1 and len(set(sizes.values())) == 1 else 1

    def neighbours(self, rank: int) -> list[int]:
        """Return the ranks on a rank's host, including itself."""
        return [other for other, host in enumerate(self.hosts) if host == self.hosts[rank]]

    def counterparts(self, rank: int) -> list[int]:
        """Return the ranks with a rank's index among their neighbours, one per host.

        They are in the order of their hosts' first ranks, which is the same for all ranks.
        """
        place = self.neighbours(rank).index(rank)
        first = [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]
        return [self.neighbours(other)[place] for other in first]
