"""Every rank averages one chunk of the gradients, and sends the mean, encoded again, to every other.

Two roundings, each unbiased given its input, so the result is unbiased. With error feedback the errors of
both are kept. A rank receives 2 (n - 1) / n payloads, however many ranks there are. The rank that averages a
chunk decodes its own mean too, so that all ranks have the same.
"""

from __future__ import annotations

from hvd_quant.codec.message import Messages
from hvd_quant.exchange.algorithms.base import Algorithm, BucketData, Encoded, Stage, encode_mean
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.layout import GroupLayout
from hvd_quant.exchange.transport import Buffer


def _encode_chunks(data: BucketData, _: Messages) -> tuple[Buffer, list[int]]:
    """Encode the messages with the chunks, back to back, and return their sizes."""
    bucket = data.bucket
    sizes, end = [], 0
    message = data.buffer("message", sum(chunk.size for chunk in bucket.chunks), "uint8")
    for chunk in bucket.chunks:
        noise, target = bucket.noise(chunk, "chunk", data.uses), message[end : end + chunk.size]
        sizes.append(data.codec.encode_message(data.values, chunk, noise, target, data.residuals))
        end += sizes[-1]
    data.encoded_bytes = end
    return message[:end], sizes


def _encode_mean(data: BucketData, parts: Messages) -> tuple[Buffer, list[int | None]]:
    """Encode the mean of all ranks' messages with the own chunk."""
    bucket = data.bucket
    mean = data.buffer("mean", bucket.own_chunk.count, "float32")
    data.codec.decode_messages(parts, bucket.own_chunk, [mean], 1.0)
    message = encode_mean(data, mean, bucket.chunks[bucket.rank], "mean", bucket.size)
    return message, [chunk.fixed_size for chunk in bucket.chunks]


def _encoded(bucket: GroupLayout, messages: Messages) -> Encoded:
    return [(chunk, messages.of([rank])) for rank, chunk in enumerate(bucket.chunks)]


def _seconds(link: Link, size: int, payload_bytes: int, count: int) -> float:
    share = link.ranks_per_host * (size - link.ranks_per_host) / size
    return link.seconds(2, 2 * share * payload_bytes, (2 + 1 / size) * count)


SCATTER_ALLGATHER = Algorithm(
    "scatter_allgather",
    (Stage("scatter", "alltoall", _encode_chunks), Stage("gather", "allgather", _encode_mean)),
    _encoded,
    _seconds,
)
