"""The codec in plain TensorFlow operations, for gradients on any device, in graphs and eagerly.

Payloads are those of the native codec, and decode to the same bits; only the noise of the rounding comes
from another generator, TensorFlow's stateless one.

TensorFlow's kernels take subnormal float32 values for zeros, on CPUs and GPUs. Encoding does likewise.
Decoding does not: where a result may depend on subnormal numbers, it is computed in float64. Other traits of
TensorFlow that the code minds: graphs are rewritten by algebra that does not keep float32's rounding (a
division by a constant becomes a multiplication), and on GPUs int32 arithmetic is done by the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from hvd_quant import wire
from hvd_quant.codec.message import PREAMBLE_SIZE, MessageLayout, Segment
from hvd_quant.codec.noise import FRACTION_BITS
from hvd_quant.schemes import Scheme

# See docs/wire-format.md: below TINY_NORM, the arithmetic is done on values scaled by TINY_PRESCALE.
TINY_NORM = 2.0**-90
TINY_PRESCALE = 2.0**60
MANTISSA_BITS = 23  # of float32
SMALLEST_NORMAL = 2.0**-126
UNIT = 2.0**-149  # the smallest float32 above 0
# Where no value but 0 is smaller than SAFE_VALUE, and the weight is not smaller than SAFE_WEIGHT, no sum is
# subnormal and no weighted one: a value is a multiple of 2^-24 of itself, rounded down to a power of two.
SAFE_VALUE = 2.0**-86
SAFE_WEIGHT = 2.0**-16
TOP_POWER = 2.0**24  # what a norm is scaled to before rounding to powers: nothing near it is subnormal
CHECKSUM_ROW = 1024  # words that are summed at once
MASK32 = 2**32 - 1

_PROBLEMS = (  # by the numbers of `problems`
    "is fine",
    "is not the one that was expected",
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
        layout: of the message, all packed.
        seeds: of the segments' noise, int64 of shape (segments,); see `step_seeds`.
        shifts: what is added to the noise of each segment, see `hvd_quant.codec.noise`.

    Returns:
        The message, uint8 of shape (layout.size,).

    Raises:
        ValueError: a payload is not packed, or there are not as many shifts as segments.
    """
    _check_packed(layout)
    flat = [tf.reshape(tensor, [-1]) for tensor in values]
    with tf.device("/CPU:0"):  # where the generator wants its seed: it would be waited for elsewhere
        pairs = tf.stack([seeds, tf.zeros_like(seeds)], 1)
        of_segment = [pairs[i] for i in range(len(layout.segments))]
    pieces = [_constant(layout.preamble)]
    for segment, header, seed, shift in zip(layout.segments, layout.headers, of_segment, shifts, strict=True):
        part = flat[segment.tensor][segment.start : segment.start + segment.count]
        body = _encode(part, segment.scheme, seed, int(shift))
        # The checksum is known on the device alone.
        checksum = tf.bitcast(_checksum(body[tf.newaxis], header), tf.uint8)[0, :4]
        at = 4 * wire.CHECKSUM_WORD
        pieces += [_constant(header[:at]), checksum, _constant(header[at + 4 :]), body]
    return tf.ensure_shape(tf.concat(pieces, 0), [layout.size])


@tf.autograph.experimental.do_not_convert
def decode_messages(
    messages: tf.Tensor,
    layout: MessageLayout,
    dtypes: Sequence[tf.DType],
    shapes: Sequence[Sequence[int]],
    factor: tf.Tensor,
) -> list[tf.Tensor]:
    """Decode n messages of the same layout into ``factor`` times their mean.

    A damaged message, or one of another layout, is a tf.errors.InvalidArgumentError when the results are
    computed.

    Args:
        messages: uint8 of shape (n, layout.size).
        layout: of each of them, all packed.
        dtypes: of the tensors that the segments are ranges of.
        shapes: of the same.
        factor: multiplies the mean, a floating-point scalar.

    Returns:
        The tensors; what no segment is about is zero.

    Raises:
        ValueError: a payload is not packed, or two segments overlap.
    """
    _check_packed(layout)
    messages = tf.ensure_shape(messages, [None, layout.size])
    count = tf.cast(tf.shape(messages)[0], tf.float64)
    # As the native codec: the weight is rounded to float32 before it multiplies.
    factor = tf.cast(tf.convert_to_tensor(factor, dtype_hint=tf.float64), tf.float64)
    weight = tf.cast(factor / count, tf.float32)

    def results(exact: bool) -> list[tf.Tensor]:
        sums = _sums(messages, layout, exact)
        narrow = _narrow_exact if exact else _narrow
        parts = [
            narrow(total, weight, dtypes[segment.tensor])
            for total, segment in zip(sums, layout.segments, strict=True)
        ]
        return [
            tf.reshape(_assemble(layout, tensor, parts, dtype, math.prod(shape)), shape)
            for tensor, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))
        ]

    needs_exact = _may_be_subnormal(messages, layout) | (tf.abs(weight) < SAFE_WEIGHT)
    decoded = tf.cond(needs_exact, lambda: results(True), lambda: results(False))
    with tf.control_dependencies([_assertion(problems(messages, layout))]):
        return [tf.identity(tensor) for tensor in tf.nest.flatten(decoded)]


@tf.autograph.experimental.do_not_convert
def step_seeds(base: np.ndarray, use: tf.Tensor) -> tf.Tensor:
    """Seeds for `encode_message`, those of `hvd_quant.codec.native.step_seeds`.

    Args:
        base: whose noise each segment has, uint64 of shape (segments,).
        use: how often the message has been encoded before, an int64 scalar.

    Returns:
        int64 of shape (segments,), without a pattern in them.
    """
    with tf.device("/CPU:0"):
        step = _mix64(tf.bitcast(use, tf.uint64) + tf.constant(1, tf.uint64))
        return tf.bitcast(_mix64(tf.bitwise.bitwise_xor(tf.constant(base, tf.uint64), step)), tf.int64)


def _mix64(x: tf.Tensor) -> tf.Tensor:
    """The finalizer of splitmix64, of uint64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        shifted = tf.bitwise.right_shift(x, tf.constant(shift, tf.uint64))
        x = tf.bitwise.bitwise_xor(x, shifted) * tf.constant(factor, tf.uint64)
    return x


def _check_packed(layout: MessageLayout) -> None:
    for segment in layout.segments:
        if segment.scheme.coding != "packed":
            raise ValueError(
                f"TensorFlow operations encode with coding 'packed' alone, not {segment.scheme.coding!r}"
            )


def _constant(data: bytes | np.ndarray) -> tf.Tensor:
    return tf.constant(np.frombuffer(bytes(data), np.uint8))


# --- encode ---------------------------------------------------------------------------------------------


def _encode(values: tf.Tensor, scheme: Scheme, seed: tf.Tensor, shift: int) -> tf.Tensor:
    """A payload without its header."""
    count = values.shape[0]
    body_size = wire.payload_size(scheme, count) - wire.HEADER_SIZE
    if count == 0:
        return tf.zeros([body_size], tf.uint8)
    norms, codes = _quantize(values, scheme, seed, shift)
    norms = tf.reshape(tf.bitcast(norms, tf.uint8), [-1])
    return _fit(tf.concat([norms, _pack(codes, scheme.bits, count)], 0), body_size)


def _quantize(values: tf.Tensor, scheme: Scheme, seed: tf.Tensor, shift: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Norms (float32, one a bucket) and codes (int8, one a value of the filled-up last bucket too)."""
    count = values.shape[0]
    bucket_size = min(scheme.bucket_size, count)
    filled = _fit(tf.cast(values, tf.float32), -(-count // bucket_size) * bucket_size)
    x = tf.reshape(filled, [-1, bucket_size])
    if scheme.norm == "max":
        # Whether a maximum is NaN if a value is, is up to the device.
        norms = tf.where(tf.reduce_all(tf.math.is_finite(x), 1), tf.reduce_max(tf.abs(x), 1), math.nan)
    else:
        norms = tf.cast(tf.sqrt(tf.reduce_sum(tf.square(tf.cast(x, tf.float64)), 1)), tf.float32)
    norms = tf.where(norms < math.inf, norms, math.nan)
    norms = tf.where(norms < SMALLEST_NORMAL, 0.0, norms)
    # Powers of two that keep everything far from float32's limits.
    prescale = tf.where(
        norms < TINY_NORM, TINY_PRESCALE, tf.where(norms < TINY_PRESCALE, 1.0, 1.0 / TINY_PRESCALE)
    )
    # What the norm becomes. An all-zero bucket is divided by 1, a non-finite one gets codes of 0.
    top = float(scheme.num_levels) if scheme.spacing == "uniform" else TOP_POWER
    scaled_norms = tf.where(norms > 0, norms * prescale, 1.0)
    scale = top / scaled_norms
    scale = tf.where(scaled_norms * scale > top, tf.math.nextafter(scale, tf.zeros_like(scale)), scale)
    scale = tf.where(tf.math.is_nan(norms), 0.0, scale)
    scaled = tf.math.multiply_no_nan(x * prescale[:, tf.newaxis], scale[:, tf.newaxis])
    split = _split_uniform if scheme.spacing == "uniform" else _split_powers
    whole, fraction, negated = split(scaled, scheme.num_levels)
    if scheme.rounding == "nearest":  # needs no noise
        whole += tf.cast(fraction >= 0.5, tf.float32)
    else:
        noise = tf.random.stateless_uniform(x.shape, seed)
        if shift:
            noise += shift / 2**FRACTION_BITS
            noise -= tf.floor(noise)
        whole += tf.cast(noise < fraction, tf.float32)
    codes = whole if negated is None else tf.where(negated, -whole, whole)
    return norms, tf.reshape(tf.cast(codes, tf.int8), [-1])


def _split_uniform(scaled: tf.Tensor, steps: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """Values in units of a level: the level below, and how far on the way to the next one they are."""
    floor = tf.floor(scaled)
    return floor, scaled - floor, None


def _split_powers(scaled: tf.Tensor, steps: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """The same for values in units of 1 / TOP_POWER of the norm, between powers of two: of their magnitudes.

    As the native codec: the mantissa of a float is the probability of rounding it up to the next power.
    Below the lowest power, value + power has that mantissa. Also says which values are negative.
    """
    lowest = TOP_POWER * 2.0 ** (1 - steps)
    magnitude = tf.abs(scaled)
    below = magnitude < lowest
    bits = tf.bitcast(tf.where(below, magnitude + lowest, magnitude), tf.uint32)
    mantissa = tf.bitwise.bitwise_and(bits, tf.constant(2**MANTISSA_BITS - 1, tf.uint32))
    exponent = tf.cast(tf.bitwise.right_shift(bits, tf.constant(MANTISSA_BITS, tf.uint32)), tf.float32)
    level = exponent - (126.0 + math.log2(lowest)) - tf.cast(below, tf.float32)
    return level, tf.cast(mantissa, tf.float32) * 2.0**-MANTISSA_BITS, scaled < 0


# --- decode ---------------------------------------------------------------------------------------------


def _sums(messages: tf.Tensor, layout: MessageLayout, exact: bool) -> list[tf.Tensor]:
    """For each segment, the sum over the messages of its values, in order: see `_values`."""

    def add(number: tf.Tensor, *totals: tf.Tensor) -> tuple[tf.Tensor, ...]:
        message, sums = messages[number], []
        for segment, offset, total in zip(layout.segments, layout.offsets, totals, strict=True):
            payload = message[offset : offset + segment.payload_size]
            if exact:
                sums.append(_round_to_float32(total + _exact_values(payload, segment)))
            else:
                sums.append(total + _values(payload, segment))
        return number + 1, *sums

    kind = tf.float64 if exact else tf.float32
    # What a sum begins with to be its first term, whatever that one's sign.
    # Not of the number -0.0: outside of graphs, TensorFlow keeps constants by their numbers' equality, and
    # everybody's 0.0 would be this one from then on.
    zeros = [-tf.zeros([segment.count], kind) for segment in layout.segments]
    count = tf.shape(messages)[0]
    return tf.while_loop(lambda number, *_: number < count, add, (0, *zeros), parallel_iterations=1)[1:]


def _values(payload: tf.Tensor, segment: Segment) -> tf.Tensor:
    """A payload's values, float32 of shape (count,)."""
    if segment.count == 0:
        return tf.zeros([0], tf.float32)
    scheme = segment.scheme
    norms = tf.bitcast(_norm_bytes(payload, segment), tf.float32)[:, tf.newaxis]
    codes = _codes(payload, segment)
    values = _powers(codes, scheme) if scheme.spacing == "exponential" else tf.cast(codes, tf.float32)
    if scheme.spacing == "uniform":
        # In float64: no graph rewriting of this division changes its float32.
        norms = tf.cast(tf.cast(norms, tf.float64) / scheme.num_levels, tf.float32)
    return tf.reshape(values * norms, [-1])[: segment.count]


def _exact_values(payload: tf.Tensor, segment: Segment) -> tf.Tensor:
    """The same values as float32 arithmetic with subnormal numbers gives, in units of UNIT: float64."""
    if segment.count == 0:
        return tf.zeros([0], tf.float64)
    scheme = segment.scheme
    norm_bytes = _norm_bytes(payload, segment)
    bits = tf.bitcast(norm_bytes, tf.uint32)
    magnitude = tf.cast(_magnitude(bits), tf.float64)  # of a subnormal number, in units
    negative = tf.bitwise.right_shift(bits, tf.constant(31, tf.uint32)) > 0
    normal = tf.cast(tf.bitcast(norm_bytes, tf.float32), tf.float64) / UNIT
    subnormal = tf.where(negative, -magnitude, magnitude)
    norms = tf.where(magnitude < 2.0**MANTISSA_BITS, subnormal, normal)[:, tf.newaxis]
    codes = _codes(payload, segment)
    if scheme.spacing == "exponential":
        values = _round_to_float32(tf.cast(_powers(codes, scheme), tf.float64) * norms)
    else:
        # The scaled-up values of tiny norms are rounded like normal numbers, before they are scaled down.
        tiny = tf.abs(norms) < TINY_NORM / UNIT
        steps = norms / scheme.num_levels
        steps = tf.where(tiny, _as_float32(steps), _as_float32(steps * UNIT) / UNIT)
        values = tf.cast(codes, tf.float64) * steps
        values = _round_to_float32(tf.where(tiny, _as_float32(values), values))
    return tf.reshape(values, [-1])[: segment.count]


def _narrow(total: tf.Tensor, weight: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The weighted sum as it is returned."""
    return tf.cast(total * weight, dtype)


def _narrow_exact(total: tf.Tensor, weight: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The same for `_exact_values`."""
    result = _round_to_float32(total * tf.cast(weight, tf.float64))
    if dtype == tf.float64:
        return result * UNIT
    # No conversion makes subnormal numbers, so their bits are put together.
    sign = tf.bitwise.left_shift(
        tf.cast(tf.bitwise.right_shift(tf.bitcast(result, tf.uint64), tf.constant(63, tf.uint64)), tf.uint32),
        tf.constant(31, tf.uint32),
    )
    is_subnormal = tf.abs(result) < 2.0**MANTISSA_BITS
    magnitude = tf.cast(tf.where(is_subnormal, tf.abs(result), 0.0), tf.uint32)
    subnormal = tf.bitcast(tf.bitwise.bitwise_or(magnitude, sign), tf.float32)
    return tf.cast(tf.where(is_subnormal, subnormal, tf.cast(result * UNIT, tf.float32)), dtype)


def _round_to_float32(values: tf.Tensor) -> tf.Tensor:
    """Float64 numbers, in units of UNIT, rounded to what float32 has."""
    return tf.where(tf.abs(values) < 2.0**MANTISSA_BITS, tf.round(values), _as_float32(values * UNIT) / UNIT)


def _as_float32(values: tf.Tensor) -> tf.Tensor:
    """Float64 numbers rounded to normal ones of float32."""
    return tf.cast(tf.cast(values, tf.float32), tf.float64)


def _norm_bytes(payload: tf.Tensor, segment: Segment) -> tf.Tensor:
    """The norms' bytes of payloads, uint8 of shape (..., buckets, 4)."""
    end = wire.HEADER_SIZE + wire.norms_size(segment.scheme, segment.count)
    return tf.reshape(
        payload[..., wire.HEADER_SIZE : end], [*_leading(payload), (end - wire.HEADER_SIZE) // 4, 4]
    )


def _leading(tensor: tf.Tensor) -> list[int]:
    return [] if tensor.shape.rank == 1 else [-1]


def _codes(payload: tf.Tensor, segment: Segment) -> tf.Tensor:
    """A payload's codes, int8 of shape (buckets, values), the last bucket filled up."""
    scheme, count = segment.scheme, segment.count
    begin = wire.HEADER_SIZE + wire.norms_size(scheme, count)
    codes = _unpack(payload[begin : begin + wire.codes_size(scheme, count)], scheme.bits)
    bucket_size = min(scheme.bucket_size, count)
    return tf.reshape(_fit(codes, -(-count // bucket_size) * bucket_size), [-1, bucket_size])


def _powers(codes: tf.Tensor, scheme: Scheme) -> tf.Tensor:
    """sign(c) * 2^(|c| - steps) for every code c, 0 for 0: float32."""
    every = np.arange(256).astype(np.uint8).view(np.int8).astype(np.int32)
    powers = np.sign(every) * np.exp2(
        np.minimum(np.abs(every), 2 ** (scheme.bits - 1)) - float(scheme.num_levels)
    )
    return tf.gather(tf.constant(powers, tf.float32), tf.cast(tf.bitcast(codes, tf.uint8), tf.int32))


def _assemble(
    layout: MessageLayout, tensor: int, parts: Sequence[tf.Tensor], dtype: tf.DType, count: int
) -> tf.Tensor:
    """A tensor of ``count`` values from those of its segments."""
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
    """What is wrong with each of n messages: int64 of shape (n,), 0 where nothing is."""
    expected = np.frombuffer(layout.preamble, np.int64)
    found = [tf.reduce_any(_words64(messages[:, :PREAMBLE_SIZE]) != expected, 1)]
    others: list[list[tf.Tensor]] = [[], [], []]
    compared = np.full(wire.HEADER_SIZE, 0xFF, np.uint8)
    compared[4 * wire.CHECKSUM_WORD : 4 * wire.CHECKSUM_WORD + 4] = 0
    compared = compared.view(np.int64)
    for segment, offset, header in zip(layout.segments, layout.offsets, layout.headers, strict=True):
        payload = messages[:, offset : offset + segment.payload_size]
        words = _words64(payload[:, : wire.HEADER_SIZE])
        differs = tf.bitwise.bitwise_and(words, compared) != header.view(np.int64) & compared
        half, is_high = divmod(wire.CHECKSUM_WORD, 2)
        stated = tf.bitwise.right_shift(words[:, half], tf.constant(32 * is_high, tf.int64))
        stated = tf.bitwise.bitwise_and(stated, tf.constant(MASK32, tf.int64))
        used = wire.used_size(segment.scheme, segment.count)
        others[0].append(tf.reduce_any(differs, 1))
        others[1].append(_checksum(payload[:, wire.HEADER_SIZE :], header) != stated)
        others[2].append(tf.reduce_any(payload[:, used:] != 0, 1))
    if layout.segments:
        found += [tf.reduce_any(tf.stack(kind), 0) for kind in others]
    numbers = tf.zeros_like(found[0], tf.int64)
    for place, is_wrong in reversed(list(enumerate(found, 1))):
        numbers = tf.where(is_wrong, tf.constant(place, tf.int64), numbers)
    return numbers


def _assertion(found: tf.Tensor) -> tf.Operation | None:
    """Fails if problems were found, and names the first message that has one."""
    with tf.device("/CPU:0"):
        number = tf.argmax(tf.cast(found > 0, tf.int64))
        what = tf.gather(tf.constant(_PROBLEMS), found[number])
        text = tf.strings.join(["message ", tf.strings.as_string(number), " ", what])
        return tf.debugging.Assert(tf.reduce_all(found == 0), [text])


def _may_be_subnormal(messages: tf.Tensor, layout: MessageLayout) -> tf.Tensor:
    """Whether a norm is so small, and not 0, that decoding may meet a subnormal number; a scalar."""
    found = [tf.constant(False)]
    for segment, offset in zip(layout.segments, layout.offsets, strict=True):
        if segment.count == 0:
            continue
        payloads = messages[:, offset : offset + segment.payload_size]
        steps = segment.scheme.num_levels
        ratio = steps if segment.scheme.spacing == "uniform" else 2.0 ** (steps - 1)
        safe = np.float32(SAFE_VALUE * ratio).view(np.uint32)
        # Compared as the numbers that their bits are, because a subnormal float would be a zero.
        bits = tf.cast(_magnitude(tf.bitcast(_norm_bytes(payloads, segment), tf.uint32)), tf.float64)
        found.append(tf.reduce_any((bits > 0) & (bits < float(safe))))
    return tf.reduce_any(tf.stack(found))


def _magnitude(bits: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_and(bits, tf.constant(2**31 - 1, tf.uint32))


def _checksum(bodies: tf.Tensor, header: np.ndarray) -> tf.Tensor:
    """The checksums of payloads with these bodies, int64 of shape (n,), and this header.

    A sum of fewer than 2^21 numbers below 2^32 is exact in float64, whose sums every device has.
    """
    rows = max(1, -(-bodies.shape[1] // (4 * CHECKSUM_ROW)))
    words = tf.bitcast(
        tf.reshape(_fit(bodies, 4 * CHECKSUM_ROW * rows), [-1, rows, CHECKSUM_ROW, 4]), tf.uint32
    )
    # Made in parts that are small where the host makes them.
    row = tf.range(rows, dtype=tf.int64)[:, tf.newaxis] * (2 * CHECKSUM_ROW)
    weights = row + (2 * np.arange(wire.FIRST_BODY_WORD, wire.FIRST_BODY_WORD + CHECKSUM_ROW) + 1)
    mask = tf.constant(MASK32, tf.int64)
    products = tf.bitwise.bitwise_and(tf.cast(words, tf.int64) * weights, mask)
    sums = tf.cast(tf.reduce_sum(tf.cast(products, tf.float64), 2), tf.int64)
    total = tf.reduce_sum(tf.cast(tf.bitwise.bitwise_and(sums, mask), tf.float64), 1)
    own = int(header.view(np.uint32)[wire.CHECKSUM_WORD])
    return tf.bitwise.bitwise_and(tf.cast(total, tf.int64) + own, mask)


# --- bytes ----------------------------------------------------------------------------------------------


def _words64(data: tf.Tensor) -> tf.Tensor:
    """Bytes as int64, of shape (n, words)."""
    return tf.bitcast(tf.reshape(data, [-1, data.shape[1] // 8, 8]), tf.int64)


def _fit(values: tf.Tensor, size: int) -> tf.Tensor:
    """The first ``size`` of the last axis, filled up with zeros."""
    missing = size - values.shape[-1]
    if missing == 0:
        return values
    if missing < 0:
        return values[..., :size]
    zeros = tf.zeros(tf.concat([tf.shape(values)[:-1], [missing]], 0), values.dtype)
    return tf.concat([values, zeros], -1)


def _pack(codes: tf.Tensor, bits: int, count: int) -> tf.Tensor:
    """The first ``count`` codes, value i in bits [i * bits, (i + 1) * bits); unused bits are 0."""
    size = -(-count * bits // 8)
    fields = _fit(tf.bitcast(codes, tf.uint8), count)
    if bits == 8:
        return fields
    fields = tf.bitwise.bitwise_and(fields, tf.constant(2**bits - 1, tf.uint8))
    together, kind = (8 // bits, tf.uint8) if 8 % bits == 0 else (8, tf.int64)
    fields = tf.reshape(_fit(fields, -(-count // together) * together), [-1, together])
    word = tf.cast(fields[:, 0], kind)
    for place in range(1, together):
        shift = tf.constant(bits * place, kind)
        word = tf.bitwise.bitwise_or(word, tf.bitwise.left_shift(tf.cast(fields[:, place], kind), shift))
    if kind == tf.int64:
        word = tf.reshape(tf.bitcast(word, tf.uint8)[:, :bits], [-1])
    return _fit(word, size)


def _unpack(packed: tf.Tensor, bits: int) -> tf.Tensor:
    """The inverse of `_pack`: int8, with whatever fills up the last bytes."""
    if bits == 8:
        return tf.bitcast(packed, tf.int8)
    if 8 % bits == 0:
        together, word = 8 // bits, packed
    else:
        together = 8
        octets = tf.reshape(_fit(packed, -(-packed.shape[0] // bits) * bits), [-1, bits])
        word = tf.bitcast(_fit(octets, 8), tf.int64)
    width = 8 * word.dtype.size
    # Up to the sign, then down again, which copies it.
    up = tf.constant([width - bits * (place + 1) for place in range(together)], word.dtype)
    lifted = tf.bitwise.left_shift(word[:, tf.newaxis], up)
    if word.dtype == tf.uint8:
        lifted = tf.bitcast(lifted, tf.int8)
    codes = tf.bitwise.right_shift(lifted, tf.constant(width - bits, lifted.dtype))
    return tf.reshape(tf.cast(codes, tf.int8), [-1])
