"""The exchange on a GPU: the codec in TensorFlow operations, without copies to the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from hvd_quant.codec import tf_ops, tf_rounding
from hvd_quant.codec.message import MessageLayout, lengths_fault
from hvd_quant.exchange.layout import GroupLayout
from hvd_quant.tensorflow.group_steps import GroupSteps, call, once_reduced


def has_gpu() -> bool:
    """Return whether TensorFlow computes on a GPU here."""
    return bool(tf.config.list_logical_devices("GPU"))


def can_exchange(steps: GroupSteps, algorithm: str) -> bool:
    """Return whether a group's messages are known when it is traced: shapes, bits, and the size of its codes.

    Error feedback is left to the CPU, too.
    """
    graph_state = steps.graph_state
    return (
        None not in steps.shapes
        and graph_state.state.schedule is None
        and all(one.scheme.coding == "packed" for one in steps.gradients)
        and graph_state.state.residuals is None
        and not steps.membership.is_elastic  # ranks may change while the graph stays
        and algorithm in ("allgather", "scatter_allgather")
    )


def exchange(
    steps: GroupSteps,
    algorithm: str,
    tensors: list[tf.Tensor],
    use: tf.Tensor,
    reduced: tf.Tensor,
    process_set: hvd.ProcessSet,
) -> list[tf.Tensor]:
    """Lay out a group's exchange.

    Args:
        steps: steps of the group, for which `can_exchange` holds.
        algorithm: name of the exchange algorithm.
        tensors: its gradients.
        use: how often it has come before, an int64 scalar.
        reduced: the first reduced control tensor.
        process_set: the ranks that take part.

    Returns:
        The mean over the ranks, or the sum for ``op=Sum``, of each gradient.
    """
    bucket = steps.bucket(steps.shapes, 0)
    if algorithm == "allgather":
        message = once_reduced(_encode(tensors, bucket, bucket.whole, "whole", use), reduced)
        received = _gather(steps, message, reduced, process_set)
        messages = _cut(steps, received, [bucket.whole.size] * steps.ranks.size)
        dtypes = [tensor.dtype for tensor in tensors]
        factor = _factor(steps, algorithm, reduced, received, bucket)
        ranks = range(steps.ranks.size)
        return tf_ops.decode_messages(tf.stack(messages), bucket.whole, dtypes, steps.shapes, factor, ranks)

    sizes = [chunk.size for chunk in bucket.chunks]
    sent = tf.concat([_encode(tensors, bucket, chunk, "chunk", use) for chunk in bucket.chunks], 0)
    sent, splits = steps.named(once_reduced(sent, reduced), "scatter"), tf.constant(sizes, tf.int32)
    message = _encode_mean(bucket, *hvd.alltoall(sent, splits=splits, process_set=process_set), use)
    received = _gather(steps, message, reduced, process_set)
    factor = _factor(steps, algorithm, reduced, received, bucket)
    pieces = defaultdict(list)  # parts of each gradient, in order
    messages = _cut(steps, received, sizes)
    for rank, (chunk, message) in enumerate(zip(bucket.chunks, messages, strict=True)):
        flat = chunk.flattened
        values = _decode_flat(message[tf.newaxis], flat, factor, [rank])
        for segment, place in zip(chunk.segments, flat.segments, strict=True):
            pieces[segment.tensor].append(values[place.start : place.start + place.count])
    return [
        tf.cast(tf.reshape(tf.concat(pieces[i], 0), tensor.shape), tensor.dtype)
        for i, tensor in enumerate(tensors)
    ]


def _gather(
    steps: GroupSteps, message: tf.Tensor, reduced: tf.Tensor, process_set: hvd.ProcessSet
) -> tf.Tensor:
    """Gather all ranks' messages, back to back.

    Nothing is checked before everything has arrived, the control tensor included: a rank that has found an
    error takes part in nothing any more, and the others would wait for it.
    """
    received = hvd.allgather(steps.named(message, "gather"), process_set=process_set)
    with tf.control_dependencies([reduced]):
        return tf.identity(received)


def _factor(
    steps: GroupSteps, algorithm: str, reduced: tf.Tensor, received: tf.Tensor, bucket: GroupLayout
) -> tf.Tensor:
    """Return the factor of the mean, and count the step."""
    raw_bytes = sum(entry.nbytes for entry in bucket.entries)
    if algorithm == "allgather":
        encoded_bytes, received_bytes = bucket.whole.size, (bucket.size - 1) * bucket.whole.size
    else:
        encoded_bytes, own = sum(chunk.size for chunk in bucket.chunks), bucket.chunks[bucket.rank].size
        received_bytes = (bucket.size - 1) * own + encoded_bytes - own

    def check(control: np.ndarray) -> np.ndarray:
        steps.count_static(raw_bytes, encoded_bytes, received_bytes)
        return np.array(steps.check(control, steps.fingerprint))

    with tf.device("/CPU:0"), tf.control_dependencies([received]):
        (factor,) = call(check, [reduced], [tf.float64])
        return tf.cast(tf.ensure_shape(factor, []), tf.float32)


def _encode(
    tensors: list[tf.Tensor], bucket: GroupLayout, layout: MessageLayout, stage: str, use: tf.Tensor
) -> tf.Tensor:
    base, _, shifts = bucket.noise_keys(layout, stage)
    return tf_ops.encode_message(tensors, layout, tf_rounding.step_seeds(base, use), shifts)


def _encode_mean(bucket: GroupLayout, received: tf.Tensor, sizes: tf.Tensor, use: tf.Tensor) -> tf.Tensor:
    """Encode the mean of all ranks' messages with the own chunk.

    They have arrived back to back, each of its size. If they are damaged, the result is an empty message,
    which never passes for a mean: others wait for one.
    """
    own, flat = bucket.chunks[bucket.rank], bucket.own_chunk

    def mean() -> tf.Tensor:
        parts = tf.reshape(received, [bucket.size, own.size])

        def encoded() -> tf.Tensor:
            # The noise is that of the chunk, whose segments have the gradients' keys.
            base, _, shifts = bucket.noise_keys(own, "mean")
            values = _decode_flat(parts, flat, tf.constant(1.0))
            return tf_ops.encode_message([values], flat, tf_rounding.step_seeds(base, use), shifts)

        return tf.cond(tf.reduce_all(tf.equal(tf_ops.problems(parts, flat), 0)), encoded, nothing)

    def nothing() -> tf.Tensor:
        return tf.zeros([0], tf.uint8)

    # Not the size of what was received: TensorFlow infers that from what was sent.
    return tf.cond(tf.equal(tf.reduce_sum(sizes), bucket.size * own.size), mean, nothing)


def _decode_flat(
    messages: tf.Tensor, flat: MessageLayout, factor: tf.Tensor, ranks: Sequence[int] | None = None
) -> tf.Tensor:
    (values,) = tf_ops.decode_messages(messages, flat, [tf.float32], [[flat.count]], factor, ranks)
    return values


def _cut(steps: GroupSteps, received: tf.Tensor, sizes: list[int]) -> list[tf.Tensor]:
    """Split the messages that have arrived back to back."""
    size = tf.size(received)
    with tf.device("/CPU:0"):
        fault = tf.strings.format(lengths_fault(len(sizes), "{}", sum(sizes)), size)
        text = tf.strings.join([steps.mismatch("some rank has"), " (", fault, ")"])
        expected = tf.debugging.Assert(tf.equal(size, sum(sizes)), [text])
    with tf.control_dependencies([expected] if expected is not None else []):
        return tf.split(received, sizes)
