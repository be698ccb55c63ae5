"""Which exchange is quickest: a model of what each of them costs.

With n ranks, a payload of c bytes for V values, latency a of a collective, bandwidth b of a rank's link, and
a codec that encodes and decodes r values a second:

    allgather:          a + (n - 1) c / b + n V / r                  (n payloads are decoded)
    scatter-allgather:  2 a + 2 (n - 1) / n c / b + (2 + 1 / n) V / r  (n chunks, and the whole; one encoded)

Encoding the gradients themselves is common to both. docs/exchange.md compares the model with measurements.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What lies between the ranks.

    Args:
        latency: seconds that a collective takes however small it is.
        bandwidth: bytes a second that a rank can receive.
        codec_rate: values a second that a rank can encode or decode.
    """

    latency: float
    bandwidth: float
    codec_rate: float = 2e9


# Bandwidths that are assumed where nothing is stated.
NETWORK = 125e6  # 1 Gbit/s
SHARED_MEMORY = 2e9
HOROVOD_LATENCY = 2e-3  # seconds that a collective of Horovod takes, most of it for its cycle of negotiation


def seconds(exchange: str, link: Link, size: int, payload_bytes: int, count: int) -> float:
    """What the model says that an exchange takes, without the first encoding.

    Args:
        exchange: its name.
        link: between the ranks.
        size: ranks.
        payload_bytes: that a rank encodes its gradients into.
        count: values in them.
    """
    if exchange == "allgather":
        received, coded, collectives = (size - 1) * payload_bytes, size * count, 1
    else:
        received, coded, collectives = 2 * (size - 1) / size * payload_bytes, (2 + 1 / size) * count, 2
    return collectives * link.latency + received / link.bandwidth + coded / link.codec_rate


def choose(link: Link, size: int, payload_bytes: int, count: int) -> str:
    """The exchange that the model takes for the quickest: a function of its arguments alone."""
    return min(
        ("allgather", "scatter_allgather"),
        key=lambda exchange: seconds(exchange, link, size, payload_bytes, count),
    )


def stated_bandwidth() -> float | None:
    """What ``HVD_QUANT_BANDWIDTH`` (Gbit/s) states, in bytes a second; None if it is not set.

    Raises:
        ValueError: it is no positive number.
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
    """The link of the `stated_bandwidth`, or of an assumed one.

    Args:
        one_host: whether all ranks are on one machine.
        latency: of the transport's collectives, in seconds.

    Raises:
        ValueError: as `stated_bandwidth`.
    """
    return Link(latency, stated_bandwidth() or (SHARED_MEMORY if one_host else NETWORK))
