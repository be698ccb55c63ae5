"""How the ranks' gradients become everyone's mean.

An exchange is a generator: it starts a collective, yields its handle, is sent what that has brought, and
returns what is left to be decoded, as pairs of a message layout and the messages to be averaged. It reads as
if it blocked, and whoever drives it (`Exchange`) decides when to wait.

Whatever arrives, an exchange goes through all of its collectives, lest another rank waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hvd_quant.codec.message import MessageLayout
from hvd_quant.exchange.fused import FusedBucket
from hvd_quant.exchange.transport import Buffer, Handle, Transport


class Codec(Protocol):
    """Numbers <-> messages: the modules `hvd_quant.codec.native` and `hvd_quant.codec.torch_ops`."""

    def empty(self, count: int, dtype: str, like: Buffer) -> Buffer:
        """Room for a message or for values, on the device of ``like``."""

    def encode_message(
        self, values: Sequence[Buffer], layout: MessageLayout, seeds: np.ndarray, message: Buffer
    ) -> int:
        """Encode the segments of a message, and return its size."""

    def decode_messages(
        self, messages: Sequence[Buffer], layout: MessageLayout, out: Sequence[Buffer], factor: float
    ) -> None:
        """Decode messages of one layout into ``factor`` times their mean."""


Encoded = list[tuple[MessageLayout, list[Buffer]]]
Algorithm = Callable[["Work"], Generator[Handle, list[Buffer], Encoded]]


@dataclass
class Work:
    """A fused bucket on its way.

    Args:
        bucket: its layout.
        values: its gradients, in the order of the bucket's entries.
        uses: how often each has been exchanged before, uint64; part of the noise's key.
        codec: for their device.
        transport: between the ranks.
        name: the same on all ranks, and no other exchange's at the same time.
    """

    bucket: FusedBucket
    values: list[Buffer]
    uses: np.ndarray
    codec: Codec
    transport: Transport
    name: str
    encoded_bytes: int = 0  # that the gradients have been encoded into

    def room(self, purpose: str, count: int, dtype: str) -> Buffer:
        """Memory that is the same in every step: fresh pages cost more than what is written to them."""
        buffers = self.bucket.buffers
        if purpose not in buffers:
            buffers[purpose] = self.codec.empty(count, dtype, self.values[0])
        return buffers[purpose]


def allgather(work: Work) -> Generator[Handle, list[Buffer], Encoded]:
    """Every rank sends all of its gradients to every other, which averages them.

    One rounding. A rank receives n - 1 payloads.
    """
    whole = work.bucket.whole
    message = work.room("message", whole.size, "uint8")
    seeds = work.bucket.seeds(whole, "whole", work.uses)
    size = work.encoded_bytes = work.codec.encode_message(work.values, whole, seeds, message)
    messages = yield work.transport.allgather(
        message[:size], [whole.fixed_size] * work.bucket.size, work.name
    )
    return [(whole, messages)]


def scatter_allgather(work: Work) -> Generator[Handle, list[Buffer], Encoded]:
    """Every rank averages one chunk of the gradients, and sends the mean, encoded again, to every other.

    Two roundings, each unbiased given what it rounds, so the result is. A rank receives 2 (n - 1) / n
    payloads, however many ranks there are. The rank that has a chunk's mean takes it from its encoded form,
    too, so that all ranks have the same.
    """
    bucket = work.bucket
    chunks, sizes, end = bucket.chunks, [], 0
    message = work.room("message", sum(chunk.size for chunk in chunks), "uint8")
    for chunk in chunks:
        seeds = bucket.seeds(chunk, "chunk", work.uses)
        sizes.append(work.codec.encode_message(work.values, chunk, seeds, message[end : end + chunk.size]))
        end += sizes[-1]
    work.encoded_bytes = end
    parts = yield work.transport.alltoall(message[:end], sizes, f"{work.name}.scatter")

    own, flat = chunks[bucket.rank], bucket.own_chunk
    mean = work.room("mean", flat.count, "float32")
    message = work.room("mean's message", flat.size, "uint8")
    damage = None
    try:
        work.codec.decode_messages(parts, flat, [mean], 1.0)
        size = work.codec.encode_message([mean], flat, bucket.seeds(own, "mean", work.uses), message)
        message = message[:size]
    except ValueError as error:
        damage, message = error, message[:0]  # no mean: nobody takes an empty message for one
    expected = [chunk.fixed_size for chunk in chunks]
    messages = yield work.transport.allgather(message, expected, f"{work.name}.gather")
    if damage is not None:
        raise damage
    return [(chunk, [part]) for chunk, part in zip(chunks, messages, strict=True)]


ALGORITHMS: dict[str, Algorithm] = {"allgather": allgather, "scatter_allgather": scatter_allgather}
EXCHANGES = ("auto", *ALGORITHMS)  # as users name them


class Exchange:
    """Drives an exchange; starts it when made."""

    def __init__(self, work: Work, algorithm: str) -> None:
        self.work, self.algorithm = work, algorithm
        self.received_bytes = 0  # from other ranks
        self._generator = ALGORITHMS[algorithm](work)
        self._encoded: Encoded = []
        self._failure: ValueError | None = None
        self._handle: Handle | None = next(self._generator)
        self.stages_left = {"allgather": 0, "scatter_allgather": 1}[algorithm]

    def advance(self, *, wait: bool) -> bool:
        """Take the exchange to its last collective, as far as it gets without waiting, or with.

        Returns:
            Whether it is there.
        """
        while self.stages_left and (wait or self._handle.ready()):
            self._step()
        return not self.stages_left

    def _step(self) -> None:
        received = self._handle.wait()
        self._handle = None
        self.received_bytes += sum(
            len(part) for rank, part in enumerate(received) if rank != self.work.transport.rank
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
