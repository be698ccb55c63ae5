"""What is computed between Horovod's operations: the parts of an exchange, called in every step.

A graph holds Horovod's own allgather (or alltoall and allgather), and in front of it, between them and behind
it a call of these functions on NumPy arrays that share TensorFlow's memory. They keep nothing from one part
to the next, so that TensorFlow may run them in any order that the graph allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

from hvd_quant.codec import native
from hvd_quant.codec.message import PREAMBLE_SIZE, Messages, cut, in_rank_order
from hvd_quant.exchange.algorithms import ALGORITHMS, BucketData, Encoded, Stage
from hvd_quant.exchange.layout import Entry, GroupLayout
from hvd_quant.exchange.topology import Topology
from hvd_quant.reducer import control
from hvd_quant.reducer.mismatch import RankMismatchError
from hvd_quant.schemes import DQSGD, Scheme
from hvd_quant.tensorflow.graph_state import GraphState

_BUCKETS_KEPT = 16  # of a group whose shapes or bits change

Shape = tuple[int, ...]


# What is quantized, as `hvd_quant.codec.message.DTYPES` calls it.
DTYPES = {
    tf.float32: "float32",
    tf.float64: "float64",
    tf.float16: "float16",
    tf.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class GradientSpec:
    """What is known of a gradient when its exchange is laid out.

    Args:
        key: what it is called on every rank.
        dtype: one of the values of `DTYPES`.
        shape: None if it is known only when the gradient comes.
        scheme: how it is quantized.
    """

    key: str
    dtype: str
    shape: Shape | None
    scheme: Scheme | DQSGD

    @cached_property
    def kind(self) -> np.dtype:
        """The result's type, as NumPy knows it."""
        return np.dtype(tf.as_dtype(self.dtype).as_numpy_dtype)

    def entry(self, shape: Shape, bits: int) -> Entry:
        """It as a part of a fused bucket, in a step with so many bits."""
        scheme = self.scheme.at(bits) if isinstance(self.scheme, DQSGD) else self.scheme
        return Entry(self.key, int(np.prod(shape)), self.dtype, scheme)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape if self.shape is not None else 'unknown'}"


@dataclass(frozen=True)
class Ranks:
    """Who exchanges gradients.

    Args:
        rank, size: of the process set.
        seed: of the noise; anything that JSON can hold.
        topology: where the ranks are.
    """

    rank: int
    size: int
    seed: object
    topology: Topology | None = None


@dataclass
class GroupSteps:
    """A group of gradients that travel together.

    Args:
        graph_state: the compressor's.
        name: of the group, the same on all ranks.
        title: what its messages are called in a graph.
        gradients: that it holds.
        algorithm: the exchange's name.
        ranks: that take part.
        fingerprint: of the first gradient's control tensor.
        passed_bytes: of gradients that Horovod reduces uncompressed in the same step, as they are and as
            they are sent.
    """

    graph_state: GraphState
    name: str
    title: str
    gradients: Sequence[GradientSpec]
    algorithm: str
    ranks: Ranks
    fingerprint: int
    passed_bytes: list[int] = field(default_factory=lambda: [0, 0])
    _buckets: dict[tuple, GroupLayout] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def keys(self) -> list[str]:
        """What the gradients are called."""
        return [gradient.key for gradient in self.gradients]

    @cached_property
    def shapes(self) -> list[Shape | None]:
        """Of the gradients; None for those known only when they come."""
        return [gradient.shape for gradient in self.gradients]

    @property
    def stages(self) -> Sequence[Stage]:
        """Of the exchange."""
        return ALGORITHMS[self.algorithm].stages

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
            The first stage's message; its sizes, as `_prepared` has them; and the bits of the step, an int32
            scalar.
        """
        *gradients, use = map(np.asarray, arrays)  # what has no dimensions comes as a NumPy scalar
        bits = self.graph_state.send(self.name)
        bucket = self.bucket([gradient.shape for gradient in gradients], bits)
        counts = [gradient.size for gradient in gradients]
        residuals = self.graph_state.residuals_of(self.keys, counts)
        data = self._data(bucket, [_values(gradient) for gradient in gradients], use, residuals)
        message, sizes = self._prepared(self.stages[0], data, Messages(()))
        raw_bytes = sum(gradient.nbytes for gradient in gradients)
        self._count_sent(raw_bytes, 0)
        return message, sizes, np.array(bits, np.int32)

    def relay(
        self,
        number: int,
        received: np.ndarray,
        sizes: np.ndarray,
        use: np.ndarray,
        bits: np.ndarray,
        *shapes: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prepare another stage.

        Args:
            number: of the stage.
            received: what the stage before it has brought of all ranks, end to end.
            sizes: of these.
            use: as `send` had it.
            bits: as `send` returned them.
            *shapes: of the gradients of unknown shape.

        Returns:
            The message, and its sizes. An empty one, which nobody takes for one, if there is none.
        """
        bucket = self.bucket(self._all_shapes(shapes), int(bits))
        residuals = self.graph_state.residuals_of(self.keys, [entry.count for entry in bucket.entries])
        parts = self._parts(self.stages[number - 1], received, sizes)
        # Of the values themselves only the memory's kind is looked at.
        data = self._data(bucket, [received], use, residuals)
        try:
            return self._prepared(self.stages[number], data, parts)
        except ValueError:
            return received[:0], np.zeros(self.ranks.size, sizes_type(self.stages[number]))

    def _prepared(self, stage: Stage, data: BucketData, parts: Messages) -> tuple[np.ndarray, np.ndarray]:
        """A stage's message and sizes, -1 for None."""
        message, sizes = stage.prepare(data, parts)
        self.graph_state.count(wire_bytes=data.encoded_bytes)
        return message, np.array([-1 if size is None else size for size in sizes], sizes_type(stage))

    def _parts(self, stage: Stage, received: np.ndarray, sizes: np.ndarray) -> Messages:
        """What a stage has brought from each rank."""
        if stage.collective == "alltoall":  # by Horovod's word
            ends = np.cumsum(sizes)
            parts = in_rank_order([received[end - size : end] for end, size in zip(ends, sizes, strict=True)])
        else:
            parts = cut(received, [None if size < 0 else size for size in sizes.tolist()])
        received_bytes = sum(part.size for rank, part in enumerate(parts) if rank != self.ranks.rank)
        self.graph_state.count(received_bytes=received_bytes)
        return parts

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
            received: what the last stage has brought of all ranks, end to end.
            sizes: of these.
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
            self.graph_state.buffers.empty(one.key, int(np.prod(shape)), np.dtype(_memory(one.kind))).reshape(
                shape
            )
            for one, shape in zip(self.gradients, all_shapes, strict=True)
        ]
        encoded = ALGORITHMS[self.algorithm].encoded(bucket, self._parts(self.stages[-1], received, sizes))
        try:
            for layout, messages in encoded:
                native.decode_messages(messages, layout, results, factor)
        except ValueError as error:
            raise RankMismatchError(self._explain(bucket, encoded)) from error
        self.graph_state.receive(self.name)
        return [result.view(one.kind) for result, one in zip(results, self.gradients, strict=True)]

    def count_static(self, raw_bytes: int, encoded_bytes: int, received_bytes: int) -> None:
        """Note a step whose bytes are known beforehand, and were not counted by the others."""
        self._count_sent(raw_bytes, encoded_bytes)
        self.graph_state.count(received_bytes=received_bytes)

    def _count_sent(self, raw_bytes: int, encoded_bytes: int) -> None:
        """Note what a step sends, with what Horovod reduces beside it."""
        raw, sent = self.passed_bytes
        encoded_bytes += control.NBYTES * len(self.gradients)
        self.graph_state.count(raw_bytes + raw, encoded_bytes + sent, messages=1)

    def check(self, reduced: np.ndarray, fingerprint: int) -> float:
        """The factor of a reduced control tensor; notes the squared norm in it.

        Raises:
            RankMismatchError, UnsupportedReductionError: as `receive`.
        """
        try:
            factor = control.check(reduced[: control.SQUARE].tolist(), fingerprint, self.ranks.size)
        except control.FingerprintMismatch:
            raise RankMismatchError(
                f"the ranks have different gradients at place {self.name}: on this rank {self._what()}. "
                "Every rank must build the same model, in the same order."
            ) from None
        if self.graph_state.state.schedule is not None:
            self.graph_state.note_square(float(reduced[control.SQUARE]) / factor)
        return factor

    def _data(
        self, bucket: GroupLayout, values: list[np.ndarray], use: np.ndarray, residuals: Sequence[np.ndarray]
    ) -> BucketData:
        # Fresh memory, because TensorFlow keeps what it is given.
        return BucketData(bucket, values, np.full(len(self.gradients), use, np.uint64), native, residuals)

    def bucket(self, shapes: Sequence[Shape], bits: int) -> GroupLayout:
        """The fused bucket of gradients of these shapes, in a step with so many bits."""
        key = (tuple(shapes), bits)
        bucket = self._buckets.get(key)
        if bucket is None:
            entries = [one.entry(shape, bits) for one, shape in zip(self.gradients, shapes, strict=True)]
            if len(self._buckets) >= _BUCKETS_KEPT:
                self._buckets.clear()
            ranks = self.ranks
            bucket = GroupLayout(entries, ranks.size, ranks.rank, ranks.seed, ranks.topology)
            self._buckets[key] = bucket
        return bucket

    def _all_shapes(self, unknown: Sequence[np.ndarray]) -> list[Shape]:
        rest = iter(unknown)
        return [shape if shape is not None else tuple(next(rest).tolist()) for shape in self.shapes]

    def _what(self) -> str:
        return ", ".join(map(str, self.gradients))

    def _explain(self, bucket: GroupLayout, encoded: Encoded) -> str:
        messages = [(layout, message) for layout, messages in encoded for message in messages]
        gathered = self.stages[-1].collective == "allgather"
        others = [
            str(rank)
            for rank, (layout, message) in enumerate(messages)
            if gathered and message[:PREAMBLE_SIZE].tobytes() != layout.preamble
        ]
        who = f"rank {', '.join(others)} has" if 0 < len(others) < self.ranks.size else "some rank has"
        schemes = " and ".join(dict.fromkeys(str(entry.scheme) for entry in bucket.entries))
        return f"{self.mismatch(who)} Here {schemes} holds."

    def mismatch(self, who: str) -> str:
        """What to say when others have sent something else."""
        return (
            f"{who} sent other gradients at place {self.name} than this one, which has {self._what()}. Every "
            "rank must build the same model, in the same order, and be at the same step."
        )


def sizes_type(stage: Stage) -> type[np.integer]:
    """The type of a message's sizes: Horovod's alltoall wants 32 bits, which an allgather may exceed."""
    return np.int32 if stage.collective == "alltoall" else np.int64


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
