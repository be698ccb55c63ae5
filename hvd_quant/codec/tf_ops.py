"""The codec in plain TensorFlow operations, for gradients on any device, in graphs and eagerly.

Payloads are those of the native codec, and decode to the same bits; only the rounding noise comes from
another generator, TensorFlow's stateless one.

TensorFlow's kernels flush subnormal float32 values to zero, on CPUs and GPUs. Encoding does likewise.
Decoding does not: where a result may depend on subnormal numbers, it is computed in float64. Graph rewrites
do not keep float32's rounding (a division by a constant becomes a multiplication), and on GPUs int32
arithmetic is done by the host; the code takes care of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from hvd_quant import wire
from hvd_quant.codec.message import PREAMBLE_SIZE, SOMETHING_ELSE, MessageLayout, name_of
from hvd_quant.codec.tf_bytes import MASK32, checksum, constant, fit, pack, words64
from hvd_quant.codec.tf_rounding import (
    exact_values_of,
    may_be_subnormal,
    narrow,
    narrow_exact,
    quantize,
    round_to_float32,
    values_of,
)
from hvd_quant.schemes import Scheme

SAFE_WEIGHT = 2.0**-16

_PROBLEMS = (  # by the codes of `problems`
    "is fine",
    SOMETHING_ELSE,
    "holds another payload than was expected",
    "is damaged: its checksum does not match its bytes",
    "is damaged: its padding is not zero",
)


@tf.autograph.experimental.do_not_convert
def encode_message(
    values: Sequence[tf.Tensor], layout: MessageLayout, seeds: tf.Tensor, shifts: Sequence[int]
) -> tf.Tensor:
    """Encode all segments of a message.

    Args:
        values: the tensors that the segments are ranges of, floating-point, of any static shape.
        layout: layout of the message, all packed.
        seeds: seeds of the segments' noise, int64 of shape (segments,); see `step_seeds`.
        shifts: offsets of each segment's noise, see `hvd_quant.codec.noise`.

    Returns:
        The message, uint8 of shape (layout.size,).

    Raises:
        ValueError: a payload is not packed, or there are not as many shifts as segments.
    """
    _check_packed(layout)
    flat = [tf.reshape(tensor, [-1]) for tensor in values]
    with tf.device("/CPU:0"):  # the generator wants its seed there, and would wait for it elsewhere
        pairs = tf.stack([seeds, tf.zeros_like(seeds)], 1)
        of_segment = [pairs[i] for i in range(len(layout.segments))]
    pieces = [constant(layout.preamble)]
    for segment, header, seed, shift in zip(layout.segments, layout.headers, of_segment, shifts, strict=True):
        part = flat[segment.tensor][segment.start : segment.start + segment.count]
        body = _encode(part, segment.scheme, seed, int(shift))
        # The checksum is known on the device only.
        sum_bytes = tf.bitcast(checksum(body[tf.newaxis], header), tf.uint8)[0, :4]
        at = 4 * wire.CHECKSUM_WORD
        pieces += [constant(header[:at]), sum_bytes, constant(header[at + 4 :]), body]
    return tf.ensure_shape(tf.concat(pieces, 0), [layout.size])


@tf.autograph.experimental.do_not_convert
def decode_messages(
    messages: tf.Tensor,
    layout: MessageLayout,
    dtypes: Sequence[tf.DType],
    shapes: Sequence[Sequence[int]],
    factor: tf.Tensor,
    ranks: Sequence[int] | None = None,
) -> list[tf.Tensor]:
    """Decode n messages of the same layout into ``factor`` times their mean.

    A damaged message, or one of another layout, raises tf.errors.InvalidArgumentError when the results are
    computed.

    Args:
        messages: uint8 of shape (n, layout.size).
        layout: layout of each message, all packed.
        dtypes: dtypes of the tensors that the segments are ranges of.
        shapes: their shapes.
        factor: multiplies the mean, a floating-point scalar.
        ranks: senders of the messages, for errors; None where they are not known.

    Returns:
        The tensors; zero where no segment is.

    Raises:
        ValueError: a payload is not packed, or two segments overlap.
    """
    _check_packed(layout)
    messages = tf.ensure_shape(messages, [None, layout.size])
    count = tf.cast(tf.shape(messages)[0], tf.float64)
    # As in the native codec: the weight is rounded to float32 before it multiplies.
    factor = tf.cast(tf.convert_to_tensor(factor, dtype_hint=tf.float64), tf.float64)
    weight = tf.cast(factor / count, tf.float32)

    def results(exact: bool) -> list[tf.Tensor]:
        sums = _sums(messages, layout, exact)
        narrowed = narrow_exact if exact else narrow
        parts = [
            narrowed(total, weight, dtypes[segment.tensor])
            for total, segment in zip(sums, layout.segments, strict=True)
        ]
        return [
            tf.reshape(_assemble(layout, tensor, parts, dtype, math.prod(shape)), shape)
            for tensor, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))
        ]

    needs_exact = may_be_subnormal(messages, layout) | (tf.abs(weight) < SAFE_WEIGHT)
    decoded = tf.cond(needs_exact, lambda: results(True), lambda: results(False))
    with tf.control_dependencies([_assertion(problems(messages, layout), ranks)]):
        return [tf.identity(tensor) for tensor in tf.nest.flatten(decoded)]


def _check_packed(layout: MessageLayout) -> None:
    for segment in layout.segments:
        if segment.scheme.coding != "packed":
            raise ValueError(
                f"TensorFlow operations encode with coding 'packed' alone, not {segment.scheme.coding!r}"
            )


def _encode(values: tf.Tensor, scheme: Scheme, seed: tf.Tensor, shift: int) -> tf.Tensor:
    """Return a payload without its header."""
    count = values.shape[0]
    body_size = wire.payload_size(scheme, count) - wire.HEADER_SIZE
    if count == 0:
        return tf.zeros([body_size], tf.uint8)
    norms, codes = quantize(values, scheme, seed, shift)
    norms = tf.reshape(tf.bitcast(norms, tf.uint8), [-1])
    return fit(tf.concat([norms, pack(codes, scheme.bits, count)], 0), body_size)


def _sums(messages: tf.Tensor, layout: MessageLayout, exact: bool) -> list[tf.Tensor]:
    """Return, for each segment, the sum of its values over the messages, in order: see `values_of`."""

    def add(number: tf.Tensor, *totals: tf.Tensor) -> tuple[tf.Tensor, ...]:
        message, sums = messages[number], []
        for segment, offset, total in zip(layout.segments, layout.offsets, totals, strict=True):
            payload = message[offset : offset + segment.payload_size]
            if exact:
                sums.append(round_to_float32(total + exact_values_of(payload, segment)))
            else:
                sums.append(total + values_of(payload, segment))
        return number + 1, *sums

    kind = tf.float64 if exact else tf.float32
    # Initial value of a sum that keeps its first term, whatever that one's sign. It is not the number -0.0:
    # outside of graphs, TensorFlow caches constants by their numbers' equality, so that every 0.0 of the
    # process would be this one from then on.
    zeros = [-tf.zeros([segment.count], kind) for segment in layout.segments]
    count = tf.shape(messages)[0]
    return tf.while_loop(lambda number, *_: number < count, add, (0, *zeros), parallel_iterations=1)[1:]


def _assemble(
    layout: MessageLayout, tensor: int, parts: Sequence[tf.Tensor], dtype: tf.DType, count: int
) -> tf.Tensor:
    """Assemble a tensor of ``count`` values from its segments."""
    pieces, end = [], 0
    own = [pair for pair in zip(layout.segments, parts, strict=True) if pair[0].tensor == tensor]
    for segment, part in sorted(own, key=lambda pair: (pair[0].start, pair[0].count)):
        if segment.start < end:
            raise ValueError(f"segments of tensor {tensor} overlap at value {segment.start}")
        pieces += [tf.zeros([segment.start - end], dtype), part]
        end = segment.start + segment.count
    return tf.concat([*pieces, tf.zeros([count - end], dtype)], 0)


# --- checks ---------------------------------------------------------------------------------------------


def problems(messages: tf.Tensor, layout: MessageLayout) -> tf.Tensor:
    """Return what is wrong with each of n messages: int64 of shape (n,), 0 where nothing is."""
    expected = np.frombuffer(layout.preamble, np.int64)
    found = [tf.reduce_any(words64(messages[:, :PREAMBLE_SIZE]) != expected, 1)]
    others: list[list[tf.Tensor]] = [[], [], []]
    compared = np.full(wire.HEADER_SIZE, 0xFF, np.uint8)
    compared[4 * wire.CHECKSUM_WORD : 4 * wire.CHECKSUM_WORD + 4] = 0
    compared = compared.view(np.int64)
    for segment, offset, header in zip(layout.segments, layout.offsets, layout.headers, strict=True):
        payload = messages[:, offset : offset + segment.payload_size]
        words = words64(payload[:, : wire.HEADER_SIZE])
        differs = tf.bitwise.bitwise_and(words, compared) != header.view(np.int64) & compared
        half, is_high = divmod(wire.CHECKSUM_WORD, 2)
        stated = tf.bitwise.right_shift(words[:, half], tf.constant(32 * is_high, tf.int64))
        stated = tf.bitwise.bitwise_and(stated, tf.constant(MASK32, tf.int64))
        used = wire.used_size(segment.scheme, segment.count)
        others[0].append(tf.reduce_any(differs, 1))
        others[1].append(checksum(payload[:, wire.HEADER_SIZE :], header) != stated)
        others[2].append(tf.reduce_any(payload[:, used:] != 0, 1))
    if layout.segments:
        found += [tf.reduce_any(tf.stack(kind), 0) for kind in others]
    numbers = tf.zeros_like(found[0], tf.int64)
    for place, is_wrong in reversed(list(enumerate(found, 1))):
        numbers = tf.where(is_wrong, tf.constant(place, tf.int64), numbers)
    return numbers


def _assertion(found: tf.Tensor, ranks: Sequence[int] | None) -> tf.Operation | None:
    """Return an assertion that fails if problems were found, and names the first message that has one."""
    with tf.device("/CPU:0"):
        number = tf.argmax(tf.cast(found > 0, tf.int64))
        what = tf.gather(tf.constant(_PROBLEMS), found[number])
        if ranks is None:
            name = tf.strings.join(["message ", tf.strings.as_string(number)])
        else:
            name = tf.gather(tf.constant([name_of(i, ranks) for i in range(len(ranks))]), number)
        text = tf.strings.join([name, " ", what])
        return tf.debugging.Assert(tf.reduce_all(found == 0), [text])
