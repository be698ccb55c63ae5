"""Fused buckets: which gradients travel together, and where each is in the messages.

A fused bucket is a tuple of entries, one a gradient, in an order that all ranks share. Its gradients are not
copied together. Every one is quantized where it lies, into a payload of its own (or several, where a chunk of
the scatter-allgather begins inside it), so that buckets of quantization never straddle two tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hvd_quant.codec import native
from hvd_quant.codec.message import PREAMBLE_SIZE, MessageLayout, Segment
from hvd_quant.codec.noise import Noise, shift
from hvd_quant.exchange.topology import Topology
from hvd_quant.exchange.transport import Buffer
from hvd_quant.schemes import Scheme

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
    scheme: Scheme
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of the gradient as it is."""
        return self.count * _ITEM_SIZES[self.dtype]


def digest(*what: object) -> bytes:
    """`PREAMBLE_SIZE` bytes that are the same in every process, and differ for what differs."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=PREAMBLE_SIZE).digest()


class GroupLayout:
    """The messages and the noise of the gradients that travel together.

    Args:
        entries: the gradients.
        size: ranks that take part.
        rank: this one.
        seed: of the noise, the same on all ranks; anything that JSON can hold.
        topology: where the ranks are; None if it is not known, as if each had a host of its own.
        buffers: what an exchange needs in every step; of several fused buckets, of which one is under way.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        size: int,
        rank: int,
        seed: object,
        topology: Topology | None = None,
        buffers: dict[str, Buffer] | None = None,
    ) -> None:
        self.entries = tuple(entries)
        self.size, self.rank = size, rank
        self.topology = topology or Topology(range(size))
        self._seed = seed
        self.buffers: dict[str, Buffer] = {} if buffers is None else buffers
        self._noise: dict[tuple[str, bytes], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    @cached_property
    def neighbours(self) -> list[int]:
        """Ranks on this rank's host."""
        return self.topology.neighbours(self.rank)

    @cached_property
    def counterparts(self) -> list[int]:
        """Ranks in this rank's place on every host, where all have equally many."""
        return self.topology.counterparts(self.rank)

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
        """``size`` messages of nearly equal length that hold every value once, in order."""
        return self._cut_up(self.size, "chunk")

    @cached_property
    def host_chunks(self) -> tuple[MessageLayout, ...]:
        """The same for the ranks of a host, one for each."""
        return self._cut_up(len(self.neighbours), "host's chunk")

    def _cut_up(self, parts: int, title: str) -> tuple[MessageLayout, ...]:
        """Gradients are cut between two buckets of quantization only, so that cutting changes no norm."""
        bits = [e.count * e.scheme.bits for e in self.entries]
        ends = list(itertools.accumulate(bits))
        total = ends[-1] if ends else 0
        inner = range(1, parts)
        cuts = [
            [0, *(self._cut(i, total * k // parts - (ends[i] - bits[i])) for k in inner), e.count]
            for i, e in enumerate(self.entries)
        ]
        return tuple(
            MessageLayout(
                [
                    Segment(i, cut[k], cut[k + 1] - cut[k], e.dtype, e.scheme)
                    for i, (e, cut) in enumerate(zip(self.entries, cuts, strict=True))
                    if cut[k + 1] > cut[k]
                ],
                digest(self.digest.hex(), title, k),
            )
            for k in range(parts)
        )

    def _cut(self, i: int, bits: int) -> int:
        """The end of a bucket of quantization that is nearest to ``bits`` bits into gradient i."""
        entry = self.entries[i]
        if bits <= 0 or bits >= entry.count * entry.scheme.bits:
            return 0 if bits <= 0 else entry.count
        bucket_size = entry.scheme.bucket_size
        values = bits // entry.scheme.bits
        return min(entry.count, (values + bucket_size // 2) // bucket_size * bucket_size)

    @property
    def own_chunk(self) -> MessageLayout:
        """The chunk that this rank averages, over one float32 tensor of its values."""
        return self.chunks[self.rank].flattened

    @property
    def own_host_chunk(self) -> int:
        """The number of the host's chunk that this rank averages."""
        return self.neighbours.index(self.rank)

    def raw_preamble(self, chunk: int) -> bytes:
        """What goes before the values of a host's chunk, as they are."""
        return digest(self.digest.hex(), "host's values", chunk)

    def noise(self, layout: MessageLayout, stage: str, uses: np.ndarray) -> Noise:
        """Of a message's segments: a function of seed, rank, tensor, place, stage and step.

        Args:
            layout: of the message.
            stage: as in `noise_keys`.
            uses: how often each gradient has been exchanged before, uint64 of shape (entries,).
        """
        base, tensors, shifts = self.noise_keys(layout, stage)
        return Noise(native.step_seeds(base, tensors, uses), shifts)

    def noise_keys(self, layout: MessageLayout, stage: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What of the noise is the same in every step.

        Args:
            layout: of the message.
            stage: sets the first rounding of an exchange, ``"whole"`` or ``"chunk"`` (or ``"host"``, which
                counterparts do), apart from the second, ``"mean"``, which every rank does for itself, so that
                nothing correlates there.

        Returns:
            For each segment: whose noise it has, uint64; its gradient, int64; its shift, uint32.
        """
        cache = (stage, layout.preamble)
        if cache not in self._noise:
            place = (self.rank, self.size)
            if stage == "host":
                place = (self.counterparts.index(self.rank), len(self.counterparts))
            keys, shifts = [], []
            for segment in layout.segments:
                together = stage != "mean" and segment.scheme.rounding == "correlated"
                whose = "all" if together else self.rank
                keys.append(digest(self._seed, whose, stage, self.entries[segment.tensor].key, segment.start))
                shifts.append(shift(segment.scheme, *place) if together else 0)
            self._noise[cache] = (
                np.frombuffer(b"".join(keys), "<u8").astype(np.uint64),
                np.array([segment.tensor for segment in layout.segments], np.int64),
                np.array(shifts, np.uint32),
            )
        return self._noise[cache]
