"""An exchange algorithm as a table of stages: what each collective sends, made of what the last one received.

The driver decides when to wait, and keeps the data between stages: `hvd_quant.exchange.driver` for
transports, a graph of operations in TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hvd_quant.codec.message import PREAMBLE_SIZE, MessageLayout, Messages
from hvd_quant.codec.noise import Noise
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.layout import GroupLayout
from hvd_quant.exchange.transport import Buffer


class Codec(Protocol):
    """Numbers <-> messages: the modules `hvd_quant.codec.native` and `hvd_quant.codec.torch_ops`."""

    def empty(self, count: int, dtype: str, like: Buffer) -> Buffer:
        """Allocate a buffer for a message or values, on the device of ``like``."""

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

    def add_error(self, residual: Buffer, lost: Buffer, times: int) -> None:
        """Add ``times`` a mean's quantization error to a residual, where the sum is finite."""

    def pack_float32(
        self,
        values: Sequence[Buffer],
        layout: MessageLayout,
        preamble: bytes,
        out: Buffer,
        residuals: Sequence[Buffer] = (),
    ) -> None:
        """Write a preamble and the values of a layout's segments, as float32, to bytes.

        Residuals are added, and set to 0 in the quantization buckets in which all sums are finite.
        """

    def mean_float32(self, parts: Sequence[Buffer], preamble: bytes, out: Buffer) -> None:
        """Write the mean of `pack_float32` messages of several ranks, if they have this preamble."""


Encoded = list[tuple[MessageLayout, Messages]]


@dataclass
class BucketData:
    """A fused bucket to be exchanged.

    Args:
        bucket: its layout.
        values: its gradients, in the order of the bucket's entries.
        uses: how often each has been exchanged before, uint64; part of the noise key.
        codec: codec for their device.
        residuals: residuals of error feedback, what this rank has not sent yet: flat float32, one per
            gradient; or empty.
        buffers: buffers that are reused in every step, because fresh pages cost more than what is written to
            them; None for new ones.
        encoded_bytes: bytes that the gradients were encoded into; by all ranks of the host, if hierarchical.
    """

    bucket: GroupLayout
    values: list[Buffer]
    uses: np.ndarray
    codec: Codec
    residuals: Sequence[Buffer] = ()
    buffers: dict[str, Buffer] | None = None
    encoded_bytes: int = 0

    def buffer(self, purpose: str, count: int, dtype: str) -> Buffer:
        """Return a buffer on the gradients' device."""
        if self.buffers is None:
            return self.codec.empty(count, dtype, self.values[0])
        buffer = self.buffers.get(purpose)
        if buffer is None or len(buffer) != count:
            buffer = self.buffers[purpose] = self.codec.empty(count, dtype, self.values[0])
        return buffer


@dataclass(frozen=True)
class Stage:
    """One collective of an algorithm.

    Args:
        name: name of the collective within its exchange.
        collective: ``"allgather"`` or ``"alltoall"``.
        prepare: makes what this rank sends from what the last stage has received from each rank (from the
            gradients, in the first stage). Returns the message and sizes: for an alltoall those of its parts,
            for an allgather the expected sizes of the ranks' messages, None for one that contains its own.
            Raises ValueError if a received message cannot be used. Then the rank sends an empty message,
            because others wait for it, and the exchange fails in the end. All ranks notice an empty part of
            an allgather.
    """

    name: str
    collective: str
    prepare: Callable[[BucketData, Messages], tuple[Buffer, Sequence[int | None]]]


@dataclass(frozen=True)
class Algorithm:
    """How the mean of the ranks' gradients is computed.

    Args:
        name: name that ranks compare.
        stages: stages in order.
        encoded: what is to be decoded of what the last stage has received: pairs of a message layout and
            the messages to be averaged.
        seconds: estimate by the model of `hvd_quant.exchange.cost`, without the first encoding, from the
            link, the number of ranks, the bytes that a rank encodes its gradients into, and the number of
            values.
        fits: whether it can exchange a number of values.
        hierarchical: whether it is only for several hosts with equally many ranks, two or more, on each.
    """

    name: str
    stages: tuple[Stage, ...]
    encoded: Callable[[GroupLayout, Messages], Encoded]
    seconds: Callable[[Link, int, int, int], float]
    fits: Callable[[int], bool] = lambda count: True
    hierarchical: bool = False


def encode_mean(data: BucketData, mean: Buffer, chunk: MessageLayout, stage: str, ranks: int) -> Buffer:
    """Encode the message with a chunk's mean over a number of ranks."""
    flat = chunk.flattened
    message = data.buffer("mean's message", flat.size, "uint8")
    noise = data.bucket.noise(chunk, stage, data.uses)
    if not data.residuals:
        return message[: data.codec.encode_message([mean], flat, noise, message)]
    lost = data.buffer("mean's residual", flat.count, "float32")
    lost[:] = 0.0
    size = data.codec.encode_message([mean], flat, noise, message, [lost])
    # An error of the mean is ``ranks`` times as large in terms of this rank's own gradients.
    for segment, place in zip(chunk.segments, flat.segments, strict=True):
        residual = data.residuals[segment.tensor][segment.start : segment.start + segment.count]
        data.codec.add_error(residual, lost[place.start : place.start + place.count], ranks)
    return message[:size]


def pack_chunks(
    data: BucketData, chunks: Sequence[MessageLayout], ranks: Sequence[int], preambles: Sequence[bytes]
) -> tuple[Buffer, list[int]]:
    """Return uncompressed chunks, each for the rank that averages it, and the parts' sizes.

    Args:
        data: gradients that the chunks are of.
        chunks: one for each of ``ranks``.
        ranks: ranks that receive a chunk, in ascending order; the others receive nothing.
        preambles: what goes before each chunk's values.
    """
    sizes = [0] * data.bucket.size
    for rank, chunk in zip(ranks, chunks, strict=True):
        sizes[rank] = PREAMBLE_SIZE + 4 * chunk.count
    message, end = data.buffer("values", sum(sizes), "uint8"), 0
    for rank, chunk, preamble in zip(ranks, chunks, preambles, strict=True):
        part = message[end : end + sizes[rank]]
        data.codec.pack_float32(data.values, chunk, preamble, part, data.residuals)
        end += sizes[rank]
    return message, sizes
