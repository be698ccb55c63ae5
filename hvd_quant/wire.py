"""Layout of a payload: a 32-byte header, then norms, codes and padding. docs/wire-format.md specifies it.

Only this module knows the header. The codec's backends write and read what follows it, the body.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hvd_quant.schemes import CODINGS, NORMS, SCHEMES, Scheme

MAGIC = b"HVDQ"
VERSION = 1
HEADER_SIZE = 32
CODES_HEAD_SIZE = 8  # bytes before codes that are not packed
MAX_VALUES_A_BYTE = 4096  # per byte of a payload whose codes are not packed
ALIGNMENT = 8  # payload sizes are multiples, so that consecutive payloads stay aligned

# Positions of 32-bit words in the payload, for the checksum.
CHECKSUM_WORD = 3
FIRST_BODY_WORD = HEADER_SIZE // 4

_SCHEMES = {scheme.wire_id: scheme for scheme in SCHEMES}

# magic, version, scheme, bits, norm, coding, 3 reserved bytes, checksum, bucket size, count
_HEADER = struct.Struct("<4sBBBBB3sIQQ")
_WORDS = struct.Struct("<8I")
_RESERVED = bytes(3)


@dataclass(frozen=True)
class Header:
    """Content of a header: scheme, count, and the body's checksum."""

    scheme: Scheme
    count: int
    body_checksum: int


def norms_size(scheme: Scheme, count: int) -> int:
    """Return the bytes of the norms of ``count`` values: one float32 per bucket."""
    return 4 * -(-count // scheme.bucket_size)


def codes_size(scheme: Scheme, count: int) -> int:
    """Return the bytes of the packed codes of ``count`` values, without padding."""
    return -(-count * scheme.bits // 8)


def used_size(scheme: Scheme, count: int) -> int:
    """Return the bytes of the packed payload of ``count`` values, without padding."""
    return HEADER_SIZE + norms_size(scheme, count) + codes_size(scheme, count)


def payload_size(scheme: Scheme, count: int) -> int:
    """Return the bytes of the whole packed payload of ``count`` values; a function of its arguments alone."""
    return _aligned(used_size(scheme, count))


def max_payload_size(scheme: Scheme, count: int) -> int:
    """Return the most bytes of a payload of ``count`` values; the exact number if its codes are packed."""
    if scheme.coding == "packed":
        return payload_size(scheme, count)
    return _aligned(used_size(scheme, count) + CODES_HEAD_SIZE)


def min_payload_size(scheme: Scheme, count: int) -> int:
    """Return the fewest bytes of a payload of ``count`` values."""
    if scheme.coding == "packed":
        return payload_size(scheme, count)
    size = HEADER_SIZE + norms_size(scheme, count) + CODES_HEAD_SIZE
    return _aligned(max(size, -(-count // MAX_VALUES_A_BYTE)))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _header_checksum(header: bytes) -> int:
    words = _WORDS.unpack(header)
    return sum((2 * i + 1) * word for i, word in enumerate(words) if i != CHECKSUM_WORD) % 2**32


def pack_header(scheme: Scheme, count: int, body_checksum: int) -> bytes:
    """Return the header of a payload whose body has that checksum."""

    def header(checksum: int) -> bytes:
        return _HEADER.pack(
            MAGIC,
            VERSION,
            scheme.wire_id,
            scheme.bits,
            NORMS.index(scheme.norm),
            CODINGS.index(scheme.coding),
            _RESERVED,
            checksum,
            scheme.bucket_size,
            count,
        )

    return header((_header_checksum(header(0)) + body_checksum) % 2**32)


def parse_header(header: bytes, size: int) -> Header:
    """Read the first bytes of a payload of ``size`` bytes, and check everything but the body's checksum.

    Raises:
        ValueError: this is not a payload of a known version, or its size is not one that its header allows.
    """
    if size < HEADER_SIZE:
        raise ValueError(f"payload is damaged: {size} bytes are fewer than its header's {HEADER_SIZE}")
    header = bytes(header[:HEADER_SIZE])
    magic, version, number, bits, norm, coding, reserved, checksum, bucket_size, count = _HEADER.unpack(
        header
    )
    if magic != MAGIC:
        raise ValueError(f"not a payload of hvd_quant: it begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise ValueError(f"payload has version {version}; this hvd_quant reads version {VERSION}")
    if number not in _SCHEMES or norm >= len(NORMS) or coding >= len(CODINGS) or reserved != _RESERVED:
        raise ValueError("payload is damaged: its header holds undefined values")
    try:
        scheme = _SCHEMES[number](
            bits=bits, norm=NORMS[norm], bucket_size=bucket_size, coding=CODINGS[coding]
        )
    except ValueError as error:
        raise ValueError(f"payload is damaged: {error}") from None
    low, high = min_payload_size(scheme, count), max_payload_size(scheme, count)
    if not low <= size <= high or size % ALIGNMENT:
        expected = f"{low}" if low == high else f"{low} to {high}, in multiples of {ALIGNMENT}"
        raise ValueError(f"payload is damaged: it has {size} bytes, but its {count} values take {expected}")
    return Header(scheme, count, (checksum - _header_checksum(header)) % 2**32)


def check_body(header: Header, body_checksum: int) -> None:
    """Compare the received bytes' checksum with the header's.

    Raises:
        ValueError: they differ.
    """
    if header.body_checksum != body_checksum % 2**32:
        raise ValueError("payload is damaged: its checksum does not match its bytes")


def check_count(header: Header, count: int) -> None:
    """Check that payloads have as many values as the output.

    Raises:
        ValueError: they have not.
    """
    if header.count != count:
        expected = f"{header.count} values, as many as were encoded"
        raise ValueError(f"out must have room for {expected}, not {count}")


def common_header(headers: list[Header]) -> Header:
    """Return the header that payloads to be averaged share.

    Raises:
        ValueError: there is none, or two payloads differ in scheme or count.
    """
    if not headers:
        raise ValueError("no payloads to decode")
    for number, other in enumerate(headers):
        if (other.scheme, other.count) != (headers[0].scheme, headers[0].count):
            raise ValueError(
                f"payloads differ: number 0 holds {headers[0].count} values of {headers[0].scheme}, "
                f"number {number} holds {other.count} of {other.scheme}"
            )
    return headers[0]
