"""A decoder written from docs/wire-format.md alone, slow and plain, to compare the real ones with."""

import itertools
import struct
from pathlib import Path

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
    assert (norm in (0, 1), reserved, stated) == (True, bytes(3), checksum(payload))
    assert number in (1, 2)
    assert coding in (0, 1, 2)
    buckets = -(-count // bucket_size)
    norms = np.frombuffer(payload, "<f4", buckets, 32)
    section = payload[32 + 4 * buckets :]
    codes = unpack(section, count, bits) if coding == 0 else expand(section, count, bits, coding)
    codes = codes.astype(np.float32)
    levels = np.float32(2 ** (bits - 1) - 1)
    of_value = norms[np.arange(count) // bucket_size] if count else norms
    with np.errstate(all="ignore"):
        if number == 2:
            return np.sign(codes) * np.exp2(np.abs(codes) - levels) * of_value
        plain = codes * (of_value / levels)
        tiny = codes * (of_value * np.float32(2.0**60) / levels) * np.float32(2.0**-60)
        return np.where(np.abs(of_value) < np.float32(2.0**-90), tiny, plain)


def unpack(section: bytes, count: int, bits: int) -> np.ndarray:
    """Packed codes."""
    packed = np.frombuffer(section, np.uint8, -(-count * bits // 8))
    fields = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    codes = fields @ (1 << np.arange(bits, dtype=np.int32))
    return np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)


# --- coded codes ----------------------------------------------------------------------------------------

STORED, DENSE, SPARSE = range(3)


class Bits:
    """A bit stream of which every bit must be read."""

    def __init__(self, data: bytes, size: int) -> None:
        every = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").tolist()
        self.left, padding = every[:size][::-1], every[size:]
        assert len(self.left) == size
        assert not any(padding[: -size % 8])

    def bit(self) -> int:
        return self.left.pop()

    def number(self, size: int) -> int:
        """Least significant bit first."""
        return sum(self.bit() << i for i in range(size))

    def word(self, words: dict[str, int]) -> int:
        """A code word's symbol."""
        read = ""
        while read not in words:
            read += str(self.bit())
        return words[read]

    def omega(self) -> int:
        n = 1
        while self.bit():
            group = "1" + "".join(str(self.bit()) for _ in range(n))
            n = int(group, 2)
        return n


def canonical(lengths: list[int]) -> dict[str, int]:
    """The words of a canonical code, as text, and their symbols."""
    words, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - before
        words[format(code, f"0{length}b")] = symbol
        code, before = code + 1, length
    assert code == 2**before  # the code is complete
    return words


def signed(field: int, bits: int) -> int:
    return field - 2**bits if field >= 2 ** (bits - 1) else field


def expand(section: bytes, count: int, bits: int, coding: int) -> np.ndarray:
    """Codes in one of the forms of coded codes."""
    form, shape = section[:2]
    assert section[2:8] == bytes(6)
    at = 8
    if form == STORED:
        assert shape == 0
        return unpack(section[at:], count, bits)
    width, digits = shape % 16, shape // 16
    if form == SPARSE:
        nonzero, at = int.from_bytes(section[8:16], "little"), 16
    lanes = 4 if form == DENSE and count >= 2**14 else 1
    sizes = struct.unpack_from(f"<{lanes}Q", section, at)
    at += 8 * lanes
    words = {}
    if coding == 2:
        symbols = 168 if form == SPARSE else 2 ** (width * digits)
        lengths = list(
            itertools.chain(*((byte % 16, byte // 16) for byte in section[at : at + symbols // 2]))
        )
        words, at = canonical(lengths), at + symbols // 2
    streams = []
    for size in sizes:
        streams.append(Bits(section[at : at + -(-size // 8)], size))
        at += -(-size // 8)
    codes = np.zeros(count, np.int64)
    if form == SPARSE:
        (stream,) = streams
        place = -1
        for _ in range(nonzero):
            if coding == 1:
                gap = stream.omega()
                negative = stream.bit()
                level = stream.omega()
            else:
                gap_octave, level_octave = divmod(stream.word(words), 7)
                negative = stream.bit()
                gap = 2**gap_octave + stream.number(gap_octave)
                level = 2**level_octave + stream.number(level_octave)
            place += gap
            codes[place] = -level if negative else level
    else:
        step = -(-count // (32 * lanes)) * 32
        for lane, stream in enumerate(streams):
            n = max(0, min(step, count - lane * step))
            part = []
            while len(part) < -(-n // 4) * 4:
                if coding == 1:
                    level = stream.omega() - 1
                    part.append(-level if level and stream.bit() else level)
                    continue
                symbol = stream.word(words)
                fields = [signed(symbol >> width * i & (2**width - 1), width) for i in range(digits)]
                for field in fields:
                    escaped = width < bits and field == -(2 ** (width - 1))
                    part.append(signed(stream.number(bits), bits) if escaped else field)
            assert not any(part[n:])
            codes[lane * step : lane * step + n] = part[:n]
    assert not any(stream.left for stream in streams)
    return codes


# --- payloads of all released versions --------------------------------------------------------------------

GOLDEN_PAYLOADS = sorted((Path(__file__).parents[1] / "golden").glob("v*/*.bin"))


def golden(path, what):
    """What a golden payload was made of, or decodes to."""
    with np.load(path.parent / "cases.npz") as cases:
        return cases[f"{path.stem}.{what}"]


def golden_name(path):
    return f"{path.parent.name}-{path.stem}"
