"""The steps between Horovod's collectives: the parts of an exchange, called in every training step.

A graph holds Horovod's own allgather (or alltoall and allgather), and before, between and after them calls of
these functions on NumPy arrays that share TensorFlow's memory. They keep no data between the calls, so that
TensorFlow may run them in any order that the graph allows.
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
from hvd_quant.exchange.algorithms import ALGORITHMS, Algorithm, BucketData, Encoded, Stage
from hvd_quant.exchange.layout import Entry, GroupLayout
from hvd_quant.reducer import control_tensor
from hvd_quant.reducer.errors import RankMismatchError, UnsupportedReductionError
from hvd_quant.schemes import DQSGD, Scheme
from hvd_quant.tensorflow.graph_state import GraphState
from hvd_quant.tensorflow.membership import Membership, Ranks

ALONE = len(ALGORITHMS)  # in place of an algorithm's index, if there is one rank
_BUCKETS_KEPT = 16  # per group whose shapes or bits change

Shape = tuple[int, ...]


# Quantized dtypes, with their names in `hvd_quant.codec.message.DTYPES`.
DTYPES = {
    tf.float32: "float32",
    tf.float64: "float64",
    tf.float16: "float16",
    tf.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class GradientSpec:
    """A gradient as known when its exchange is laid out.

    Args:
        key: its name on every rank.
        dtype: one of the values of `DTYPES`.
        shape: None if it is known only at run time.
        scheme: how it is quantized.
    """

    key: str
    dtype: str
    shape: Shape | None
    scheme: Scheme | DQSGD

    @cached_property
    def kind(self) -> np.dtype:
        """NumPy dtype of the result."""
        return np.dtype(tf.as_dtype(self.dtype).as_numpy_dtype)

    def entry(self, shape: Shape, bits: int) -> Entry:
        """Return its entry in a fused bucket, in a step with this number of bits."""
        scheme = self.scheme.at(bits) if isinstance(self.scheme, DQSGD) else self.scheme
        return Entry(self.key, int(np.prod(shape)), self.dtype, scheme)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape if self.shape is not None else 'unknown'}"


@dataclass
class GroupSteps:
    """A group of gradients that travel together, and the steps of its exchange.

    Args:
        graph_state: state of the compressor.
        name: name of the group, the same on all ranks.
        title: name of its messages in a graph.
        gradients: its gradients.
        membership: ranks that take part.
        hierarchical: whether to consider the hierarchical exchange.
        fingerprint: fingerprint of the first gradient's control tensor.
        passed_bytes: bytes of gradients that Horovod reduces uncompressed in the same step, in their own
            dtype and as sent.
    """

    graph_state: GraphState
    name: str
    title: str
    gradients: Sequence[GradientSpec]
    membership: Membership
    hierarchical: bool
    fingerprint: int
    passed_bytes: list[int] = field(default_factory=lambda: [0, 0])
    _buckets: dict[tuple, GroupLayout] = field(default_factory=dict, init=False, repr=False)
    _algorithm: tuple[int, int] = field(default=(-1, ALONE), init=False, repr=False)  # of a generation

    @cached_property
    def keys(self) -> list[str]:
        """Keys of the gradients."""
        return [gradient.key for gradient in self.gradients]

    @cached_property
    def shapes(self) -> list[Shape | None]:
        """Shapes of the gradients; None for those known only at run time."""
        return [gradient.shape for gradient in self.gradients]

    @property
    def ranks(self) -> Ranks:
        """Ranks that take part, at present."""
        return self.membership.ranks

    @property
    def algorithm(self) -> int:
        """Index of the exchange algorithm in `ALGORITHMS`, at present; or `ALONE`."""
        generation = self.ranks.generation
        known, algorithm = self._algorithm
        if known != generation:
            algorithm = self._choose()
            self._algorithm = generation, algorithm
        return algorithm

    def _choose(self) -> int:
        if self.ranks.size == 1:
            return ALONE
        counts = [None if shape is None else int(np.prod(shape)) for shape in self.shapes]
        return list(ALGORITHMS).index(self.membership.algorithm(counts, hierarchical=self.hierarchical))

    def named(self, message: tf.Tensor, stage: str) -> tf.Tensor:
        """Name a message, so that Horovod matches it with those of the other ranks.

        Otherwise it would have the name of an operation, which has a number if there are several of its kind.
        """
        return tf.identity(message, f"{self.title}_{stage}")

    def send(self, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode the gradients.

        Args:
            *arrays: the gradients, and how often the group has come before, an int64 scalar.

        Returns:
            The first stage's message; its sizes, as from `_prepared`; the bits of the step, and the index of
            the algorithm, int32 scalars.
        """
        *gradients, use = map(np.asarray, arrays)  # 0-d tensors come as NumPy scalars
        bits, algorithm = self.graph_state.send(self.name), self.algorithm
        numbers = np.array(bits, np.int32), np.array(algorithm, np.int32)
        if algorithm == ALONE:
            return np.empty(0, np.uint8), np.zeros(1, np.int64), *numbers
        bucket = self.bucket([gradient.shape for gradient in gradients], bits)
        counts = [gradient.size for gradient in gradients]
        residuals = self.graph_state.residuals_of(self.keys, counts)
        data = self._data(bucket, [_values(gradient) for gradient in gradients], use, residuals)
        first, *_ = list(ALGORITHMS.values())[algorithm].stages
        message, sizes = self._prepared(first, data, Messages(()))
        raw_bytes = sum(gradient.nbytes for gradient in gradients)
        self._count_sent(raw_bytes, 0)
        return message, sizes, *numbers

    def relay(
        self,
        algorithm: Algorithm,
        number: int,
        received: np.ndarray,
        sizes: np.ndarray,
        use: np.ndarray,
        bits: np.ndarray,
        *shapes: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prepare another stage.

        Args:
            algorithm: algorithm of the exchange.
            number: number of the stage.
            received: messages of all ranks in the stage before, back to back.
            sizes: their sizes.
            use: as in `send`.
            bits: from `send`.
            *shapes: shapes of the gradients of unknown shape.

        Returns:
            The message, and its sizes. It is empty, which never passes for a message, if there is none.
        """
        bucket, stages = self.bucket(self._all_shapes(shapes), int(bits)), algorithm.stages
        residuals = self.graph_state.residuals_of(self.keys, [entry.count for entry in bucket.entries])
        parts = self._parts(stages[number - 1], received, sizes)
        # Only the dtype of the values is used.
        data = self._data(bucket, [received], use, residuals)
        try:
            return self._prepared(stages[number], data, parts)
        except ValueError:
            return received[:0], np.zeros(self.ranks.size, np.int64)

    def _prepared(self, stage: Stage, data: BucketData, parts: Messages) -> tuple[np.ndarray, np.ndarray]:
        """Return a stage's message and sizes, -1 for None."""
        message, sizes = stage.prepare(data, parts)
        self.graph_state.count(wire_bytes=data.encoded_bytes)
        return message, np.array([-1 if size is None else size for size in sizes], np.int64)

    def _parts(self, stage: Stage, received: np.ndarray, sizes: np.ndarray) -> Messages:
        """Split what a stage has received by rank."""
        if stage.collective == "alltoall":  # sizes as reported by Horovod
            ends = np.cumsum(sizes)
            parts = in_rank_order([received[end - size : end] for end, size in zip(ends, sizes, strict=True)])
        else:
            parts = cut(received, [None if size < 0 else size for size in sizes.tolist()])
        received_bytes = sum(part.size for rank, part in enumerate(parts) if rank != self.ranks.rank)
        self.graph_state.count(received_bytes=received_bytes)
        return parts

    def receive(
        self,
        algorithm: Algorithm,
        received: np.ndarray,
        sizes: np.ndarray,
        reduced: np.ndarray,
        bits: np.ndarray,
        *shapes: np.ndarray,
    ) -> list[np.ndarray]:
        """Decode the mean over the ranks.

        Args:
            algorithm: algorithm of the exchange.
            received: messages of all ranks in the last stage, back to back.
            sizes: their sizes.
            reduced: the first gradient's reduced control tensor.
            bits: from `send`.
            *shapes: shapes of the gradients of unknown shape.

        Returns:
            The mean, or the sum for ``op=Sum``, of each gradient.

        Raises:
            RankMismatchError: the ranks have not sent the same gradients.
            UnsupportedReductionError: Horovod was called with Adasum, Min, Max or Product.
        """
        all_shapes = self._all_shapes(shapes)
        bucket = self.bucket(all_shapes, int(bits))
        factor = self.check(reduced, self.fingerprint)
        pool = self.graph_state.buffers
        results = [
            pool.empty(one.key, int(np.prod(shape)), np.dtype(_storage(one.kind))).reshape(shape)
            for one, shape in zip(self.gradients, all_shapes, strict=True)
        ]
        encoded = algorithm.encoded(bucket, self._parts(algorithm.stages[-1], received, sizes))
        try:
            for layout, messages in encoded:
                native.decode_messages(messages, layout, results, factor)
        except ValueError as error:
            raise RankMismatchError(self._explain(algorithm, bucket, encoded)) from error
        self.graph_state.receive(self.name)
        return [result.view(one.kind) for result, one in zip(results, self.gradients, strict=True)]

    def receive_alone(self, reduced: np.ndarray) -> np.ndarray:
        """Return the factor of the gradients, if there is one rank.

        Args:
            reduced: the first gradient's reduced control tensor.
        """
        factor = self.check(reduced, self.fingerprint)
        self.graph_state.receive(self.name)
        return np.array(factor)

    def count_static(self, raw_bytes: int, encoded_bytes: int, received_bytes: int) -> None:
        """Count a step whose bytes are known in advance, and were not counted by the other methods."""
        self._count_sent(raw_bytes, encoded_bytes)
        self.graph_state.count(received_bytes=received_bytes)

    def _count_sent(self, raw_bytes: int, encoded_bytes: int) -> None:
        """Count what a step sends, with what Horovod reduces beside it."""
        raw, sent = self.passed_bytes
        encoded_bytes += control_tensor.NBYTES * len(self.gradients)
        self.graph_state.count(raw_bytes + raw, encoded_bytes + sent, messages=1)

    def check(self, reduced: np.ndarray, fingerprint: int) -> float:
        """Return the factor of a reduced control tensor; notes the squared norm in it.

        Raises:
            RankMismatchError, UnsupportedReductionError: as `receive`.
        """
        try:
            factor = control_tensor.check(
                reduced[: control_tensor.SQUARE].tolist(), fingerprint, self.ranks.size
            )
        except control_tensor.FingerprintMismatch:
            raise RankMismatchError(
                f"the ranks have different gradients at place {self.name}: on this rank {self._describe()}. "
                "Every rank must build the same model, in the same order."
            ) from None
        if self.graph_state.state.schedule is not None:
            self.graph_state.note_square(float(reduced[control_tensor.SQUARE]) / factor)
        return factor

    def _data(
        self, bucket: GroupLayout, values: list[np.ndarray], use: np.ndarray, residuals: Sequence[np.ndarray]
    ) -> BucketData:
        # A new buffer, because TensorFlow keeps what it is given.
        return BucketData(bucket, values, np.full(len(self.gradients), use, np.uint64), native, residuals)

    def bucket(self, shapes: Sequence[Shape], bits: int) -> GroupLayout:
        """Return the fused bucket of gradients of these shapes, in a step with this number of bits."""
        ranks = self.ranks
        key = (tuple(shapes), bits, ranks.generation)
        bucket = self._buckets.get(key)
        if bucket is None:
            entries = [one.entry(shape, bits) for one, shape in zip(self.gradients, shapes, strict=True)]
            if len(self._buckets) >= _BUCKETS_KEPT:
                self._buckets.clear()
            bucket = GroupLayout(entries, ranks.size, ranks.rank, ranks.seed, ranks.topology)
            self._buckets[key] = bucket
        return bucket

    def _all_shapes(self, unknown: Sequence[np.ndarray]) -> list[Shape]:
        rest = iter(unknown)
        return [shape if shape is not None else tuple(next(rest).tolist()) for shape in self.shapes]

    def _describe(self) -> str:
        return ", ".join(map(str, self.gradients))

    def _explain(self, algorithm: Algorithm, bucket: GroupLayout, encoded: Encoded) -> str:
        messages = [(layout, message) for layout, messages in encoded for message in messages]
        gathered = algorithm.stages[-1].collective == "allgather"
        others = [
            str(rank)
            for rank, (layout, message) in enumerate(messages)
            if gathered and message[:PREAMBLE_SIZE].tobytes() != layout.preamble
        ]
        who = f"rank {', '.join(others)} has" if 0 < len(others) < self.ranks.size else "some rank has"
        schemes = " and ".join(dict.fromkeys(str(entry.scheme) for entry in bucket.entries))
        return f"{self.mismatch(who)} Here {schemes} holds."

    def mismatch(self, who: str) -> str:
        """Return the error text for ranks that have sent something else."""
        return (
            f"{who} sent other gradients at place {self.name} than this one, which has {self._describe()}. "
            "Every rank must build the same model, in the same order, and be at the same step."
        )


def _values(gradient: np.ndarray) -> np.ndarray:
    """View a gradient as the native codec reads it: bfloat16 as 16-bit patterns."""
    return gradient.view(_storage(gradient.dtype))


def _storage(kind: np.dtype) -> str:
    """Return the NumPy dtype in which values of a dtype are stored."""
    return kind.name if kind.name != "bfloat16" else "int16"


def once_reduced(message: tf.Tensor, reduced: tf.Tensor) -> tf.Tensor:
    """Send a message only after the control tensor has been reduced.

    If Horovod refuses that, for example because another rank has a tensor of another dtype, that rank sends
    nothing, and the graph of this one would wait for it indefinitely.
    """
    with tf.control_dependencies([reduced]):
        return tf.identity(message)


def _raising_argument_errors(function: Any) -> Any:
    """Have our errors raised as ValueError, of which TensorFlow makes an InvalidArgumentError.

    Horovod's elastic training drops an UnknownError that is not of a lost worker, and ends as if all were
    done.
    """

    def run(*arrays: np.ndarray) -> Any:
        try:
            return function(*arrays)
        except (RankMismatchError, UnsupportedReductionError) as error:
            raise ValueError(str(error)) from error

    return run


def call(function: Any, inputs: list[tf.Tensor], dtypes: list[tf.DType]) -> list[tf.Tensor]:
    """Run a function of NumPy arrays as an operation.

    Not a stateful one: those run in the order in which they were traced, and gradients would travel one after
    the other.
    """
    if not tf.executing_eagerly():
        function = _raising_argument_errors(function)
    results = tf.numpy_function(function, inputs, dtypes, stateful=False)
    return results if isinstance(results, list) else [results]
