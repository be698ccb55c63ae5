"""A cost model of the exchanges, with one line per algorithm.

With n ranks, a payload of c bytes for V values, latency a of a collective, bandwidth b of a host's link, and
a codec that encodes and decodes r values per second, where every rank has its own host:

    allgather:          a + (n - 1) c / b + n V / r                  (n payloads are decoded)
    scatter-allgather:  2 a + 2 (n - 1) / n c / b + (2 + 1 / n) V / r  (n chunks, and the whole; one encoded)

With h hosts of l ranks, these share their host's link, and each receives for itself what comes from other
hosts. m is the bandwidth between ranks of a host:

    allgather:          a + l (n - l) c / b + n V / r
    scatter-allgather:  2 a + 2 l (n - l) / n c / b + (2 + 1 / n) V / r
    hierarchical:       3 a + (h - 1) c / b + (l - 1) / l (4 V + h c) / m + (h + 1 / l) V / r

Encoding the gradients themselves is common to both. docs/exchange.md compares the model with measurements,
and `hvd_quant.exchange.algorithms.quickest` chooses by it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Link between the ranks.

    Args:
        latency: seconds per collective, however small it is.
        bandwidth: bytes per second that a host can receive, or a rank if all are on one host.
        codec_rate: values per second that a rank can encode or decode.
        ranks_per_host: ranks that share the bandwidth. Above 1 only with several hosts of equally many ranks.
    """

    latency: float
    bandwidth: float
    codec_rate: float = 2e9
    ranks_per_host: int = 1

    def seconds(self, collectives: int, received_bytes: float, coded: float) -> float:
        """Return the seconds to receive a number of bytes, and to decode or encode a number of values."""
        return collectives * self.latency + received_bytes / self.bandwidth + coded / self.codec_rate


# Bandwidths that are assumed where none is stated.
NETWORK = 125e6  # 1 Gbit/s
SHARED_MEMORY = 2e9
HOROVOD_LATENCY = 2e-3  # seconds per Horovod collective, most of it for its negotiation cycle


def stated_bandwidth() -> float | None:
    """Return ``HVD_QUANT_BANDWIDTH`` (Gbit/s) in bytes per second; None if it is not set.

    Raises:
        ValueError: it is not a positive number.
    """
    text = os.environ.get("HVD_QUANT_BANDWIDTH")
    if text is None:
        return None
    try:
        gigabits = float(text)
    except ValueError:
        gigabits = 0.0
    if not 0.0 < gigabits < float("inf"):
        raise ValueError(f"HVD_QUANT_BANDWIDTH must be a positive number of Gbit/s, not {text!r}")
    return gigabits * 1e9 / 8


def link_from_environment(one_host: bool, latency: float) -> Link:
    """Return the link with the `stated_bandwidth`, or with an assumed one.

    Args:
        one_host: whether all ranks are on one machine.
        latency: latency of the transport's collectives, in seconds.

    Raises:
        ValueError: as `stated_bandwidth`.
    """
    return Link(latency, stated_bandwidth() or (SHARED_MEMORY if one_host else NETWORK))
