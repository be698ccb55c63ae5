"""Packing of codes, and checksums, in TensorFlow operations."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from hvd_quant import wire

CHECKSUM_ROW = 1024  # words that are summed at a time
MASK32 = 2**32 - 1


def constant(data: bytes | np.ndarray) -> tf.Tensor:
    return tf.constant(np.frombuffer(bytes(data), np.uint8))


def checksum(bodies: tf.Tensor, header: np.ndarray) -> tf.Tensor:
    """Return the checksums of payloads with these bodies and this header, int64 of shape (n,).

    A sum of fewer than 2^21 numbers below 2^32 is exact in float64, which every device can sum.
    """
    rows = max(1, -(-bodies.shape[1] // (4 * CHECKSUM_ROW)))
    words = tf.bitcast(
        tf.reshape(fit(bodies, 4 * CHECKSUM_ROW * rows), [-1, rows, CHECKSUM_ROW, 4]), tf.uint32
    )
    # Computed from small parts, which the host makes.
    row = tf.range(rows, dtype=tf.int64)[:, tf.newaxis] * (2 * CHECKSUM_ROW)
    weights = row + (2 * np.arange(wire.FIRST_BODY_WORD, wire.FIRST_BODY_WORD + CHECKSUM_ROW) + 1)
    mask = tf.constant(MASK32, tf.int64)
    products = tf.bitwise.bitwise_and(tf.cast(words, tf.int64) * weights, mask)
    sums = tf.cast(tf.reduce_sum(tf.cast(products, tf.float64), 2), tf.int64)
    total = tf.reduce_sum(tf.cast(tf.bitwise.bitwise_and(sums, mask), tf.float64), 1)
    own = int(header.view(np.uint32)[wire.CHECKSUM_WORD])
    return tf.bitwise.bitwise_and(tf.cast(total, tf.int64) + own, mask)


def words64(data: tf.Tensor) -> tf.Tensor:
    """Convert bytes to int64 words, of shape (n, words)."""
    return tf.bitcast(tf.reshape(data, [-1, data.shape[1] // 8, 8]), tf.int64)


def fit(values: tf.Tensor, size: int) -> tf.Tensor:
    """Return the first ``size`` of the last axis, padded with zeros."""
    missing = size - values.shape[-1]
    if missing == 0:
        return values
    if missing < 0:
        return values[..., :size]
    zeros = tf.zeros(tf.concat([tf.shape(values)[:-1], [missing]], 0), values.dtype)
    return tf.concat([values, zeros], -1)


def pack(codes: tf.Tensor, bits: int, count: int) -> tf.Tensor:
    """Pack the first ``count`` codes, value i in bits [i * bits, (i + 1) * bits); unused bits are 0."""
    size = -(-count * bits // 8)
    fields = fit(tf.bitcast(codes, tf.uint8), count)
    if bits == 8:
        return fields
    fields = tf.bitwise.bitwise_and(fields, tf.constant(2**bits - 1, tf.uint8))
    together, kind = (8 // bits, tf.uint8) if 8 % bits == 0 else (8, tf.int64)
    fields = tf.reshape(fit(fields, -(-count // together) * together), [-1, together])
    word = tf.cast(fields[:, 0], kind)
    for place in range(1, together):
        shift = tf.constant(bits * place, kind)
        word = tf.bitwise.bitwise_or(word, tf.bitwise.left_shift(tf.cast(fields[:, place], kind), shift))
    if kind == tf.int64:
        word = tf.reshape(tf.bitcast(word, tf.uint8)[:, :bits], [-1])
    return fit(word, size)


def unpack(packed: tf.Tensor, bits: int) -> tf.Tensor:
    """Invert `pack`: int8, with undefined codes for the padding of the last bytes."""
    if bits == 8:
        return tf.bitcast(packed, tf.int8)
    if 8 % bits == 0:
        together, word = 8 // bits, packed
    else:
        together = 8
        octets = tf.reshape(fit(packed, -(-packed.shape[0] // bits) * bits), [-1, bits])
        word = tf.bitcast(fit(octets, 8), tf.int64)
    width = 8 * word.dtype.size
    # Up to the sign, then down again, which copies it.
    up = tf.constant([width - bits * (place + 1) for place in range(together)], word.dtype)
    lifted = tf.bitwise.left_shift(word[:, tf.newaxis], up)
    if word.dtype == tf.uint8:
        lifted = tf.bitcast(lifted, tf.int8)
    codes = tf.bitwise.right_shift(lifted, tf.constant(width - bits, lifted.dtype))
    return tf.reshape(tf.cast(codes, tf.int8), [-1])
