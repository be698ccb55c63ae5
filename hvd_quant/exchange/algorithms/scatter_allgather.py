"""Every rank averages one chunk of the gradients, and sends the mean, encoded again, to every other.

Two roundings, each unbiased given what it rounds, so the result is. With error feedback what either loses is
kept. A rank receives 2 (n - 1) / n payloads, however many ranks there are. The rank that has a chunk's mean
takes it from its encoded form, too, so that all ranks have the same.
"""

from __future__ import annotations

from hvd_quant.codec.message import Messages
from hvd_quant.exchange.algorithms.base import Algorithm, Encoded, Stage, Work, encode_mean
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.layout import FusedBucket
from hvd_quant.exchange.transport import Buffer


def _encode_chunks(work: Work, _: Messages) -> tuple[Buffer, list[int]]:
    """The messages with the chunks, end to end, and their sizes."""
    bucket = work.bucket
    sizes, end = [], 0
    message = work.room("message", sum(chunk.size for chunk in bucket.chunks), "uint8")
    for chunk in bucket.chunks:
        noise, room = bucket.noise(chunk, "chunk", work.uses), message[end : end + chunk.size]
        sizes.append(work.codec.encode_message(work.values, chunk, noise, room, work.residuals))
        end += sizes[-1]
    work.encoded_bytes = end
    return message[:end], sizes


def _encode_mean(work: Work, parts: Messages) -> tuple[Buffer, list[int | None]]:
    """The message with the mean of all ranks' messages about the own chunk."""
    bucket = work.bucket
    mean = work.room("mean", bucket.own_chunk.count, "float32")
    work.codec.decode_messages(parts, bucket.own_chunk, [mean], 1.0)
    message = encode_mean(work, mean, bucket.chunks[bucket.rank], "mean", bucket.size)
    return message, [chunk.fixed_size for chunk in bucket.chunks]


def _encoded(bucket: FusedBucket, messages: Messages) -> Encoded:
    return [(chunk, messages.of([rank])) for rank, chunk in enumerate(bucket.chunks)]


def _seconds(link: Link, size: int, payload_bytes: int, count: int) -> float:
    share = link.ranks_a_host * (size - link.ranks_a_host) / size
    return link.seconds(2, 2 * share * payload_bytes, (2 + 1 / size) * count)


SCATTER_ALLGATHER = Algorithm(
    "scatter_allgather",
    (Stage("scatter", "alltoall", _encode_chunks), Stage("gather", "allgather", _encode_mean)),
    _encoded,
    _seconds,
)
