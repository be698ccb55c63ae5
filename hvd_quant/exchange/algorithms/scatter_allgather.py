"""Every rank averages one chunk of the gradients, and sends the mean, encoded again, to every other.

Two roundings, each unbiased given what it rounds, so the result is. With error feedback what either loses is
kept. A rank receives 2 (n - 1) / n payloads, however many ranks there are. The rank that has a chunk's mean
takes it from its encoded form, too, so that all ranks have the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from hvd_quant.exchange.algorithms.base import Algorithm, BucketData, Encoded, Stage, encode_mean
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.layout import GroupLayout
from hvd_quant.exchange.transport import Buffer


def _encode_chunks(data: BucketData, _: Sequence[Buffer]) -> tuple[Buffer, list[int]]:
    """The messages with the chunks, end to end, and their sizes."""
    bucket = data.bucket
    sizes, end = [], 0
    message = data.buffer("message", sum(chunk.size for chunk in bucket.chunks), "uint8")
    for chunk in bucket.chunks:
        noise, room = bucket.noise(chunk, "chunk", data.uses), message[end : end + chunk.size]
        sizes.append(data.codec.encode_message(data.values, chunk, noise, room, data.residuals))
        end += sizes[-1]
    data.encoded_bytes = end
    return message[:end], sizes


def _encode_mean(data: BucketData, parts: Sequence[Buffer]) -> tuple[Buffer, list[int | None]]:
    """The message with the mean of all ranks' messages about the own chunk."""
    bucket = data.bucket
    mean = data.buffer("mean", bucket.own_chunk.count, "float32")
    data.codec.decode_messages(parts, bucket.own_chunk, [mean], 1.0)
    message = encode_mean(data, mean, bucket.chunks[bucket.rank], "mean", bucket.size)
    return message, [chunk.fixed_size for chunk in bucket.chunks]


def _encoded(bucket: GroupLayout, messages: Sequence[Buffer]) -> Encoded:
    return [(chunk, [message]) for chunk, message in zip(bucket.chunks, messages, strict=True)]


def _seconds(link: Link, size: int, payload_bytes: int, count: int) -> float:
    share = link.ranks_per_host * (size - link.ranks_per_host) / size
    return link.seconds(2, 2 * share * payload_bytes, (2 + 1 / size) * count)


SCATTER_ALLGATHER = Algorithm(
    "scatter_allgather",
    (Stage("scatter", "alltoall", _encode_chunks), Stage("gather", "allgather", _encode_mean)),
    _encoded,
    _seconds,
)
