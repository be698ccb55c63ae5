"""Every rank sends all of its gradients to every other, which averages them.

One rounding. A rank receives n - 1 payloads.
"""

from __future__ import annotations

from hvd_quant.codec.message import Messages
from hvd_quant.exchange.algorithms.base import Algorithm, Encoded, Stage, Work
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.layout import FusedBucket
from hvd_quant.exchange.transport import Buffer


def _encode(work: Work, _: Messages) -> tuple[Buffer, list[int | None]]:
    """The message with all gradients."""
    whole = work.bucket.whole
    message = work.room("message", whole.size, "uint8")
    noise = work.bucket.noise(whole, "whole", work.uses)
    size = work.encoded_bytes = work.codec.encode_message(work.values, whole, noise, message, work.residuals)
    return message[:size], [whole.fixed_size] * work.bucket.size


def _encoded(bucket: FusedBucket, messages: Messages) -> Encoded:
    return [(bucket.whole, messages)]


def _seconds(link: Link, size: int, payload_bytes: int, count: int) -> float:
    received = link.ranks_a_host * (size - link.ranks_a_host) * payload_bytes
    return link.seconds(1, received, size * count)


ALLGATHER = Algorithm("allgather", (Stage("gather", "allgather", _encode),), _encoded, _seconds)
