"""Fused buckets: which gradients travel together, and where each is in the messages.

A fused bucket is a tuple of entries, one a gradient, in an order that all ranks share. Its gradients are not
copied together. Every one is quantized where it lies, into a payload of its own (or several, where a chunk of
the scatter-allgather begins inside it), so that buckets of quantization never straddle two tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hvd_quant.codec import native
from hvd_quant.codec.message import PREAMBLE_SIZE, MessageLayout, Segment
from hvd_quant.exchange.transport import Buffer
from hvd_quant.schemes import QSGD

_ITEM_SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Entry:
    """A gradient's place in a fused bucket.

    Args:
        key: what it is called on every rank.
        count: how many values it has.
        dtype: of its values.
        scheme: how they are quantized.
        device: where they are; fused buckets do not mix devices.
    """

    key: str
    count: int
    dtype: str
    scheme: QSGD
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of the gradient as it is."""
        return self.count * _ITEM_SIZES[self.dtype]


def digest(*what: object) -> bytes:
    """`PREAMBLE_SIZE` bytes that are the same in every process, and differ for what differs."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=PREAMBLE_SIZE).digest()


class FusedBucket:
    """The messages and the noise of the gradients that travel together.

    Args:
        entries: the gradients.
        size: ranks that take part.
        rank: this one.
        seed: of the noise.
    """

    def __init__(self, entries: Sequence[Entry], size: int, rank: int, seed: int) -> None:
        self.entries = tuple(entries)
        self.size, self.rank = size, rank
        self._seed = seed
        self.times_sent = 0
        self.buffers: dict[str, Buffer] = {}  # what an exchange needs in every step
        self._base_seeds: dict[tuple[str, bytes], tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def digest(self) -> bytes:
        """Of what all ranks must agree on."""
        return digest([(e.key, e.count, e.dtype, str(e.scheme)) for e in self.entries], self.size)

    @cached_property
    def whole(self) -> MessageLayout:
        """A message that holds every gradient in one segment."""
        segments = [Segment(i, 0, e.count, e.dtype, e.scheme) for i, e in enumerate(self.entries)]
        return MessageLayout(segments, digest(self.digest.hex(), "whole"))

    @cached_property
    def chunks(self) -> tuple[MessageLayout, ...]:
        """``size`` messages of nearly equal length that hold every value once, in order.

        Gradients are cut between two buckets of quantization only, so that cutting changes no norm.
        """
        bits = [e.count * e.scheme.bits for e in self.entries]
        ends = list(itertools.accumulate(bits))
        total = ends[-1] if ends else 0
        inner = range(1, self.size)
        cuts = [
            [0, *(self._cut(i, total * k // self.size - (ends[i] - bits[i])) for k in inner), e.count]
            for i, e in enumerate(self.entries)
        ]
        return tuple(
            MessageLayout(
                [
                    Segment(i, cut[k], cut[k + 1] - cut[k], e.dtype, e.scheme)
                    for i, (e, cut) in enumerate(zip(self.entries, cuts, strict=True))
                    if cut[k + 1] > cut[k]
                ],
                digest(self.digest.hex(), "chunk", k),
            )
            for k in range(self.size)
        )

    def _cut(self, i: int, bits: int) -> int:
        """The end of a bucket of quantization that is nearest to ``bits`` bits into gradient i."""
        entry = self.entries[i]
        if bits <= 0 or bits >= entry.count * entry.scheme.bits:
            return 0 if bits <= 0 else entry.count
        bucket_size = entry.scheme.bucket_size
        values = bits // entry.scheme.bits
        return min(entry.count, (values + bucket_size // 2) // bucket_size * bucket_size)

    @cached_property
    def own_chunk(self) -> MessageLayout:
        """The chunk that this rank averages, over one float32 tensor of its values."""
        return self.chunks[self.rank].flattened()

    def seeds(self, layout: MessageLayout, stage: str, uses: np.ndarray) -> np.ndarray:
        """Of the noise of a message's segments: a function of seed, rank, tensor, place, stage and step.

        Args:
            layout: of the message.
            stage: sets the first rounding of an exchange apart from the second.
            uses: how often each gradient has been exchanged before, uint64 of shape (entries,).

        Returns:
            uint64 of shape (segments,).
        """
        cache = (stage, layout.preamble)
        if cache not in self._base_seeds:
            keys = [
                digest(self._seed, self.rank, stage, self.entries[s.tensor].key, s.start)
                for s in layout.segments
            ]
            base = np.frombuffer(b"".join(keys), "<u8").astype(np.uint64)
            self._base_seeds[cache] = base, np.array([s.tensor for s in layout.segments], np.int64)
        base, tensors = self._base_seeds[cache]
        return native.step_seeds(base, tensors, uses)


class Group:
    """Entries that are to travel together, and those of them that have come."""

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.entries = {entry.key: entry for entry in entries}
        self.arrived: set[str] = set()
        self.open = False  # more entries may join
        self._bucket: FusedBucket | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients as they are."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def current_bucket(self) -> FusedBucket | None:
        """What `bucket` has made, unless the entries have changed since."""
        return self._bucket

    @property
    def complete(self) -> bool:
        """Whether everything has come that is expected."""
        return not self.open and len(self.arrived) == len(self.entries)

    def replace(self, entries: Sequence[Entry]) -> None:
        """Have other entries from now on."""
        self.entries = {entry.key: entry for entry in entries}
        self._bucket = None

    def bucket(self, size: int, rank: int, seed: int) -> FusedBucket:
        """The fused bucket of the entries."""
        if self._bucket is None:
            self._bucket = FusedBucket(list(self.entries.values()), size, rank, seed)
        return self._bucket


class Fusion:
    """Assigns gradients to fused buckets as they come.

    Gradients known in advance (`plan`) and those that came in an earlier step have their bucket. Others join
    the open one, which is closed when it is full. What is sent incomplete, because a result was asked for,
    is split from then on into what had come and what had not: so buckets fit themselves to the training's
    habits, in the same way on all ranks.

    Args:
        fusion_bytes: a bucket is full when its gradients have so many bytes.
    """

    def __init__(self, fusion_bytes: int) -> None:
        self.fusion_bytes = fusion_bytes
        self._group_of: dict[str, Group] = {}
        self._open: dict[str, Group] = {}  # by device
        self._waiting: dict[int, Group] = {}  # groups of which some have come, by id, in order

    def plan(self, entries: Sequence[Entry]) -> None:
        """Lay out gradients that are expected, in the order in which they are expected."""
        for device in dict.fromkeys(entry.device for entry in entries):
            for group in self._cut(entry for entry in entries if entry.device == device):
                self._group_of.update(dict.fromkeys(group.entries, group))

    def _cut(self, entries: Iterator[Entry]) -> Iterator[Group]:
        members: list[Entry] = []
        nbytes = 0
        for entry in entries:
            members.append(entry)
            nbytes += entry.nbytes
            if nbytes >= self.fusion_bytes:
                yield Group(members)
                members, nbytes = [], 0
        if members:
            yield Group(members)

    def group_of(self, entry: Entry) -> Group:
        """The group that the entry belongs to: the open one, from now on, if it is new or has changed."""
        group = self._group_of.get(entry.key)
        if group is not None:
            known = group.entries[entry.key]
            if known is entry or known == entry:
                return group
        if group is not None:
            group.replace([other for other in group.entries.values() if other.key != entry.key])
        group = self._open.get(entry.device)
        if group is None:
            group = self._open[entry.device] = Group()
            group.open = True
        group.replace([*group.entries.values(), entry])
        self._group_of[entry.key] = group
        return group

    def add(self, entry: Entry, group: Group) -> list[Group]:
        """Note that a gradient has come.

        Args:
            entry: its own.
            group: the one that `group_of` gave for it.

        Returns:
            The groups that are to be sent now.
        """
        group.arrived.add(entry.key)
        self._waiting[id(group)] = group
        if group.open and group.nbytes >= self.fusion_bytes:
            self._close(group)
        if not group.complete:
            return []
        self._take(group)
        return [group]

    @property
    def waiting(self) -> bool:
        """Whether some gradients have come and not been sent."""
        return bool(self._waiting)

    def flush(self) -> list[Group]:
        """Everything that has come, to be sent now, whether its group is complete or not."""
        groups = list(self._waiting.values())
        for group in groups:
            self._close(group)
            if not group.complete:
                missing = Group([e for e in group.entries.values() if e.key not in group.arrived])
                self._group_of.update(dict.fromkeys(missing.entries, missing))
                group.replace([e for e in group.entries.values() if e.key in group.arrived])
        return [self._take(group) for group in groups]

    def _close(self, group: Group) -> None:
        if group.open:
            group.open = False
            self._open = {device: other for device, other in self._open.items() if other is not group}

    def _take(self, group: Group) -> Group:
        group.arrived.clear()
        self._waiting.pop(id(group), None)
        return group

    def forget(self) -> None:
        """Drop what has come, and every fused bucket with its memory; the layout stays."""
        for group in [*self._waiting.values(), *self._group_of.values()]:
            group.arrived.clear()
            group.replace(list(group.entries.values()))
        self._waiting.clear()
