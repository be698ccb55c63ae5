"""Every rank averages one chunk of the gradients as they are, and sends the mean to every other: float32.

For gradients that are not quantized, where no library reduces them. Users cannot select it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvd_quant.codec import native
from hvd_quant.codec.message import PREAMBLE_SIZE, MessageLayout, Messages
from hvd_quant.exchange.algorithms.base import Algorithm, BucketData, Encoded, Stage, pack_chunks
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.layout import GroupLayout, digest
from hvd_quant.exchange.transport import Buffer


class Float32Codec:
    """Reads and writes messages of float32 values behind a layout's preamble: NumPy arrays."""

    empty = staticmethod(native.empty)
    pack_float32 = staticmethod(native.pack_float32)
    mean_float32 = staticmethod(native.mean_float32)

    @staticmethod
    def decode_messages(
        messages: Sequence[Buffer], layout: MessageLayout, out: Sequence[Buffer], factor: float
    ) -> None:
        """See `hvd_quant.exchange.algorithms.base.Codec`; for one message."""
        (message,) = messages
        values = np.empty(layout.count, np.float32)
        native.mean_float32([message], layout.preamble, values)
        values *= np.float32(factor)
        end = 0
        for segment in layout.segments:
            place = slice(segment.start, segment.start + segment.count)
            part = values[end : end + segment.count]
            _write(part, out[segment.tensor].reshape(-1)[place], segment.dtype)
            end += segment.count


def _write(values: np.ndarray, out: np.ndarray, dtype: str) -> None:
    """Write float32 values as another dtype, rounded to nearest; bfloat16 as its 16-bit patterns."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            np.copyto(out, values, casting="same_kind")
        return
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    np.copyto(out.view(np.uint16), np.where(np.isnan(values), 0x7FC0, rounded), casting="unsafe")


CODEC = Float32Codec()


def _collect(data: BucketData, _: Messages) -> tuple[Buffer, list[int]]:
    """Pack the values of each chunk for the rank that averages it, with the parts' sizes."""
    bucket = data.bucket
    preambles = [_preamble(bucket, number) for number in range(bucket.size)]
    message, sizes = pack_chunks(data, bucket.chunks, range(bucket.size), preambles)
    data.encoded_bytes = sum(sizes)
    return message, sizes


def _average(data: BucketData, parts: Messages) -> tuple[Buffer, list[int | None]]:
    """Return the mean of the own chunk."""
    bucket = data.bucket
    chunk = bucket.chunks[bucket.rank]
    message = data.buffer("mean", PREAMBLE_SIZE + 4 * chunk.count, "uint8")
    data.codec.mean_float32(parts, _preamble(bucket, bucket.rank), message[PREAMBLE_SIZE:].view(np.float32))
    message[:PREAMBLE_SIZE] = np.frombuffer(chunk.preamble, np.uint8)
    return message, [PREAMBLE_SIZE + 4 * chunk.count for chunk in bucket.chunks]


def _preamble(bucket: GroupLayout, chunk: int) -> bytes:
    return digest(bucket.digest.hex(), "uncompressed", chunk)


def _encoded(bucket: GroupLayout, messages: Messages) -> Encoded:
    return [(chunk, messages.of([rank])) for rank, chunk in enumerate(bucket.chunks)]


def _seconds(link: Link, size: int, payload_bytes: int, count: int) -> float:
    return link.seconds(2, 2 * link.ranks_per_host * (size - link.ranks_per_host) / size * 4 * count, 0)


UNCOMPRESSED = Algorithm(
    "uncompressed",
    (Stage("scatter", "alltoall", _collect), Stage("gather", "allgather", _average)),
    _encoded,
    _seconds,
)
