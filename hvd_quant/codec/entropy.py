"""Entropy coding of payloads: packed codes <-> Elias or Huffman codes, lossless, in CPU memory.

Both backends quantize to, and decode from, packed payloads; this stage is between those and the wire.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hvd_quant import wire
from hvd_quant.codec.extension import _native
from hvd_quant.schemes import CODINGS, Scheme


def packed(scheme: Scheme) -> Scheme:
    """Return the scheme of the packed payload that an entropy-coded one is made from."""
    return replace(scheme, coding="packed")


def entropy_encode(payload: np.ndarray, scheme: Scheme, count: int) -> np.ndarray:
    """Entropy-code a packed payload.

    Args:
        payload: ``count`` values of ``packed(scheme)``, contiguous uint8. Its header is not read.
        scheme: a scheme whose coding is not ``"packed"``.
        count: number of values.

    Returns:
        The entropy-coded payload, uint8, of at most ``wire.max_payload_size(scheme, count)`` bytes.
    """
    coded, checksum = _native.entropy_encode(
        payload[wire.HEADER_SIZE :],
        count=count,
        bucket_size=scheme.bucket_size,
        bits=scheme.bits,
        coding=CODINGS.index(scheme.coding),
        first_word=wire.FIRST_BODY_WORD,
        head=wire.HEADER_SIZE,
    )
    coded[: wire.HEADER_SIZE] = np.frombuffer(wire.pack_header(scheme, count, checksum), np.uint8)
    return coded


def entropy_decode(payload: np.ndarray, header: wire.Header) -> np.ndarray:
    """Undo `entropy_encode`, and check the whole payload.

    Args:
        payload: contiguous uint8.
        header: its header, whose coding is not ``"packed"``.

    Returns:
        The packed payload, with zeros in place of its header.

    Raises:
        ValueError: the payload is damaged.
    """
    expanded, size = entropy_decode_first(payload, header)
    if size != payload.size:
        raise ValueError(f"payload is damaged: it has {payload.size} bytes, but its codes end after {size}")
    return expanded


def entropy_decode_first(payloads: np.ndarray, header: wire.Header) -> tuple[np.ndarray, int]:
    """Like `entropy_decode`, for a payload that others may follow.

    Returns:
        The packed payload, and the number of bytes that the entropy-coded one takes.

    Raises:
        ValueError: it is damaged.
    """
    expanded, checksum, size = _native.entropy_decode(
        payloads[wire.HEADER_SIZE :],
        count=header.count,
        bucket_size=header.scheme.bucket_size,
        bits=header.scheme.bits,
        coding=CODINGS.index(header.scheme.coding),
        first_word=wire.FIRST_BODY_WORD,
        head=wire.HEADER_SIZE,
    )
    size += wire.HEADER_SIZE
    if size < wire.min_payload_size(header.scheme, header.count):
        raise ValueError("payload is damaged: it is too short for its values")
    wire.check_body(header, checksum)
    return expanded, size
