"""Fused buckets: which gradients travel together, and their positions in the messages.

A fused bucket is a tuple of entries, one per gradient, in an order that all ranks share. Its gradients are
not copied together. Each is quantized in place, into a payload of its own (or several, if a chunk of the
scatter-allgather begins inside it), so that quantization buckets never straddle two tensors.
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
        key: its name on every rank.
        count: number of values.
        dtype: dtype of its values.
        scheme: how they are quantized.
        device: their device; fused buckets do not mix devices.
    """

    key: str
    count: int
    dtype: str
    scheme: Scheme
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of the uncompressed gradient."""
        return self.count * _ITEM_SIZES[self.dtype]


def digest(*what: object) -> bytes:
    """Hash to `PREAMBLE_SIZE` bytes, the same in every process."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=PREAMBLE_SIZE).digest()


class GroupLayout:
    """Messages and noise of the gradients that travel together.

    Args:
        entries: the gradients.
        size: number of ranks that take part.
        rank: this rank.
        seed: seed of the noise, the same on all ranks; any JSON value.
        topology: hosts of the ranks; None if they are not known, as if each rank had its own host.
        buffers: buffers that an exchange reuses in every step; shared by fused buckets that are not in flight
            together.
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
        """Counterparts of this rank, one per host, if all hosts have equally many ranks."""
        return self.topology.counterparts(self.rank)

    @cached_property
    def digest(self) -> bytes:
        """Hash of what all ranks must agree on."""
        return digest([(e.key, e.count, e.dtype, str(e.scheme)) for e in self.entries], self.size)

    @cached_property
    def whole(self) -> MessageLayout:
        """A message with every gradient in one segment."""
        segments = [Segment(i, 0, e.count, e.dtype, e.scheme) for i, e in enumerate(self.entries)]
        return MessageLayout(segments, digest(self.digest.hex(), "whole"))

    @cached_property
    def chunks(self) -> tuple[MessageLayout, ...]:
        """``size`` messages of nearly equal size that hold every value once, in order."""
        return self._cut_up(self.size, "chunk")

    @cached_property
    def host_chunks(self) -> tuple[MessageLayout, ...]:
        """The same for the ranks of a host, one per rank."""
        return self._cut_up(len(self.neighbours), "host's chunk")

    def _cut_up(self, parts: int, title: str) -> tuple[MessageLayout, ...]:
        """Cut gradients at bounds of quantization buckets only, so that cutting changes no norm."""
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
        """Return the end of the quantization bucket that is nearest to ``bits`` bits into gradient i."""
        entry = self.entries[i]
        if bits <= 0 or bits >= entry.count * entry.scheme.bits:
            return 0 if bits <= 0 else entry.count
        bucket_size = entry.scheme.bucket_size
        values = bits // entry.scheme.bits
        return min(entry.count, (values + bucket_size // 2) // bucket_size * bucket_size)

    @property
    def own_chunk(self) -> MessageLayout:
        """Own chunk, which this rank averages, over one float32 tensor of its values."""
        return self.chunks[self.rank].flattened

    @property
    def own_host_chunk(self) -> int:
        """Index of the host's chunk that this rank averages."""
        return self.neighbours.index(self.rank)

    def raw_preamble(self, chunk: int) -> bytes:
        """Return the preamble of a host's chunk of uncompressed values."""
        return digest(self.digest.hex(), "host's values", chunk)

    def noise(self, layout: MessageLayout, stage: str, uses: np.ndarray) -> Noise:
        """Return the noise of a message's segments, a function of seed, rank, tensor, place, stage and step.

        Args:
            layout: layout of the message.
            stage: as in `noise_keys`.
            uses: how often each gradient has been exchanged before, uint64 of shape (entries,).
        """
        base, tensors, shifts = self.noise_keys(layout, stage)
        return Noise(native.step_seeds(base, tensors, uses), shifts)

    def noise_keys(self, layout: MessageLayout, stage: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the noise parameters that do not change between steps.

        Args:
            layout: layout of the message.
            stage: separates the first rounding of an exchange, ``"whole"`` or ``"chunk"`` (or ``"host"``, by
                counterparts), from the second, ``"mean"``, which every rank does alone and without
                correlation.

        Returns:
            For each segment: its noise stream, uint64; its gradient, int64; its shift, uint32.
        """
        cache = (stage, layout.preamble)
        if cache not in self._noise:
            place = (self.rank, self.size)
            if stage == "host":
                place = (self.counterparts.index(self.rank), len(self.counterparts))
            keys, shifts = [], []
            for segment in layout.segments:
                together = stage != "mean" and segment.scheme.rounding == "correlated"
                owner = "all" if together else self.rank
                keys.append(digest(self._seed, owner, stage, self.entries[segment.tensor].key, segment.start))
                shifts.append(shift(segment.scheme, *place) if together else 0)
            self._noise[cache] = (
                np.frombuffer(b"".join(keys), "<u8").astype(np.uint64),
                np.array([segment.tensor for segment in layout.segments], np.int64),
                np.array(shifts, np.uint32),
            )
        return self._noise[cache]
