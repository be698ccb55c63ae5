"""Several payloads in one message, encoded and decoded by one call.

A message is a preamble of 8 bytes, which says what the message is about, then one payload a segment, end to
end. Its layout is known to both sides before a byte is sent, headers included, all but their checksums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hvd_quant import wire
from hvd_quant.schemes import NORMS, SPACINGS, Scheme

PREAMBLE_SIZE = 8
DTYPES = ("float32", "float64", "float16", "bfloat16")  # in the native codec's order


@dataclass(frozen=True)
class Segment:
    """A range of one tensor's values that becomes one payload.

    Args:
        tensor: which of the tensors that are encoded together.
        start, count: the range.
        dtype: of the tensor's values, one of `DTYPES`.
        scheme: how they are quantized.
    """

    tensor: int
    start: int
    count: int
    dtype: str
    scheme: Scheme

    @property
    def payload_size(self) -> int:
        """Bytes on the wire."""
        return wire.payload_size(self.scheme, self.count)


class MessageLayout:
    """Where everything is in a message.

    Args:
        segments: in the order of their payloads.
        preamble: `PREAMBLE_SIZE` bytes. Messages of different layouts need different ones.
    """

    def __init__(self, segments: Sequence[Segment], preamble: bytes) -> None:
        if len(preamble) != PREAMBLE_SIZE:
            raise ValueError(f"a preamble has {PREAMBLE_SIZE} bytes, not {len(preamble)}")
        self.segments = tuple(segments)
        self.preamble = preamble
        self.offsets = []
        self.size = PREAMBLE_SIZE
        for segment in self.segments:
            self.offsets.append(self.size)
            self.size += segment.payload_size

    @property
    def count(self) -> int:
        """Values in all segments."""
        return sum(segment.count for segment in self.segments)

    def flattened(self) -> MessageLayout:
        """The same message over other memory: one float32 tensor that holds the segments end to end."""
        segments, start = [], 0
        for segment in self.segments:
            segments.append(Segment(0, start, segment.count, "float32", segment.scheme))
            start += segment.count
        return MessageLayout(segments, self.preamble)

    @cached_property
    def table(self) -> np.ndarray:
        """What the native codec reads: a row a segment, int64 of shape (segments, 10)."""
        rows = [
            (
                segment.tensor,
                segment.start,
                segment.count,
                DTYPES.index(segment.dtype),
                segment.scheme.bits,
                NORMS.index(segment.scheme.norm),
                SPACINGS.index(segment.scheme.spacing),
                segment.scheme.rounding == "nearest",
                segment.scheme.bucket_size,
                offset,
            )
            for segment, offset in zip(self.segments, self.offsets, strict=True)
        ]
        return np.array(rows, np.int64).reshape(-1, 10)

    @cached_property
    def headers(self) -> np.ndarray:
        """The payloads' headers without their bodies' checksums, uint8 of shape (segments, HEADER_SIZE)."""
        headers = [wire.pack_header(segment.scheme, segment.count, 0) for segment in self.segments]
        return np.frombuffer(b"".join(headers), np.uint8).reshape(-1, wire.HEADER_SIZE)
