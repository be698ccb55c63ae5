"""Rounding to levels and back, in TensorFlow operations.

TensorFlow's kernels flush subnormal float32 values to zero, on CPUs and GPUs. Encoding does likewise.
Decoding does not: where a result may depend on subnormal numbers, it is computed in float64.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from hvd_quant import wire
from hvd_quant.codec.message import MessageLayout, Segment
from hvd_quant.codec.noise import FRACTION_BITS
from hvd_quant.codec.tf_bytes import fit, unpack
from hvd_quant.schemes import Scheme

# See docs/wire-format.md: below TINY_NORM, the arithmetic is done on values scaled by TINY_PRESCALE.
TINY_NORM = 2.0**-90
TINY_PRESCALE = 2.0**60
MANTISSA_BITS = 23  # float32
SMALLEST_NORMAL = 2.0**-126
UNIT = 2.0**-149  # the smallest float32 above 0
# If no value but 0 is smaller than SAFE_VALUE, and the weight is not smaller than SAFE_WEIGHT, no sum and no
# weighted sum is subnormal: a value is a multiple of 2^-24 of itself, rounded down to a power of two.
SAFE_VALUE = 2.0**-86
TOP_POWER = 2.0**24  # norms are scaled to it before rounding to powers: nothing near it is subnormal


@tf.autograph.experimental.do_not_convert
def step_seeds(base: np.ndarray, use: tf.Tensor) -> tf.Tensor:
    """Return seeds for `encode_message`, those of `hvd_quant.codec.native.step_seeds`.

    Args:
        base: noise stream of each segment, uint64 of shape (segments,).
        use: how often the message has been encoded before, an int64 scalar.

    Returns:
        int64 of shape (segments,), well mixed.
    """
    with tf.device("/CPU:0"):
        step = _mix64(tf.bitcast(use, tf.uint64) + tf.constant(1, tf.uint64))
        return tf.bitcast(_mix64(tf.bitwise.bitwise_xor(tf.constant(base, tf.uint64), step)), tf.int64)


def _mix64(x: tf.Tensor) -> tf.Tensor:
    """Return the finalizer of splitmix64, of uint64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        shifted = tf.bitwise.right_shift(x, tf.constant(shift, tf.uint64))
        x = tf.bitwise.bitwise_xor(x, shifted) * tf.constant(factor, tf.uint64)
    return x


def quantize(values: tf.Tensor, scheme: Scheme, seed: tf.Tensor, shift: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return norms (float32, one per bucket) and codes (int8, one per value, the last bucket padded)."""
    count = values.shape[0]
    bucket_size = min(scheme.bucket_size, count)
    filled = fit(tf.cast(values, tf.float32), -(-count // bucket_size) * bucket_size)
    x = tf.reshape(filled, [-1, bucket_size])
    if scheme.norm == "max":
        # Whether a maximum is NaN if a value is depends on the device.
        norms = tf.where(tf.reduce_all(tf.math.is_finite(x), 1), tf.reduce_max(tf.abs(x), 1), math.nan)
    else:
        norms = tf.cast(tf.sqrt(tf.reduce_sum(tf.square(tf.cast(x, tf.float64)), 1)), tf.float32)
    norms = tf.where(norms < math.inf, norms, math.nan)
    norms = tf.where(norms < SMALLEST_NORMAL, 0.0, norms)
    # Powers of two that keep everything far from float32's limits.
    prescale = tf.where(
        norms < TINY_NORM, TINY_PRESCALE, tf.where(norms < TINY_PRESCALE, 1.0, 1.0 / TINY_PRESCALE)
    )
    # An all-zero bucket is divided by 1, a non-finite one gets codes of 0.
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
    """Split values in units of a level: the level below, and the fraction of the way to the next one."""
    floor = tf.floor(scaled)
    return floor, scaled - floor, None


def _split_powers(scaled: tf.Tensor, steps: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """Split values in units of 1 / TOP_POWER of the norm between powers of two, by their magnitudes.

    As the native codec: the mantissa of a float is the probability of rounding it up to the next power.
    Below the lowest power, value + power has that mantissa. Also returns which values are negative.
    """
    lowest = TOP_POWER * 2.0 ** (1 - steps)
    magnitude = tf.abs(scaled)
    below = magnitude < lowest
    bits = tf.bitcast(tf.where(below, magnitude + lowest, magnitude), tf.uint32)
    mantissa = tf.bitwise.bitwise_and(bits, tf.constant(2**MANTISSA_BITS - 1, tf.uint32))
    exponent = tf.cast(tf.bitwise.right_shift(bits, tf.constant(MANTISSA_BITS, tf.uint32)), tf.float32)
    level = exponent - (126.0 + math.log2(lowest)) - tf.cast(below, tf.float32)
    return level, tf.cast(mantissa, tf.float32) * 2.0**-MANTISSA_BITS, scaled < 0


def values_of(payload: tf.Tensor, segment: Segment) -> tf.Tensor:
    """Return a payload's values, float32 of shape (count,)."""
    if segment.count == 0:
        return tf.zeros([0], tf.float32)
    scheme = segment.scheme
    norms = tf.bitcast(norm_bytes(payload, segment), tf.float32)[:, tf.newaxis]
    codes = codes_of(payload, segment)
    values = _powers(codes, scheme) if scheme.spacing == "exponential" else tf.cast(codes, tf.float32)
    if scheme.spacing == "uniform":
        # In float64: no graph rewrite of this division changes its float32.
        norms = tf.cast(tf.cast(norms, tf.float64) / scheme.num_levels, tf.float32)
    return tf.reshape(values * norms, [-1])[: segment.count]


def exact_values_of(payload: tf.Tensor, segment: Segment) -> tf.Tensor:
    """Return the same values as exact float32 arithmetic gives, in units of UNIT: float64."""
    if segment.count == 0:
        return tf.zeros([0], tf.float64)
    scheme = segment.scheme
    stored = norm_bytes(payload, segment)
    bits = tf.bitcast(stored, tf.uint32)
    units = tf.cast(magnitude(bits), tf.float64)  # of subnormal numbers
    negative = tf.bitwise.right_shift(bits, tf.constant(31, tf.uint32)) > 0
    normal = tf.cast(tf.bitcast(stored, tf.float32), tf.float64) / UNIT
    subnormal = tf.where(negative, -units, units)
    norms = tf.where(units < 2.0**MANTISSA_BITS, subnormal, normal)[:, tf.newaxis]
    codes = codes_of(payload, segment)
    if scheme.spacing == "exponential":
        values = round_to_float32(tf.cast(_powers(codes, scheme), tf.float64) * norms)
    else:
        # The scaled-up values of tiny norms are rounded like normal numbers, before they are scaled down.
        tiny = tf.abs(norms) < TINY_NORM / UNIT
        steps = norms / scheme.num_levels
        steps = tf.where(tiny, as_float32(steps), as_float32(steps * UNIT) / UNIT)
        values = tf.cast(codes, tf.float64) * steps
        values = round_to_float32(tf.where(tiny, as_float32(values), values))
    return tf.reshape(values, [-1])[: segment.count]


def narrow(total: tf.Tensor, weight: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Convert the weighted sum to the result's dtype."""
    return tf.cast(total * weight, dtype)


def narrow_exact(total: tf.Tensor, weight: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Do the same for `exact_values_of`."""
    result = round_to_float32(total * tf.cast(weight, tf.float64))
    if dtype == tf.float64:
        return result * UNIT
    # No conversion makes subnormal numbers, so their bits are assembled.
    sign = tf.bitwise.left_shift(
        tf.cast(tf.bitwise.right_shift(tf.bitcast(result, tf.uint64), tf.constant(63, tf.uint64)), tf.uint32),
        tf.constant(31, tf.uint32),
    )
    is_subnormal = tf.abs(result) < 2.0**MANTISSA_BITS
    magnitude = tf.cast(tf.where(is_subnormal, tf.abs(result), 0.0), tf.uint32)
    subnormal = tf.bitcast(tf.bitwise.bitwise_or(magnitude, sign), tf.float32)
    return tf.cast(tf.where(is_subnormal, subnormal, tf.cast(result * UNIT, tf.float32)), dtype)


def round_to_float32(values: tf.Tensor) -> tf.Tensor:
    """Round float64 numbers, in units of UNIT, to float32's precision."""
    return tf.where(tf.abs(values) < 2.0**MANTISSA_BITS, tf.round(values), as_float32(values * UNIT) / UNIT)


def as_float32(values: tf.Tensor) -> tf.Tensor:
    """Round float64 numbers to normal ones of float32."""
    return tf.cast(tf.cast(values, tf.float32), tf.float64)


def norm_bytes(payload: tf.Tensor, segment: Segment) -> tf.Tensor:
    """Return the norms' bytes of payloads, uint8 of shape (..., buckets, 4)."""
    end = wire.HEADER_SIZE + wire.norms_size(segment.scheme, segment.count)
    return tf.reshape(
        payload[..., wire.HEADER_SIZE : end], [*leading(payload), (end - wire.HEADER_SIZE) // 4, 4]
    )


def leading(tensor: tf.Tensor) -> list[int]:
    return [] if tensor.shape.rank == 1 else [-1]


def codes_of(payload: tf.Tensor, segment: Segment) -> tf.Tensor:
    """Return a payload's codes, int8 of shape (buckets, values), the last bucket padded."""
    scheme, count = segment.scheme, segment.count
    begin = wire.HEADER_SIZE + wire.norms_size(scheme, count)
    codes = unpack(payload[begin : begin + wire.codes_size(scheme, count)], scheme.bits)
    bucket_size = min(scheme.bucket_size, count)
    return tf.reshape(fit(codes, -(-count // bucket_size) * bucket_size), [-1, bucket_size])


def _powers(codes: tf.Tensor, scheme: Scheme) -> tf.Tensor:
    """Return sign(c) * 2^(|c| - steps) for every code c, 0 for 0: float32."""
    every = np.arange(256).astype(np.uint8).view(np.int8).astype(np.int32)
    powers = np.sign(every) * np.exp2(
        np.minimum(np.abs(every), 2 ** (scheme.bits - 1)) - float(scheme.num_levels)
    )
    return tf.gather(tf.constant(powers, tf.float32), tf.cast(tf.bitcast(codes, tf.uint8), tf.int32))


def may_be_subnormal(messages: tf.Tensor, layout: MessageLayout) -> tf.Tensor:
    """Return whether a norm is so small, and not 0, that decoding may meet a subnormal number; a scalar."""
    found = [tf.constant(False)]
    for segment, offset in zip(layout.segments, layout.offsets, strict=True):
        if segment.count == 0:
            continue
        payloads = messages[:, offset : offset + segment.payload_size]
        steps = segment.scheme.num_levels
        ratio = steps if segment.scheme.spacing == "uniform" else 2.0 ** (steps - 1)
        safe = np.float32(SAFE_VALUE * ratio).view(np.uint32)
        # Compared as integers, because a subnormal float would compare as zero.
        bits = tf.cast(magnitude(tf.bitcast(norm_bytes(payloads, segment), tf.uint32)), tf.float64)
        found.append(tf.reduce_any((bits > 0) & (bits < float(safe))))
    return tf.reduce_any(tf.stack(found))


def magnitude(bits: tf.Tensor) -> tf.Tensor:
    return tf.bitwise.bitwise_and(bits, tf.constant(2**31 - 1, tf.uint32))
