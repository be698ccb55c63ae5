"""What is computed between Horovod's operations: the parts of an exchange, called in every step.

A graph holds Horovod's own allgather (or alltoall and allgather), and in front of it, between them and behind
it a call of these functions on NumPy arrays that share TensorFlow's memory. They keep nothing from one part
to the next, so that TensorFlow may run them in any order that the graph allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_quant.codec import native
from hvd_quant.codec.message import PREAMBLE_SIZE, cut
from hvd_quant.exchange import algorithms, control
from hvd_quant.exchange.algorithms import Encoded, Work
from hvd_quant.exchange.fused import Entry, FusedBucket
from hvd_quant.exchange.topology import Topology
from hvd_quant.tensorflow.progress import Progress

_BUCKETS_KEPT = 16  # of a group whose shapes or bits change
_NO_SIZES = np.zeros(0, np.int32)

Shape = tuple[int, ...]
Relay = Callable[..., tuple[np.ndarray, np.ndarray]]


@dataclass
class Steps:
    """A group of gradients that travel together.

    Args:
        progress: the compressor's.
        name: of the group, the same on all ranks.
        title: what its messages are called in a graph.
        dtypes: of the gradients, as `hvd_quant.codec.message.DTYPES` calls them.
        types: of the results, as NumPy knows them.
        shapes: of the gradients; None for those known only when they come.
        algorithm: the exchange's name.
        rank, size: of the process set.
        seed: of the noise; anything that JSON can hold.
        fingerprint: of the first gradient's control tensor.
        error_feedback: whether what is lost is kept.
        topology: where the ranks are.
        passed_bytes: of gradients that Horovod reduces uncompressed in the same step, as they are and as
            they are sent.
    """

    progress: Progress
    name: str
    title: str
    dtypes: Sequence[str]
    types: Sequence[np.dtype]
    shapes: Sequence[Shape | None]
    algorithm: str
    rank: int
    size: int
    seed: object
    fingerprint: int
    error_feedback: bool
    topology: Topology | None = None
    passed_bytes: list[int] = field(default_factory=lambda: [0, 0])

    def __post_init__(self) -> None:
        self.keys = [f"{self.name}.{i}" for i in range(len(self.dtypes))]
        self._buckets: dict[tuple, FusedBucket] = {}
        # The alltoalls, each with what makes the next message of what it brings; and whether an allgather
        # comes after them.
        self.relays: list[tuple[str, Relay | None]] = {
            "allgather": [],
            "scatter_allgather": [("scatter", self.relay)],
            "hierarchical": [("host", self.relay_host), ("across", self.relay_across), ("pass", None)],
        }[self.algorithm]
        self.gathers = self.algorithm != "hierarchical"

    def named(self, message: tf.Tensor, stage: str) -> tf.Tensor:
        """A message with a name, by which Horovod finds the other ranks'.

        Otherwise it would have that of an operation, which has a number if there are several of its kind.
        """
        return tf.identity(message, f"{self.title}_{stage}")

    def send(self, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode the gradients.

        Args:
            *arrays: the gradients, and how often the group has come, an int64 scalar.

        Returns:
            The message; the sizes of its parts for an alltoall, int32, which add up to its own; and the bits
            of the step, an int32 scalar.
        """
        *gradients, use = map(np.asarray, arrays)  # what has no dimensions comes as a NumPy scalar
        bits = self.progress.send(self.name)
        bucket = self.bucket([gradient.shape for gradient in gradients], bits)
        counts = [gradient.size for gradient in gradients]
        residuals = self.progress.residuals_of(self.keys, counts) if self.error_feedback else ()
        work = self._work(bucket, [_values(gradient) for gradient in gradients], use, residuals)
        if self.algorithm == "hierarchical":
            message, sizes = algorithms.collect_for_host(work)
        elif self.algorithm == "scatter_allgather":
            message, sizes = algorithms.encode_chunks(work)
        else:
            message, sizes = algorithms.encode_whole(work), []
        with self.progress.lock:
            self.progress.raw_bytes += sum(gradient.nbytes for gradient in gradients) + self.passed_bytes[0]
            self.progress.wire_bytes += work.encoded_bytes + control.NBYTES * len(gradients)
            self.progress.wire_bytes += self.passed_bytes[1]
            self.progress.messages += 1
        return message, np.array(sizes, np.int32), np.array(bits, np.int32)

    def relay(
        self,
        received: np.ndarray,
        sizes: np.ndarray,
        use: np.ndarray,
        bits: np.ndarray,
        *shapes: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode the mean of this rank's chunk.

        Args:
            received: all ranks' messages about it, end to end.
            sizes: of these.
            use: as `send` had it.
            bits: as `send` returned them.
            *shapes: of the gradients of unknown shape.

        Returns:
            The message about the mean, and no sizes; an empty one, which nobody takes for one, if there is
            none.
        """
        work, parts = self._came(received, sizes, use, bits, shapes)
        try:
            return algorithms.encode_mean(work, parts), _NO_SIZES
        except ValueError:
            return received[:0], _NO_SIZES

    def relay_host(
        self, received: np.ndarray, sizes: np.ndarray, use: np.ndarray, bits: np.ndarray, *shapes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode the mean of this rank's chunk of its host's gradients, for its counterparts; as `relay`."""
        work, parts = self._came(received, sizes, use, bits, shapes)
        try:
            message = algorithms.encode_host_mean(work, parts)
            with self.progress.lock:
                self.progress.wire_bytes += work.encoded_bytes
        except ValueError:
            message = received[:0]
        return _sized(algorithms.repeat(work, [message], work.bucket.counterparts))

    def relay_across(
        self, received: np.ndarray, sizes: np.ndarray, use: np.ndarray, bits: np.ndarray, *shapes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pass on to the neighbours what has come from the counterparts; as `relay`."""
        work, parts = self._came(received, sizes, use, bits, shapes)
        messages = [parts[rank] for rank in work.bucket.counterparts]
        return _sized(algorithms.repeat(work, messages, work.bucket.neighbours))

    def _came(
        self,
        received: np.ndarray,
        sizes: np.ndarray,
        use: np.ndarray,
        bits: np.ndarray,
        shapes: Sequence[np.ndarray],
    ) -> tuple[Work, list[np.ndarray]]:
        """What an alltoall has brought from each rank, and what to go on with."""
        bucket = self.bucket(self._all_shapes(shapes), int(bits))
        residuals: Sequence[np.ndarray] = ()
        if self.error_feedback:
            residuals = self.progress.residuals_of(self.keys, [entry.count for entry in bucket.entries])
        parts = _split(received, sizes)
        self._count_received(parts)
        # Of the values themselves only the memory's kind is looked at.
        return self._work(bucket, [received], use, residuals), parts

    def receive(
        self,
        received: np.ndarray,
        sizes: np.ndarray,
        reduced: np.ndarray,
        bits: np.ndarray,
        *shapes: np.ndarray,
    ) -> list[np.ndarray]:
        """Decode the mean over the ranks.

        Args:
            received: all ranks' messages, end to end.
            sizes: of these, if an alltoall has brought them.
            reduced: the first gradient's control tensor, as it came back.
            bits: as `send` returned them.
            *shapes: of the gradients of unknown shape.

        Returns:
            The mean, or the sum if that was asked for, of each gradient.

        Raises:
            RankMismatchError: the ranks have not sent the same gradients.
            UnsupportedReductionError: Horovod was asked for Adasum, Min, Max or Product.
        """
        all_shapes = self._all_shapes(shapes)
        bucket = self.bucket(all_shapes, int(bits))
        factor = self.check(reduced, self.fingerprint)
        results = [
            self.progress.memory.empty(key, int(np.prod(shape)), np.dtype(_memory(kind))).reshape(shape)
            for key, shape, kind in zip(self.keys, all_shapes, self.types, strict=True)
        ]
        encoded = self._encoded(bucket, received, sizes)
        try:
            for layout, messages in encoded:
                native.decode_messages(messages, layout, results, factor)
        except ValueError as error:
            raise control.RankMismatchError(self._explain(bucket, encoded)) from error
        self.progress.receive(self.name)
        return [result.view(kind) for result, kind in zip(results, self.types, strict=True)]

    def _encoded(self, bucket: FusedBucket, received: np.ndarray, sizes: np.ndarray) -> Encoded:
        """What is to be decoded of what the last collective has brought."""
        if self.algorithm == "hierarchical":
            parts = _split(received, sizes)
            self._count_received(parts)
            return algorithms.of_host(bucket, parts)
        whole = self.algorithm == "allgather"
        layouts = [bucket.whole] * self.size if whole else list(bucket.chunks)
        messages = cut(received, [layout.fixed_size for layout in layouts])
        self._count_received(messages)
        if whole:
            return [(bucket.whole, messages)]
        return [(layout, messages.of([rank])) for rank, layout in enumerate(layouts)]

    def count_static(self, raw_bytes: int, encoded_bytes: int, received_bytes: int) -> None:
        """Note a step whose bytes are known beforehand, and were not counted by the others."""
        with self.progress.lock:
            self.progress.raw_bytes += raw_bytes + self.passed_bytes[0]
            self.progress.wire_bytes += encoded_bytes + control.NBYTES * len(self.keys) + self.passed_bytes[1]
            self.progress.received_bytes += received_bytes
            self.progress.messages += 1

    def check(self, reduced: np.ndarray, fingerprint: int) -> float:
        """The factor of a reduced control tensor; notes the squared norm in it.

        Raises:
            RankMismatchError, UnsupportedReductionError: as `receive`.
        """
        try:
            factor = control.check(reduced[: control.SQUARE].tolist(), fingerprint, self.size)
        except control.FingerprintMismatch:
            raise control.RankMismatchError(
                f"the ranks have different gradients at place {self.name}: on this rank {self._what()}. "
                "Every rank must build the same model, in the same order."
            ) from None
        if self.progress.schedule is not None:
            self.progress.note_square(float(reduced[control.SQUARE]) / factor)
        return factor

    def _work(
        self, bucket: FusedBucket, values: list[np.ndarray], use: np.ndarray, residuals: Sequence[np.ndarray]
    ) -> Work:
        # Fresh memory, because TensorFlow keeps what it is given.
        return Work(bucket, values, np.full(len(self.keys), use, np.uint64), native, residuals)

    def bucket(self, shapes: Sequence[Shape], bits: int) -> FusedBucket:
        """The fused bucket of gradients of these shapes, in a step with so many bits."""
        key = (tuple(shapes), bits)
        bucket = self._buckets.get(key)
        if bucket is None:
            scheme = self.progress.scheme_at(bits)
            entries = [
                Entry(name, int(np.prod(shape)), dtype, scheme)
                for name, shape, dtype in zip(self.keys, shapes, self.dtypes, strict=True)
            ]
            if len(self._buckets) >= _BUCKETS_KEPT:
                self._buckets.clear()
            bucket = FusedBucket(entries, self.size, self.rank, self.seed, self.topology)
            self._buckets[key] = bucket
        return bucket

    def _all_shapes(self, unknown: Sequence[np.ndarray]) -> list[Shape]:
        rest = iter(unknown)
        return [shape if shape is not None else tuple(next(rest).tolist()) for shape in self.shapes]

    def _count_received(self, messages: Sequence[np.ndarray]) -> None:
        with self.progress.lock:
            self.progress.received_bytes += sum(
                message.size for rank, message in enumerate(messages) if rank != self.rank
            )

    def _what(self) -> str:
        return ", ".join(
            f"{dtype} of shape {shape if shape is not None else 'unknown'}"
            for dtype, shape in zip(self.dtypes, self.shapes, strict=True)
        )

    def _explain(self, bucket: FusedBucket, encoded: Encoded) -> str:
        messages = [(layout, message) for layout, messages in encoded for message in messages]
        others = [
            str(rank)
            for rank, (layout, message) in enumerate(messages)
            if self.gathers and message[:PREAMBLE_SIZE].tobytes() != layout.preamble
        ]
        who = f"rank {', '.join(others)} has" if 0 < len(others) < self.size else "some rank has"
        return f"{self.mismatch(who)} Here {bucket.entries[0].scheme} holds."

    def mismatch(self, who: str) -> str:
        """What to say when others have sent something else."""
        return (
            f"{who} sent other gradients at place {self.name} than this one, which has {self._what()}. Every "
            "rank must build the same model, in the same order, and be at the same step."
        )


def _split(received: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """What an alltoall has brought, by ranks."""
    ends = np.cumsum(sizes)
    return [received[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _sized(parts: tuple[np.ndarray, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """A message and its parts' sizes, for an alltoall."""
    message, sizes = parts
    return message, np.array(sizes, np.int32)


def _values(gradient: np.ndarray) -> np.ndarray:
    """As the native codec reads them: bfloat16 as 16-bit patterns."""
    return gradient.view(_memory(gradient.dtype))


def _memory(kind: np.dtype) -> str:
    """The type of NumPy's own in which values of a type are stored."""
    return kind.name if kind.name != "bfloat16" else "int16"


def once_reduced(message: tf.Tensor, reduced: tf.Tensor) -> tf.Tensor:
    """A message that is sent when the control tensor has come back.

    If Horovod refuses that, because another rank has a tensor of another type, say, that rank sends nothing,
    and the graph of this one would wait for it for ever.
    """
    with tf.control_dependencies([reduced]):
        return tf.identity(message)


def call(function: Any, inputs: list[tf.Tensor], dtypes: list[tf.DType]) -> list[tf.Tensor]:
    """A function of NumPy arrays as an operation.

    Not a stateful one: those wait for each other in the order in which they were traced, and gradients would
    travel one after the other.
    """
    results = tf.numpy_function(function, inputs, dtypes, stateful=False)
    return results if isinstance(results, list) else [results]
