"""Decoding any byte string gives values or raises ValueError, and nothing else (promise 7)."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import HEADER, with_checksum
from reference import decode as reference_decode

from hvd_quant import NUQSGD, QSGD, decode, encode, wire
from hvd_quant.codec import _native

schemes = st.builds(
    lambda kind, *fields: kind(*fields),
    st.sampled_from([QSGD, NUQSGD]),
    st.integers(2, 8),
    st.sampled_from(["max", "l2"]),
    st.integers(1, 30),
)


@st.composite
def payloads(draw, max_count=80):
    values = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(draw(st.integers(0, max_count)))
    return encode(values.astype(np.float32), draw(schemes)).tobytes()


def outcome(payload, backend):
    """What decoding comes to: the bits of the values, every NaN the same; or "refused"."""
    try:
        values = decode(payload, backend=backend)
    except ValueError:
        return "refused"
    assert values.dtype == np.float32
    return np.where(np.isnan(values), np.float32(np.nan), values).tobytes()


@given(
    st.binary(max_size=200)
    | st.binary(max_size=200).map(lambda tail: b"HVDQ\1\1" + tail)
    | st.binary(max_size=200).map(lambda tail: b"HVDQ\1\2" + tail)
)
@settings(max_examples=300)
def test_arbitrary_bytes(backend, data):
    assert outcome(data, backend) == "refused"


@given(payloads(), st.data())
def test_truncated(backend, payload, data):
    size = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(ValueError, match="payload is damaged"):
        decode(payload[:size], backend=backend)


@given(payloads(), st.binary(min_size=1, max_size=40) | st.integers(1, 40).map(bytes))
def test_extended(backend, payload, tail):
    with pytest.raises(ValueError, match="payload is damaged"):
        decode(payload + tail, backend=backend)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_any_flipped_bit(backend, bits):
    payload = encode(
        np.linspace(-1, 1, 25, dtype=np.float32), QSGD(bits=bits, bucket_size=10), backend=backend
    )
    for place in range(8 * payload.size):
        damaged = payload.copy()
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError, match="payload"):
            decode(damaged, backend=backend)


@given(payloads(max_count=20_000), st.data())
@settings(max_examples=30)
def test_a_flipped_bit_of_a_long_payload(backend, payload, data):
    damaged = bytearray(payload)
    place = data.draw(st.integers(0, 8 * len(payload) - 1))
    damaged[place // 8] ^= 1 << place % 8
    with pytest.raises(ValueError, match="payload"):
        decode(damaged, backend=backend)


@given(payloads(), st.data())
@settings(max_examples=300)
def test_damage_that_the_checksum_matches(backend, payload, data):
    damaged = bytearray(payload)
    # Header fields and body alike; single bytes, so that much of what comes out is still nearly a payload.
    for place, byte in data.draw(st.lists(st.tuples(st.integers(5, len(payload) - 1), st.integers(0, 255)))):
        damaged[place] = byte
    # Deliberately made sound again: what comes after the checksum must hold by itself.
    sound = with_checksum(bytes(damaged))
    result = outcome(sound, backend)
    if find_spec("torch"):
        assert result == outcome(sound, "torch")
    if result != "refused":
        values = reference_decode(sound)
        assert result == np.where(np.isnan(values), np.float32(np.nan), values).tobytes()


@given(schemes, st.integers(0, 80), st.binary(min_size=700, max_size=700))
def test_any_norms_and_codes(backend, scheme, count, body):
    size, used = wire.payload_size(scheme, count), wire.used_size(scheme, count)
    body = body[: used - 32] + bytes(size - used)
    payload = with_checksum(wire.pack_header(scheme, count, 0) + body)
    values = reference_decode(payload)
    expected = np.where(np.isnan(values), np.float32(np.nan), values).tobytes()
    assert outcome(payload, backend) == expected


def test_padding_must_be_zero(backend):
    payload = bytearray(encode(np.ones(3, np.float32), QSGD()).tobytes())
    assert len(payload) - wire.used_size(QSGD(), 3) == 2
    payload[-1] = 1
    with pytest.raises(ValueError, match="payload is damaged: its padding is not zero"):
        decode(with_checksum(bytes(payload)), backend=backend)


# Sizes for which memory could be had, and sizes for which it could not; each claim in 40 bytes.
CLAIMS = [2**28, 2**31, 2**32 + 1, 2**40, 2**62, 2**63, 2**64 - 1]


@pytest.mark.skipif(not find_spec("torch"), reason="needs torch")
def test_claimed_sizes_are_not_allocated():
    # In a process that cannot allocate 64 MiB more than it has: reserving what a header claims would be a
    # MemoryError, or for torch a RuntimeError.
    script = f"""
import resource, struct, sys
sys.path.insert(0, {reference.__file__.rsplit("/", 1)[0]!r})
import numpy as np, torch
from reference import HEADER, with_checksum
from hvd_quant import decode, encode, QSGD
for backend in ("native", "torch"):
    decode(encode(np.ones(3, np.float32), QSGD(), backend=backend), backend=backend)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26,) * 2)
try:
    np.empty(2**28, np.uint8)
except MemoryError:
    print("limited")
for backend in ("native", "torch"):
    for claim in {CLAIMS}:
        for bits in (2, 8):
            for bucket_size in (1, 512, 2**63 - 1):
                header = HEADER.pack(b"HVDQ", 1, 1, bits, 0, 0, bytes(3), 0, bucket_size, claim)
                try:
                    decode(with_checksum(header + bytes(8)), backend=backend)
                except ValueError:
                    continue
                raise SystemExit(f"{{claim}} values in 40 bytes were decoded")
print("done")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.stdout.split(), result.returncode) == (["limited", "done"], 0), result.stderr


@pytest.mark.parametrize("claim", [0, 1, 16])
def test_claims_that_fit_are_believed(backend, claim):
    header = HEADER.pack(b"HVDQ", 1, 1, 2, 0, 0, bytes(3), 0, 512, claim)
    payload = with_checksum(header + bytes(wire.payload_size(QSGD(bits=2), claim) - 32))
    np.testing.assert_array_equal(decode(payload, backend=backend), np.zeros(claim))


# --- the native module, called without what native.py checks --------------------------------------------

VALUES = np.ones(100, np.float32)
SCHEME = QSGD(bits=4, bucket_size=10)
PAYLOAD = encode(VALUES, SCHEME)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def describe(changes):
    """A short name of a test case."""
    ((name, value),) = changes.items()
    array = value[-1] if isinstance(value, list) and value else value
    if isinstance(array, np.ndarray):
        value = f"{array.dtype}{list(array.shape)} strides {list(array.strides)}"
    return f"{name}={value}"


def native_encode(**changes):
    arguments = {
        "values": VALUES,
        "dtype": "float32",
        "bits": 4,
        "norm": "max",
        "spacing": "uniform",
        "bucket_size": 10,
        "seed": 0,
        "shift": 0,
        "nearest": False,
        "residual": None,
        "first_word": wire.FIRST_BODY_WORD,
        "body": np.empty(PAYLOAD.size - 32, np.uint8),
        "threads": 1,
    }
    arguments |= changes
    _native.encode(**arguments)
    return arguments["body"]


def native_decode(**changes):
    arguments = {
        "bodies": [PAYLOAD[32:].copy()],
        "bucket_size": 10,
        "bits": 4,
        "spacing": "uniform",
        "weight": 1.0,
        "first_word": wire.FIRST_BODY_WORD,
        "out": np.empty(100, np.float32),
        "dtype": "float32",
        "threads": 1,
    }
    arguments |= changes
    _native.decode_sum(**arguments)
    return arguments["out"]


def test_native_module_with_good_arguments(isa):
    np.testing.assert_array_equal(native_encode(), PAYLOAD[32:])
    np.testing.assert_array_equal(native_decode(), VALUES)
    # A number of threads that makes no sense is brought into range.
    for threads in (-1, 0, 2**62):
        np.testing.assert_array_equal(native_encode(threads=threads), PAYLOAD[32:])
        np.testing.assert_array_equal(native_decode(threads=threads), VALUES)


@pytest.mark.parametrize(
    "changes",
    [
        {"values": VALUES[:-12]},
        {"values": np.ones(112, np.float32)},
        {"values": np.ones(0, np.float32)},
        {"values": np.ones(100, np.float64)},
        {"values": np.ones(100, np.float16)},
        {"values": np.ones((10, 10), np.float32)},
        {"values": np.ones(200, np.float32)[::2]},
        {"values": np.ones(100, np.float32)[::-1]},
        {"values": np.broadcast_to(np.float32(1), 100)},
        {"values": np.frombuffer(bytes(401), np.float32, 100, 1)},
        {"dtype": "float64"},
        {"dtype": "float16"},
        {"dtype": "int32"},
        {"dtype": ""},
        {"bits": 1},
        {"bits": 9},
        {"bits": -4},
        {"bits": 2**31 - 1},
        {"norm": "l1"},
        {"norm": ""},
        {"spacing": "exp"},
        {"spacing": ""},
        {"bucket_size": 0},
        {"bucket_size": 9},
        {"bucket_size": 2**64 - 1},
        {"body": np.empty(0, np.uint8)},
        {"body": np.empty(PAYLOAD.size - 33, np.uint8)},
        {"body": np.empty(PAYLOAD.size - 31, np.uint8)},
        {"body": np.empty(PAYLOAD.size - 32, np.uint16)},
        {"body": np.empty((PAYLOAD.size - 32, 1), np.uint8)},
        {"body": np.empty(2 * (PAYLOAD.size - 32), np.uint8)[::2]},
        {"body": read_only(PAYLOAD[32:])},
    ],
    ids=describe,
)
def test_native_encode_refuses(changes):
    with pytest.raises(ValueError, match=r"\w"):
        native_encode(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"bodies": []},
        {"bodies": [PAYLOAD]},
        {"bodies": [PAYLOAD[32:], PAYLOAD[33:]]},
        {"bodies": [PAYLOAD[:0]]},
        {"bodies": [PAYLOAD[32:].astype(np.uint16)]},
        {"bodies": [np.repeat(PAYLOAD[32:], 2)[::2]]},
        {"bodies": [PAYLOAD[32:].reshape(1, -1)]},
        {"bucket_size": 0},
        {"bucket_size": 1},
        {"bucket_size": 2**64 - 1},
        {"bits": 1},
        {"bits": 3},
        {"bits": 9},
        {"spacing": "exp"},
        {"out": np.empty(88, np.float32)},
        {"out": np.empty(112, np.float32)},
        {"out": np.empty(0, np.float32)},
        {"out": np.empty(2**20, np.float32)},
        {"out": np.empty(100, np.float64)},
        {"out": np.empty((10, 10), np.float32)},
        {"out": np.empty(200, np.float32)[::2]},
        {"out": np.frombuffer(bytearray(401), np.float32, 100, 1)},
        {"out": read_only(VALUES)},
        {"dtype": "float64"},
        {"dtype": "bfloat16"},
        {"dtype": "int8"},
    ],
    ids=describe,
)
def test_native_decode_refuses(changes):
    with pytest.raises(ValueError, match=r"\w"):
        native_decode(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"values": [1.0] * 100},
        {"values": None},
        {"body": b""},
        {"seed": -1},
        {"shift": -1},
        {"shift": 2**32},
        {"bucket_size": -1},
        {"bits": 4.5},
    ],
    ids=describe,
)
def test_native_encode_takes_nothing_else(changes):
    with pytest.raises(TypeError):
        native_encode(**changes)
