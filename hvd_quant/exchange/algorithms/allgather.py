"""Every rank sends all of its gradients to every other, which averages them.

One rounding. A rank receives n - 1 payloads.
"""

from __future__ import annotations

from hvd_quant.codec.message import Messages
from hvd_quant.exchange.algorithms.base import Algorithm, BucketData, Encoded, Stage
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.layout import GroupLayout
from hvd_quant.exchange.transport import Buffer


def _encode(data: BucketData, _: Messages) -> tuple[Buffer, list[int | None]]:
    """Encode the message with all gradients."""
    whole = data.bucket.whole
    message = data.buffer("message", whole.size, "uint8")
    noise = data.bucket.noise(whole, "whole", data.uses)
    size = data.encoded_bytes = data.codec.encode_message(data.values, whole, noise, message, data.residuals)
    return message[:size], [whole.fixed_size] * data.bucket.size


def _encoded(bucket: GroupLayout, messages: Messages) -> Encoded:
    return [(bucket.whole, messages)]


def _seconds(link: Link, size: int, payload_bytes: int, count: int) -> float:
    received = link.ranks_per_host * (size - link.ranks_per_host) * payload_bytes
    return link.seconds(1, received, size * count)


ALLGATHER = Algorithm("allgather", (Stage("gather", "allgather", _encode),), _encoded, _seconds)
