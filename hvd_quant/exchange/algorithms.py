"""How the ranks' gradients become everyone's mean.

An exchange is a generator: it starts a collective, yields its handle, is sent what that has brought, and
returns what is left to be decoded, as pairs of a message layout and the messages to be averaged. It reads as
if it blocked, and whoever drives it (`Exchange`) decides when to wait. What a rank computes between its
collectives are functions of their own, for those who have Horovod's graph drive the exchange.

Whatever arrives, an exchange goes through all of its collectives, lest another rank waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hvd_quant.codec.message import PREAMBLE_SIZE, MessageLayout, Messages, cut, in_rank_order
from hvd_quant.codec.noise import Noise
from hvd_quant.exchange.fused import FusedBucket
from hvd_quant.exchange.transport import Buffer, Handle, Transport


class Codec(Protocol):
    """Numbers <-> messages: the modules `hvd_quant.codec.native` and `hvd_quant.codec.torch_ops`."""

    def empty(self, count: int, dtype: str, like: Buffer) -> Buffer:
        """Room for a message or for values, on the device of ``like``."""

    def encode_message(
        self,
        values: Sequence[Buffer],
        layout: MessageLayout,
        noise: Noise,
        message: Buffer,
        residuals: Sequence[Buffer] = (),
    ) -> int:
        """Encode the segments of a message, with error feedback if there are residuals; return its size."""

    def decode_messages(
        self, messages: Sequence[Buffer], layout: MessageLayout, out: Sequence[Buffer], factor: float
    ) -> None:
        """Decode messages of one layout into ``factor`` times their mean; errors name ranks of `Messages`."""

    def add_lost(self, residual: Buffer, lost: Buffer, times: int) -> None:
        """Add ``times`` what a mean has lost to a residual, where the sum is finite."""

    def collect(
        self,
        values: Sequence[Buffer],
        layout: MessageLayout,
        preamble: bytes,
        out: Buffer,
        residuals: Sequence[Buffer] = (),
    ) -> None:
        """Write a preamble, and the values of a layout's segments as float32, to bytes.

        Residuals are added, and become 0 in the buckets of quantization in which all sums are finite.
        """

    def average(self, parts: Sequence[Buffer], preamble: bytes, out: Buffer) -> None:
        """Write the mean of what has been collected on several ranks, if it has this preamble."""


Encoded = list[tuple[MessageLayout, Messages]]
Algorithm = Callable[["Work", Transport, str], Generator[Handle, Messages, Encoded]]


@dataclass
class Work:
    """A fused bucket to be exchanged.

    Args:
        bucket: its layout.
        values: its gradients, in the order of the bucket's entries.
        uses: how often each has been exchanged before, uint64; part of the noise's key.
        codec: for their device.
        residuals: of error feedback: what this rank has not sent yet, flat float32, one a gradient; or none.
        buffers: memory that is the same in every step, because fresh pages cost more than what is written to
            them; None for fresh memory.
        encoded_bytes: that the gradients have been encoded into; by the host's ranks together, if by hosts.
    """

    bucket: FusedBucket
    values: list[Buffer]
    uses: np.ndarray
    codec: Codec
    residuals: Sequence[Buffer] = ()
    buffers: dict[str, Buffer] | None = None
    encoded_bytes: int = 0

    def room(self, purpose: str, count: int, dtype: str) -> Buffer:
        """Memory on the gradients' device."""
        if self.buffers is None:
            return self.codec.empty(count, dtype, self.values[0])
        room = self.buffers.get(purpose)
        if room is None or len(room) != count:
            room = self.buffers[purpose] = self.codec.empty(count, dtype, self.values[0])
        return room


def encode_whole(work: Work) -> Buffer:
    """The message with all gradients."""
    whole = work.bucket.whole
    message = work.room("message", whole.size, "uint8")
    noise = work.bucket.noise(whole, "whole", work.uses)
    size = work.encoded_bytes = work.codec.encode_message(work.values, whole, noise, message, work.residuals)
    return message[:size]


def encode_chunks(work: Work) -> tuple[Buffer, list[int]]:
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


def encode_mean(work: Work, parts: Sequence[Buffer]) -> Buffer:
    """The message with the mean of all ranks' messages about the own chunk.

    Raises:
        ValueError: one of them is damaged, or about something else.
    """
    bucket = work.bucket
    mean = work.room("mean", bucket.own_chunk.count, "float32")
    work.codec.decode_messages(parts, bucket.own_chunk, [mean], 1.0)
    return _encode_mean(work, mean, bucket.chunks[bucket.rank], "mean", bucket.size)


def _encode_mean(work: Work, mean: Buffer, chunk: MessageLayout, stage: str, ranks: int) -> Buffer:
    """The message with a chunk's mean over so many ranks."""
    flat = chunk.flattened
    message = work.room("mean's message", flat.size, "uint8")
    noise = work.bucket.noise(chunk, stage, work.uses)
    if not work.residuals:
        return message[: work.codec.encode_message([mean], flat, noise, message)]
    lost = work.room("mean's residual", flat.count, "float32")
    lost[:] = 0.0
    size = work.codec.encode_message([mean], flat, noise, message, [lost])
    # What the mean lost is so many times as much of this rank's own gradients.
    for segment, place in zip(chunk.segments, flat.segments, strict=True):
        residual = work.residuals[segment.tensor][segment.start : segment.start + segment.count]
        work.codec.add_lost(residual, lost[place.start : place.start + place.count], ranks)
    return message[:size]


def allgather(work: Work, transport: Transport, name: str) -> Generator[Handle, Messages, Encoded]:
    """Every rank sends all of its gradients to every other, which averages them.

    One rounding. A rank receives n - 1 payloads.
    """
    whole = work.bucket.whole
    messages = yield transport.allgather(encode_whole(work), [whole.fixed_size] * work.bucket.size, name)
    return [(whole, messages)]


def scatter_allgather(work: Work, transport: Transport, name: str) -> Generator[Handle, Messages, Encoded]:
    """Every rank averages one chunk of the gradients, and sends the mean, encoded again, to every other.

    Two roundings, each unbiased given what it rounds, so the result is. With error feedback what either loses
    is kept. A rank receives 2 (n - 1) / n payloads, however many ranks there are. The rank that has a chunk's
    mean takes it from its encoded form, too, so that all ranks have the same.
    """
    chunks, damage = work.bucket.chunks, None
    parts = yield transport.alltoall(*encode_chunks(work), f"{name}.scatter")
    try:
        message = encode_mean(work, parts)
    except ValueError as error:
        # No mean: nobody takes an empty message for one.
        damage, message = error, work.room("mean's message", work.bucket.own_chunk.size, "uint8")[:0]
    expected = [chunk.fixed_size for chunk in chunks]
    messages = yield transport.allgather(message, expected, f"{name}.gather")
    if damage is not None:
        raise damage
    return [(chunk, messages.of([rank])) for rank, chunk in enumerate(chunks)]


# --- by hosts ---------------------------------------------------------------------------------------------


def collect_for_host(work: Work) -> tuple[Buffer, list[int]]:
    """The values of each of the host's chunks as they are, for who averages it, and the parts' sizes."""
    bucket = work.bucket
    sizes = [0] * bucket.size
    for neighbour, chunk in zip(bucket.neighbours, bucket.host_chunks, strict=True):
        sizes[neighbour] = PREAMBLE_SIZE + 4 * chunk.count
    message = work.room("values", sum(sizes), "uint8")
    end = 0
    for number, (neighbour, chunk) in enumerate(zip(bucket.neighbours, bucket.host_chunks, strict=True)):
        part = message[end : end + sizes[neighbour]]
        work.codec.collect(work.values, chunk, bucket.raw_preamble(number), part, work.residuals)
        end += sizes[neighbour]
    return message, sizes


def encode_host_mean(work: Work, parts: Sequence[Buffer]) -> Buffer:
    """The message with the mean of what all neighbours have sent about the own chunk of the host's.

    Raises:
        ValueError: one of them has sent something else.
    """
    bucket = work.bucket
    number = bucket.own_host_chunk
    chunk = bucket.host_chunks[number]
    mean = work.room("mean", chunk.count, "float32")
    own = in_rank_order(parts).of(bucket.neighbours)
    work.codec.average(own, bucket.raw_preamble(number), mean)
    message = _encode_mean(work, mean, chunk, "host", len(bucket.neighbours))
    work.encoded_bytes = len(message) * len(bucket.neighbours)
    return message


def repeat(work: Work, messages: Sequence[Buffer], ranks: Sequence[int]) -> tuple[Buffer, list[int]]:
    """Messages end to end, once for each of some ranks, and the parts' sizes."""
    size = sum(map(len, messages))
    sizes = [size if rank in ranks else 0 for rank in range(work.bucket.size)]
    out = work.codec.empty(sum(sizes), "uint8", work.values[0])
    end = 0
    for message in list(messages) * len(ranks):
        out[end : end + len(message)] = message
        end += len(message)
    return out, sizes


def of_host(bucket: FusedBucket, parts: Sequence[Buffer]) -> Encoded:
    """What the neighbours have passed on: for each of the host's chunks, the messages of all hosts."""
    encoded = []
    for neighbour, chunk in zip(bucket.neighbours, bucket.host_chunks, strict=True):
        makers = bucket.topology.counterparts(neighbour)
        sizes, whence = [chunk.fixed_size] * len(makers), f" that rank {neighbour} has passed on"
        encoded.append((chunk, cut(parts[neighbour], sizes, makers, whence)))
    return encoded


def hierarchical(work: Work, transport: Transport, name: str) -> Generator[Handle, Messages, Encoded]:
    """The ranks of a host average their gradients as they are, and the hosts exchange these means encoded.

    Every rank averages, encodes and sends one chunk of its host's, to the ranks in its place on the other
    hosts, and passes on to its neighbours what it receives of these. One rounding, of a host's mean. With h
    hosts, all ranks of a host together receive h - 1 payloads from others, however many they are.
    """
    bucket, damage = work.bucket, None
    parts = yield transport.alltoall(*collect_for_host(work), f"{name}.host")
    try:
        message = encode_host_mean(work, parts)
    except ValueError as error:
        damage, message = error, parts[bucket.rank][:0]
    del parts  # as large as the gradients
    across = yield transport.alltoall(*repeat(work, [message], bucket.counterparts), f"{name}.across")
    messages = [across[rank] for rank in bucket.counterparts]
    told = yield transport.alltoall(*repeat(work, messages, bucket.neighbours), f"{name}.pass")
    if damage is not None:
        raise damage
    return of_host(bucket, told)


ALGORITHMS: dict[str, Algorithm] = {
    "allgather": allgather,
    "scatter_allgather": scatter_allgather,
    "hierarchical": hierarchical,
}
EXCHANGES = ("auto", *ALGORITHMS)  # as users name them


class Exchange:
    """Drives an exchange; starts it when made.

    Args:
        work: what is exchanged.
        algorithm: the exchange's name.
        transport: between the ranks.
        name: the same on all ranks, and no other exchange's at the same time.
    """

    def __init__(self, work: Work, algorithm: str, transport: Transport, name: str) -> None:
        self.work, self.algorithm, self.name = work, algorithm, name
        self.received_bytes = 0  # from other ranks
        self._generator = ALGORITHMS[algorithm](work, transport, name)
        self._encoded: Encoded = []
        self._failure: ValueError | None = None
        self._handle: Handle | None = next(self._generator)
        self.stages_left = {"allgather": 0, "scatter_allgather": 1, "hierarchical": 2}[algorithm]

    def advance(self, *, wait: bool) -> bool:
        """Take the exchange to its last collective, as far as it gets without waiting, or with.

        Returns:
            Whether it is there.
        """
        while self.stages_left and (wait or self._handle.ready()):
            self._step()
        return not self.stages_left

    def _step(self) -> None:
        received = in_rank_order(self._handle.wait())
        self._handle = None
        self.received_bytes += sum(
            len(part) for rank, part in enumerate(received) if rank != self.work.bucket.rank
        )
        try:
            self._handle = self._generator.send(received)
            self.stages_left -= 1
        except StopIteration as stop:
            self._encoded = stop.value
        except ValueError as error:
            self._failure, self.stages_left = error, 0

    def finish(self, out: Sequence[Buffer], factor: float = 1.0) -> None:
        """Wait for the end, and write ``factor`` times the ranks' mean. Can be called again.

        Args:
            out: where to, in the order of the bucket's entries.
            factor: multiplies the mean.

        Raises:
            ValueError: some rank has sent something else than was expected.
        """
        while self._handle is not None:
            self._step()
        if self._failure is not None:
            raise self._failure
        for layout, messages in self._encoded:
            self.work.codec.decode_messages(messages, layout, out, factor)

    def ready(self) -> bool:
        """Whether `finish` would not wait for another rank."""
        self.advance(wait=False)
        return self._handle is None or (not self.stages_left and self._handle.ready())
