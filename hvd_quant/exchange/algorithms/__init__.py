"""The exchange algorithms, and the choice of the quickest."""

from __future__ import annotations

from hvd_quant.exchange.algorithms.allgather import ALLGATHER
from hvd_quant.exchange.algorithms.base import Algorithm, BucketData, Codec, Encoded, Stage
from hvd_quant.exchange.algorithms.hierarchical import HIERARCHICAL
from hvd_quant.exchange.algorithms.scatter_allgather import SCATTER_ALLGATHER
from hvd_quant.exchange.cost import Link

__all__ = [
    "ALGORITHMS",
    "EXCHANGES",
    "Algorithm",
    "BucketData",
    "Codec",
    "Encoded",
    "Stage",
    "choose",
    "quickest",
]

ALGORITHMS: dict[str, Algorithm] = {one.name: one for one in (ALLGATHER, SCATTER_ALLGATHER, HIERARCHICAL)}
EXCHANGES = ("auto", *ALGORITHMS)  # as users name them


def quickest(link: Link, size: int, payload_bytes: int, count: int, *, hierarchical: bool = True) -> str:
    """Return the exchange that the cost model estimates to be quickest: a function of its arguments alone.

    Args:
        link: link between the ranks.
        size: number of ranks.
        payload_bytes: bytes that a rank encodes its gradients into.
        count: number of values in them.
        hierarchical: whether the hierarchical exchange is available, if the link has several ranks per host.
    """
    hierarchical = hierarchical and link.ranks_per_host > 1
    return min(
        (
            name
            for name, algorithm in ALGORITHMS.items()
            if algorithm.fits(count) and (hierarchical or not algorithm.hierarchical)
        ),
        key=lambda name: ALGORITHMS[name].seconds(link, size, payload_bytes, count),
    )


def choose(
    exchange: str, link: Link, size: int, payload_bytes: int, count: int, *, hierarchical: bool = True
) -> str:
    """Return the algorithm for a number of values: the user's choice, or the `quickest` for ``"auto"``.

    If they are too many for the one that was named, it is another.
    """
    if exchange == "auto":
        return quickest(link, size, payload_bytes, count, hierarchical=hierarchical)
    return exchange if ALGORITHMS[exchange].fits(count) else "scatter_allgather"
