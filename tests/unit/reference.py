"""A decoder written from docs/wire-format.md alone, slow and plain, to compare the real ones with."""

import struct

import numpy as np

HEADER = struct.Struct("<4s5B3sIQQ")
NORMS = ("max", "l2")


def checksum(payload: bytes) -> int:
    """The checksum that a payload's bytes ask for; its size must be a multiple of 4."""
    words = np.frombuffer(payload, "<u4").astype(np.uint64)
    weights = 2 * np.arange(words.size, dtype=np.uint64) + 1
    weights[3] = 0
    return int((weights * words).sum()) % 2**32


def with_checksum(payload: bytes) -> bytes:
    """The payload with its checksum made right, so that decoders look at the rest."""
    return payload[:12] + struct.pack("<I", checksum(payload)) + payload[16:]


def decode(payload: bytes) -> np.ndarray:
    """The values of a valid payload, float32."""
    _, _, number, bits, norm, coding, reserved, stated, bucket_size, count = HEADER.unpack(payload[:32])
    assert (norm in (0, 1), coding, reserved, stated) == (True, 0, bytes(3), checksum(payload))
    assert number in (1, 2)
    buckets = -(-count // bucket_size)
    norms = np.frombuffer(payload, "<f4", buckets, 32)
    packed = np.frombuffer(payload, np.uint8, -(-count * bits // 8), 32 + 4 * buckets)
    fields = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    codes = fields @ (1 << np.arange(bits, dtype=np.int32))
    codes = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).astype(np.float32)
    levels = np.float32(2 ** (bits - 1) - 1)
    of_value = norms[np.arange(count) // bucket_size] if count else norms
    with np.errstate(all="ignore"):
        if number == 2:
            return np.sign(codes) * np.exp2(np.abs(codes) - levels) * of_value
        plain = codes * (of_value / levels)
        tiny = codes * (of_value * np.float32(2.0**60) / levels) * np.float32(2.0**-60)
        return np.where(np.abs(of_value) < np.float32(2.0**-90), tiny, plain)
