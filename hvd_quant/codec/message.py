"""Several payloads in one message, encoded and decoded by one call.

A message is a preamble of 8 bytes, which says what the message is about, then one payload a segment, end to
end. Its layout is known to both sides before a byte is sent, headers included, all but their checksums. Where
the size of a payload depends on its values, because its codes are not packed, the layout says how large the
message is at most, and its own size stands after the preamble.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hvd_quant import wire
from hvd_quant.schemes import CODINGS, NORMS, SPACINGS, Scheme

PREAMBLE_SIZE = 8
SIZE_SIZE = 8  # of a message's own size, where it varies
SOMETHING_ELSE = "is about something else than was expected: its preamble is another one"
OFFSET_COLUMN = 9  # of `MessageLayout.table`
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
        """Bytes on the wire, at most."""
        return wire.max_payload_size(self.scheme, self.count)


class MessageLayout:
    """Where everything is in a message.

    Args:
        segments: in the order of their payloads.
        preamble: `PREAMBLE_SIZE` bytes. Messages of different layouts need different ones.

    Attributes:
        varies: whether a message's size depends on its values.
        size: of a message in bytes, or the most that it takes.
        offsets: of the payloads, or the most that they can be.
    """

    def __init__(self, segments: Sequence[Segment], preamble: bytes) -> None:
        if len(preamble) != PREAMBLE_SIZE:
            raise ValueError(f"a preamble has {PREAMBLE_SIZE} bytes, not {len(preamble)}")
        self.segments = tuple(segments)
        self.preamble = preamble
        self.varies = any(segment.scheme.coding != "packed" for segment in self.segments)
        self.offsets = []
        self.size = PREAMBLE_SIZE + (SIZE_SIZE if self.varies else 0)
        for segment in self.segments:
            self.offsets.append(self.size)
            self.size += segment.payload_size

    @property
    def fixed_size(self) -> int | None:
        """Bytes of a message; None where it varies."""
        return None if self.varies else self.size

    @property
    def count(self) -> int:
        """Values in all segments."""
        return sum(segment.count for segment in self.segments)

    @cached_property
    def flattened(self) -> MessageLayout:
        """The same message over other memory: one float32 tensor that holds the segments end to end."""
        segments, start = [], 0
        for segment in self.segments:
            segments.append(Segment(0, start, segment.count, "float32", segment.scheme))
            start += segment.count
        return MessageLayout(segments, self.preamble)

    @cached_property
    def table(self) -> np.ndarray:
        """What the native codec reads: a row a segment, int64 of shape (segments, 11)."""
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
                CODINGS.index(segment.scheme.coding),
            )
            for segment, offset in zip(self.segments, self.offsets, strict=True)
        ]
        return np.array(rows, np.int64).reshape(-1, 11)

    @cached_property
    def headers(self) -> np.ndarray:
        """The payloads' headers without their bodies' checksums, uint8 of shape (segments, HEADER_SIZE)."""
        headers = [wire.pack_header(segment.scheme, segment.count, 0) for segment in self.segments]
        return np.frombuffer(b"".join(headers), np.uint8).reshape(-1, wire.HEADER_SIZE)


class Messages(list[Any]):
    """What is decoded together, with what an error needs to say whose it is.

    Args:
        messages: one-dimensional uint8.
        ranks: who has made each of them; None where that is not known.
        fault: what is wrong with all of them, which are empty then; else nothing.
    """

    def __init__(self, messages: Iterable[Any], ranks: Sequence[int] | None = None, fault: str = "") -> None:
        super().__init__(messages)
        self.ranks, self.fault = ranks, fault

    def of(self, ranks: Sequence[int]) -> Messages:
        """Those of some ranks, out of one from every rank."""
        return Messages([self[rank] for rank in ranks], ranks, self.fault)

    def name(self, number: int) -> str:
        """What an error calls a message."""
        return name_of(number, self.ranks)

    def told(self, text: str) -> str:
        """What the native codec says of one of them, with that one's name."""
        found = re.fullmatch(r"message (\d+) (.*)", text, re.DOTALL)
        if found is None:
            return text
        # Of a stream of codes it says what is wrong, such as "its codes are not a valid bit stream".
        damaged = "is damaged: " if found[2].startswith(("it ", "its ", "the ")) else ""
        return f"{self.name(int(found[1]))} {damaged}{found[2]}"

    def check_sizes(self, size: int | None) -> None:
        """Compare the messages' lengths with what they should be.

        Args:
            size: of each; None if they say it themselves.

        Raises:
            ValueError: a message is of another size, or all of them have a fault.
        """
        if self.fault:
            raise ValueError(self.fault)
        for number, message in enumerate(self):
            has = f"{self.name(number)} has {len(message)} bytes"
            if size is None and len(message) < PREAMBLE_SIZE + SIZE_SIZE:
                raise ValueError(f"{has}, too few to say how many it should have")
            if size is None and stated_size(message) != len(message):
                raise ValueError(f"{has}, but says that it has {stated_size(message)}")
            if size is not None and size != len(message):
                raise ValueError(f"{has}, and {size} were expected")


def in_rank_order(messages: Sequence[Any]) -> Messages:
    """What has come from all ranks, one message from each."""
    if isinstance(messages, Messages):
        return messages
    return Messages(messages, range(len(messages)))


def name_of(number: int, ranks: Sequence[int] | None) -> str:
    """What an error calls a message: by who has made it, or else by its place."""
    return f"message {number}" if ranks is None else f"the message of rank {ranks[number]}"


def lengths_fault(count: int, received: object, expected: int | None, whence: str = "") -> str:
    """What to say of messages that have come end to end, and whose lengths do not add up.

    Args:
        count: how many they should be.
        received: bytes of all of them.
        expected: the same as it should be; None where the messages say it themselves.
        whence: who has passed them on.
    """
    other = "not what they say that they have" if expected is None else f"and {expected} were expected"
    return (
        f"the lengths of the {count} messages{whence} do not add up: together they have {received} bytes, "
        f"{other}, so that this rank cannot tell which one is wrong"
    )


def stated_size(message: Any) -> int:
    """The size that a message of varying size says it has; 0 where it is too short to say it."""
    stated = bytes(message[PREAMBLE_SIZE : PREAMBLE_SIZE + SIZE_SIZE].tolist())
    return int.from_bytes(stated, "little") if len(stated) == SIZE_SIZE else 0


def cut(
    received: Any, sizes: Sequence[int | None], ranks: Sequence[int] | None = None, whence: str = ""
) -> Messages:
    """Cut up messages that have come end to end.

    Args:
        received: all of them, one-dimensional uint8.
        sizes: of the messages as they are expected, None for one that says its own.
        ranks: who has made them; by default one is of each rank.
        whence: who has passed them on, for errors: such as " that rank 3 has passed on".

    Returns:
        The messages; all of them empty, and with a fault, where they do not add up. That is no exception,
        because the ranks may have more to exchange.
    """
    ranks = range(len(sizes)) if ranks is None else ranks
    if len(sizes) == 1:
        return Messages([received], ranks)
    messages, start = [], 0
    for size in sizes:
        if size is None:
            size = stated_size(received[start:])
            if size < PREAMBLE_SIZE + SIZE_SIZE:
                break
        messages.append(received[start : start + size])
        start += size
    if len(messages) < len(sizes) or start != len(received):
        expected = None if None in sizes else sum(sizes)
        fault = lengths_fault(len(sizes), len(received), expected, whence)
        return Messages([received[:0] for _ in sizes], ranks, fault)
    return Messages(messages, ranks)


def framed(data: bytes, preamble: bytes = bytes(PREAMBLE_SIZE)) -> np.ndarray:
    """A message that says its own size, for `cut` to find its end."""
    size = PREAMBLE_SIZE + SIZE_SIZE + len(data)
    return np.frombuffer(bytearray(preamble + size.to_bytes(SIZE_SIZE, "little") + data), np.uint8)


def unframed(message: np.ndarray) -> tuple[bytes, bytes]:
    """The data and the preamble of a `framed` message."""
    text = message.tobytes()
    return text[PREAMBLE_SIZE + SIZE_SIZE :], text[:PREAMBLE_SIZE]
