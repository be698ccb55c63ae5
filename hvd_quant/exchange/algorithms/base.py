"""An exchange algorithm as a table of stages: what each collective sends, made of what the last one brought.

Whoever drives it decides when to wait, and keeps what is between the stages: `hvd_quant.exchange.driver` for
transports, a graph of operations in TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hvd_quant.codec.message import MessageLayout
from hvd_quant.codec.noise import Noise
from hvd_quant.exchange.cost import Link
from hvd_quant.exchange.layout import GroupLayout
from hvd_quant.exchange.transport import Buffer


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
        """Decode messages of one layout into ``factor`` times their mean."""

    def add_error(self, residual: Buffer, lost: Buffer, times: int) -> None:
        """Add ``times`` what a mean has lost to a residual, where the sum is finite."""

    def pack_float32(
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

    def mean_float32(self, parts: Sequence[Buffer], preamble: bytes, out: Buffer) -> None:
        """Write the mean of what has been collected on several ranks, if it has this preamble."""


Encoded = list[tuple[MessageLayout, list[Buffer]]]


@dataclass
class BucketData:
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

    bucket: GroupLayout
    values: list[Buffer]
    uses: np.ndarray
    codec: Codec
    residuals: Sequence[Buffer] = ()
    buffers: dict[str, Buffer] | None = None
    encoded_bytes: int = 0

    def buffer(self, purpose: str, count: int, dtype: str) -> Buffer:
        """Memory on the gradients' device."""
        if self.buffers is None:
            return self.codec.empty(count, dtype, self.values[0])
        room = self.buffers.get(purpose)
        if room is None or len(room) != count:
            room = self.buffers[purpose] = self.codec.empty(count, dtype, self.values[0])
        return room


@dataclass(frozen=True)
class Stage:
    """One collective of an algorithm.

    Args:
        name: of the collective, within its exchange.
        collective: ``"allgather"`` or ``"alltoall"``.
        prepare: what this rank sends, of what the last stage has brought from each rank (of the gradients, in
            the first stage). Returns the message, and for an alltoall the sizes of its parts, for an
            allgather the sizes that the ranks' messages are expected to have, None for one that says its own.
            Raises ValueError where something has come that cannot be used; then the rank sends nothing, for
            others wait for it, and the exchange fails in the end. An allgather of nothing is noticed by all.
    """

    name: str
    collective: str
    prepare: Callable[[BucketData, Sequence[Buffer]], tuple[Buffer, Sequence[int | None]]]


@dataclass(frozen=True)
class Algorithm:
    """How the ranks' gradients become everyone's mean.

    Args:
        name: as ranks compare it.
        stages: in their order.
        encoded: what is to be decoded of what the last stage has brought, as pairs of a message layout and
            the messages to be averaged.
        seconds: what the model of `hvd_quant.exchange.cost` says that it takes, without the first encoding;
            told the link, the ranks, the bytes that a rank encodes its gradients into, and their values.
        fits: whether it can exchange so many values.
        hierarchical: whether it is only for several hosts with equally many ranks, two or more, on each.
    """

    name: str
    stages: tuple[Stage, ...]
    encoded: Callable[[GroupLayout, Sequence[Buffer]], Encoded]
    seconds: Callable[[Link, int, int, int], float]
    fits: Callable[[int], bool] = lambda count: True
    hierarchical: bool = False


def encode_mean(data: BucketData, mean: Buffer, chunk: MessageLayout, stage: str, ranks: int) -> Buffer:
    """The message with a chunk's mean over so many ranks."""
    flat = chunk.flattened
    message = data.buffer("mean's message", flat.size, "uint8")
    noise = data.bucket.noise(chunk, stage, data.uses)
    if not data.residuals:
        return message[: data.codec.encode_message([mean], flat, noise, message)]
    lost = data.buffer("mean's residual", flat.count, "float32")
    lost[:] = 0.0
    size = data.codec.encode_message([mean], flat, noise, message, [lost])
    # What the mean lost is so many times as much of this rank's own gradients.
    for segment, place in zip(chunk.segments, flat.segments, strict=True):
        residual = data.residuals[segment.tensor][segment.start : segment.start + segment.count]
        data.codec.add_error(residual, lost[place.start : place.start + place.count], ranks)
    return message[:size]
