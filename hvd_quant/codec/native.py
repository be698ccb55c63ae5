"""The native codec on NumPy arrays: the C++ kernels in csrc/."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from hvd_quant import wire
from hvd_quant.codec import entropy
from hvd_quant.codec.extension import _native
from hvd_quant.codec.message import (
    DTYPES,
    OFFSET_COLUMN,
    PREAMBLE_SIZE,
    SIZE_SIZE,
    SOMETHING_ELSE,
    MessageLayout,
    Messages,
    Segment,
)
from hvd_quant.codec.noise import Noise
from hvd_quant.schemes import Scheme

__all__ = [
    "DTYPES",
    "add_error",
    "decode_mean",
    "decode_messages",
    "empty",
    "encode",
    "encode_message",
    "mean_float32",
    "pack_float32",
    "step_seeds",
    "threads",
]

_CACHE_LINE = 64


def threads() -> int:
    """Return how many threads a call may use: ``HVD_QUANT_THREADS``, by default 1, as ranks share the cores.

    Raises:
        ValueError: the variable is set to something other than a positive integer.
    """
    text = os.environ.get("HVD_QUANT_THREADS", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"HVD_QUANT_THREADS must be a positive integer, not {text!r}")
    return int(text)


def encode(
    values: np.ndarray,
    scheme: Scheme,
    seed: int,
    shift: int = 0,
    *,
    residual: np.ndarray | None = None,
    dtype: str | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Encode a contiguous one-dimensional array.

    Args:
        values: one of `DTYPES`; bfloat16, which NumPy lacks, as its 16-bit patterns with ``dtype`` given.
        scheme: how the values are quantized.
        seed: seed of the rounding noise, 0 to 2^64 - 1. The same input, scheme and seed give the same payload
            on every machine.
        shift: offset of the noise, see `hvd_quant.codec.noise`.
        residual: for error feedback, a contiguous float32 array as large as ``values``. It is added to them,
            and then set to the quantization error of the sum; where that is not finite, it is left unchanged.
        dtype: dtype of the items of ``values``, where their own does not say it.
        out: output buffer; contiguous one-dimensional uint8 of ``wire.max_payload_size(scheme, values.size)``
            bytes, or more where its codes are not packed. By default a new one.

    Returns:
        The payload, uint8 of at most ``wire.max_payload_size(scheme, values.size)`` bytes, and exactly as
        many where its codes are packed; with ``out``, a view of what has been written.
    """
    if scheme.coding != "packed" and out is None:
        packed = encode(values, entropy.packed(scheme), seed, shift, residual=residual, dtype=dtype)
        return entropy.entropy_encode(packed, scheme, values.size)
    if scheme.coding != "packed":
        return out[: _encode_coded(values, scheme, seed, shift, residual, dtype or values.dtype.name, out)]
    payload = np.empty(wire.payload_size(scheme, values.size), np.uint8) if out is None else out
    checksum = _native.encode(
        values,
        dtype=dtype or values.dtype.name,
        bits=scheme.bits,
        norm=scheme.norm,
        spacing=scheme.spacing,
        bucket_size=scheme.bucket_size,
        seed=seed,
        shift=shift,
        nearest=scheme.rounding == "nearest",
        first_word=wire.FIRST_BODY_WORD,
        body=payload[wire.HEADER_SIZE :],
        residual=residual,
        threads=threads(),
    )
    header = wire.pack_header(scheme, values.size, checksum)
    payload[: wire.HEADER_SIZE] = np.frombuffer(header, np.uint8)
    return payload


def _encode_coded(
    values: np.ndarray,
    scheme: Scheme,
    seed: int,
    shift: int,
    residual: np.ndarray | None,
    dtype: str,
    out: np.ndarray,
) -> int:
    """Write an entropy-coded payload to a buffer of the largest size, and return its size."""
    layout = MessageLayout([Segment(0, 0, values.size, dtype, scheme)], bytes(PREAMBLE_SIZE))
    table = layout.table.copy()
    table[:, OFFSET_COLUMN] = 0  # there is no preamble before the payload
    return _native.encode_segments(
        [values],
        table,
        layout.headers,
        np.array([seed], np.uint64),
        np.array([shift], np.uint32),
        first_word=wire.FIRST_BODY_WORD,
        checksum_word=wire.CHECKSUM_WORD,
        message=out,
        residuals=[] if residual is None else [residual],
        threads=threads(),
    )


def decode_mean(
    payloads: Sequence[np.ndarray],
    out: np.ndarray | None = None,
    *,
    dtype: str | None = None,
    factor: float = 1.0,
) -> np.ndarray:
    """Decode n payloads of the same scheme and count into ``factor`` times their mean, in one pass.

    Args:
        payloads: contiguous one-dimensional uint8 arrays.
        out: output; a contiguous one-dimensional array of one of `DTYPES`. By default a new float32 one.
        dtype: dtype of the items of ``out``, where their own does not say it.
        factor: multiplies the mean.

    Returns:
        ``out``.

    Raises:
        ValueError: a payload is damaged (``out`` is then undefined), or they differ.
    """
    headers = [wire.parse_header(payload[: wire.HEADER_SIZE], payload.size) for payload in payloads]
    header = wire.common_header(headers)
    if out is not None and not out.dtype.isnative:
        raise ValueError(f"out must be in this machine's byte order, not {out.dtype}")
    if out is not None:
        wire.check_count(header, out.size)
    is_coded = header.scheme.coding != "packed"
    if is_coded:
        payloads = [entropy.entropy_decode(*pair) for pair in zip(payloads, headers, strict=True)]
    if out is None:
        out = np.empty(header.count, np.float32)
    checksums = _native.decode_sum(
        [payload[wire.HEADER_SIZE :] for payload in payloads],
        bucket_size=header.scheme.bucket_size,
        bits=header.scheme.bits,
        spacing=header.scheme.spacing,
        weight=factor / len(payloads),
        first_word=wire.FIRST_BODY_WORD,
        out=out,
        dtype=dtype or out.dtype.name,
        threads=threads(),
    )
    if not is_coded:  # entropy-coded ones have been compared already
        for one, checksum in zip(headers, checksums, strict=True):
            wire.check_body(one, checksum)
    return out


def empty(count: int, dtype: str, like: np.ndarray) -> np.ndarray:
    """Allocate a buffer aligned to a cache line: TensorFlow shares only such memory."""
    size = count * np.dtype(dtype).itemsize
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    begin = -memory.__array_interface__["data"][0] % _CACHE_LINE
    return memory[begin : begin + size].view(dtype)


def step_seeds(base: np.ndarray, tensors: np.ndarray, uses: np.ndarray) -> np.ndarray:
    """Return seeds of `Noise` for `encode_message`.

    Args:
        base: noise stream of each segment, uint64 of shape (segments,).
        tensors: tensor of each segment, int64 of shape (segments,).
        uses: how often each tensor has been encoded before, uint64 of shape (tensors,).

    Returns:
        uint64 of shape (segments,), well mixed.
    """
    return _native.step_seeds(base, tensors, uses)


def encode_message(
    values: Sequence[np.ndarray],
    layout: MessageLayout,
    noise: Noise,
    message: np.ndarray,
    residuals: Sequence[np.ndarray] = (),
) -> int:
    """Encode all segments of a message.

    Args:
        values: contiguous arrays that the segments are ranges of, of any shape. Their dtypes are those of the
            segments.
        layout: layout of the message.
        noise: noise of its segments.
        message: output; contiguous uint8 of shape (layout.size,).
        residuals: for error feedback, one per array, as in `encode`; or empty.

    Returns:
        The message's size, ``layout.size`` unless it varies.
    """
    message[:PREAMBLE_SIZE] = np.frombuffer(layout.preamble, np.uint8)
    size = _native.encode_segments(
        values,
        layout.table,
        layout.headers,
        noise.seeds,
        noise.shifts,
        first_word=wire.FIRST_BODY_WORD,
        checksum_word=wire.CHECKSUM_WORD,
        message=message,
        residuals=residuals,
        threads=threads(),
    )
    if not layout.varies:
        return layout.size
    message[PREAMBLE_SIZE : PREAMBLE_SIZE + SIZE_SIZE] = np.frombuffer(
        size.to_bytes(SIZE_SIZE, "little"), np.uint8
    )
    return size


def decode_messages(
    messages: Sequence[np.ndarray], layout: MessageLayout, out: Sequence[np.ndarray], factor: float = 1.0
) -> None:
    """Decode n messages of the same layout into ``factor`` times their mean.

    Args:
        messages: contiguous uint8 arrays of shape (layout.size,), or of any if that varies. Errors name
            ranks where these are `Messages` that know them.
        layout: layout of each message.
        out: output arrays, like ``values`` of `encode_message`.
        factor: multiplies the mean.

    Raises:
        ValueError: a message is damaged, or not of this layout; ``out`` may then hold anything.
    """
    messages = _expected(messages, layout.fixed_size, layout.preamble)
    try:
        _native.decode_segments(
            messages,
            layout.table,
            layout.headers,
            first_word=wire.FIRST_BODY_WORD,
            checksum_word=wire.CHECKSUM_WORD,
            weight=factor / len(messages),
            outs=out,
            threads=threads(),
        )
    except ValueError as error:
        raise ValueError(messages.name_in(str(error))) from None


def _expected(messages: Sequence[np.ndarray], size: int | None, preamble: bytes) -> Messages:
    """Return the messages after a check of their sizes and preambles.

    Raises:
        ValueError: a size or preamble differs.
    """
    if not isinstance(messages, Messages):
        messages = Messages(messages)
    messages.check_sizes(size)
    for number, message in enumerate(messages):
        if message[:PREAMBLE_SIZE].tobytes() != preamble:
            raise ValueError(f"{messages.name(number)} {SOMETHING_ELSE}")
    return messages


def add_error(residual: np.ndarray, lost: np.ndarray, times: int) -> None:
    """Error feedback of a mean: add ``times`` its quantization error, where the sum is finite.

    Args:
        residual: float32, changed in place.
        lost: float32 of the same shape.
        times: number of ranks that the mean is over.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        kept = residual + np.float32(times) * lost
    np.copyto(residual, kept, where=np.isfinite(kept))


def pack_float32(
    values: Sequence[np.ndarray],
    layout: MessageLayout,
    preamble: bytes,
    out: np.ndarray,
    residuals: Sequence[np.ndarray] = (),
) -> None:
    """Write a preamble, and then the values of a layout's segments as float32, back to back.

    Args:
        values: the layout's tensors; bfloat16 as 16-bit patterns.
        layout: selects the values.
        preamble: `PREAMBLE_SIZE` bytes.
        out: output, uint8 of PREAMBLE_SIZE + 4 * layout.count.
        residuals: residuals of error feedback, flat float32, or empty. They are added to the values, and set
            to 0 in the quantization buckets in which all sums are finite. A segment begins with a bucket.
    """
    out[:PREAMBLE_SIZE] = np.frombuffer(preamble, np.uint8)
    floats, end = out[PREAMBLE_SIZE:].view(np.float32), 0
    for segment in layout.segments:
        place = slice(segment.start, segment.start + segment.count)
        part, target = values[segment.tensor].reshape(-1)[place], floats[end : end + segment.count]
        with np.errstate(over="ignore", invalid="ignore"):
            if segment.dtype == "bfloat16":
                np.left_shift(part.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
            else:
                np.copyto(target, part, casting="same_kind")
            if residuals:
                residual = residuals[segment.tensor][place]
                target += residual
                sent = np.isfinite(target)
                if not sent.all():
                    size = segment.scheme.bucket_size
                    buckets = np.logical_and.reduceat(sent, range(0, segment.count, size))
                    sent = np.repeat(buckets, size)[: segment.count]
                np.copyto(residual, np.float32(0), where=sent)
        end += segment.count


def mean_float32(parts: Sequence[np.ndarray], preamble: bytes, out: np.ndarray) -> None:
    """Write the mean of what `pack_float32` has written on several ranks.

    Args:
        parts: parts of all ranks, uint8.
        preamble: the preamble that they must begin with.
        out: output, float32, of as many values.

    Raises:
        ValueError: a part's size or preamble differs.
    """
    parts = _expected(parts, PREAMBLE_SIZE + 4 * out.size, preamble)
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, parts[0][PREAMBLE_SIZE:].view(np.float32))
        for part in parts[1:]:
            out += part[PREAMBLE_SIZE:].view(np.float32)
        out *= np.float32(1 / len(parts))
