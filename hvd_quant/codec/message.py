"""Several payloads in one message, encoded and decoded by one call.

A message is a preamble of 8 bytes, which identifies its content, then one payload per segment, back to back.
Both sides know its layout before a byte is sent, headers included, except for their checksums. Where a
payload's size depends on its values, because its codes are not packed, the layout gives an upper bound, and
the message's own size follows the preamble.
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
SIZE_SIZE = 8  # bytes of a message's own size, where it varies
SOMETHING_ELSE = "is about something else than was expected: its preamble is another one"
OFFSET_COLUMN = 9  # index in `MessageLayout.table`
DTYPES = ("float32", "float64", "float16", "bfloat16")  # in the native codec's order


@dataclass(frozen=True)
class Segment:
    """A range of one tensor's values that becomes one payload.

    Args:
        tensor: index among the tensors that are encoded together.
        start, count: the range.
        dtype: dtype of the tensor, one of `DTYPES`.
        scheme: how they are quantized.
    """

    tensor: int
    start: int
    count: int
    dtype: str
    scheme: Scheme

    @property
    def payload_size(self) -> int:
        """Upper bound of the bytes on the wire."""
        return wire.max_payload_size(self.scheme, self.count)


class MessageLayout:
    """Positions of the payloads in a message.

    Args:
        segments: in the order of their payloads.
        preamble: `PREAMBLE_SIZE` bytes. Messages of different layouts need different ones.

    Attributes:
        varies: whether the message size depends on the values.
        size: message size in bytes, or its upper bound.
        offsets: offsets of the payloads, or their upper bounds.
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
        """Message size in bytes; None where it varies."""
        return None if self.varies else self.size

    @property
    def count(self) -> int:
        """Number of values in all segments."""
        return sum(segment.count for segment in self.segments)

    @cached_property
    def flattened(self) -> MessageLayout:
        """Return the same message over one float32 tensor that holds the segments back to back."""
        segments, start = [], 0
        for segment in self.segments:
            segments.append(Segment(0, start, segment.count, "float32", segment.scheme))
            start += segment.count
        return MessageLayout(segments, self.preamble)

    @cached_property
    def table(self) -> np.ndarray:
        """Table for the native codec: a row per segment, int64 of shape (segments, 11)."""
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
        """Return the payloads' headers without checksums, uint8 of shape (segments, HEADER_SIZE)."""
        headers = [wire.pack_header(segment.scheme, segment.count, 0) for segment in self.segments]
        return np.frombuffer(b"".join(headers), np.uint8).reshape(-1, wire.HEADER_SIZE)


class Messages(list[Any]):
    """Messages that are decoded together, with what errors need to name their senders.

    Args:
        messages: one-dimensional uint8.
        ranks: sender of each; None where that is not known.
        fault: what is wrong with all of them, which are empty then; else the empty string.
    """

    def __init__(self, messages: Iterable[Any], ranks: Sequence[int] | None = None, fault: str = "") -> None:
        super().__init__(messages)
        self.ranks, self.fault = ranks, fault

    def of(self, ranks: Sequence[int]) -> Messages:
        """Return the messages of some ranks, given one from every rank."""
        return Messages([self[rank] for rank in ranks], ranks, self.fault)

    def name(self, number: int) -> str:
        """Return the name of a message in errors."""
        return name_of(number, self.ranks)

    def name_in(self, text: str) -> str:
        """Put a message's name into an error text of the native codec."""
        found = re.fullmatch(r"message (\d+) (.*)", text, re.DOTALL)
        if found is None:
            return text
        # An error in a stream of codes reads like "its codes are not a valid bit stream".
        damaged = "is damaged: " if found[2].startswith(("it ", "its ", "the ")) else ""
        return f"{self.name(int(found[1]))} {damaged}{found[2]}"

    def check_sizes(self, size: int | None) -> None:
        """Compare the messages' lengths with the expected ones.

        Args:
            size: size of each; None if the messages contain it.

        Raises:
            ValueError: a message is of another size, or all of them have a fault.
        """
        if self.fault:
            raise ValueError(self.fault)
        for number, message in enumerate(self):
            if size is not None:
                wrong = f", and {size} were expected" if len(message) != size else ""
            elif len(message) < PREAMBLE_SIZE + SIZE_SIZE:
                wrong = ", too few to say how many it should have"
            else:
                stated = stated_size(message)
                wrong = f", but says that it has {stated}" if len(message) != stated else ""
            if wrong:
                raise ValueError(f"{self.name(number)} has {len(message)} bytes{wrong}")


def in_rank_order(messages: Sequence[Any]) -> Messages:
    """Return the messages of all ranks, one from each, in rank order."""
    if isinstance(messages, Messages):
        return messages
    return Messages(messages, range(len(messages)))


def name_of(number: int, ranks: Sequence[int] | None) -> str:
    """Name a message in errors: by the rank that sent it, or else by its position."""
    return f"message {number}" if ranks is None else f"the message of rank {ranks[number]}"


def lengths_fault(count: int, received: object, expected: int | None, source: str = "") -> str:
    """Describe messages that arrived back to back and whose lengths do not add up.

    Args:
        count: expected number of messages.
        received: bytes received in total.
        expected: bytes expected in total; None where the messages contain their sizes.
        source: who has relayed them.
    """
    other = "not what they say that they have" if expected is None else f"and {expected} were expected"
    return (
        f"the lengths of the {count} messages{source} do not add up: together they have {received} bytes, "
        f"{other}, so that this rank cannot tell which one is wrong"
    )


def stated_size(message: Any) -> int:
    """Return the size that a message of varying size contains; 0 if it is too short for that."""
    stated = bytes(message[PREAMBLE_SIZE : PREAMBLE_SIZE + SIZE_SIZE].tolist())
    return int.from_bytes(stated, "little") if len(stated) == SIZE_SIZE else 0


def cut(
    received: Any, sizes: Sequence[int | None], ranks: Sequence[int] | None = None, source: str = ""
) -> Messages:
    """Split messages that arrived back to back.

    Args:
        received: all of them, one-dimensional uint8.
        sizes: expected sizes of the messages, None for one that contains its own.
        ranks: sender of each; by default rank i sent message i.
        source: who has relayed them, for errors: such as " that rank 3 has passed on".

    Returns:
        The messages; all empty, and with a fault, where the sizes do not add up. That is no exception,
        because the ranks may still have collectives to run.
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
        fault = lengths_fault(len(sizes), len(received), expected, source)
        return Messages([received[:0] for _ in sizes], ranks, fault)
    return Messages(messages, ranks)


def framed(data: bytes, preamble: bytes = bytes(PREAMBLE_SIZE)) -> np.ndarray:
    """Prefix data with its size, for `cut` to find its end."""
    size = PREAMBLE_SIZE + SIZE_SIZE + len(data)
    return np.frombuffer(bytearray(preamble + size.to_bytes(SIZE_SIZE, "little") + data), np.uint8)


def unframed(message: np.ndarray) -> tuple[bytes, bytes]:
    """Return the data and the preamble of a `framed` message."""
    text = message.tobytes()
    return text[PREAMBLE_SIZE + SIZE_SIZE :], text[:PREAMBLE_SIZE]
