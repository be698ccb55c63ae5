"""The payload's layout as docs/wire-format.md has it (promise 6)."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import GOLDEN_PAYLOADS, HEADER, checksum, golden, golden_name, with_checksum
from reference import decode as reference_decode

from hvd_quant import NUQSGD, QSGD, decode, encode, wire
from hvd_quant.codec import native

schemes = st.builds(
    lambda kind, *fields: kind(*fields),
    st.sampled_from([QSGD, NUQSGD]),
    st.integers(2, 8),
    st.sampled_from(["max", "l2"]),
    st.integers(1, 40) | st.integers(1, 2**63 - 1),
)


# --- layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "number"), [(QSGD, 1), (NUQSGD, 2)])
def test_header_field_by_field(backend, kind, number):
    scheme = kind(bits=5, norm="l2", bucket_size=0x0102030405)
    payload = encode(np.arange(7, dtype=np.float32), scheme, backend=backend).tobytes()
    assert payload[0:4] == b"HVDQ"
    assert payload[4] == 1  # version
    assert payload[5] == number  # scheme
    assert payload[6] == 5  # bits
    assert payload[7] == 1  # norm: l2
    assert payload[8] == 0  # coding: packed
    assert payload[9:12] == bytes(3)  # reserved
    assert struct.unpack_from("<I", payload, 12) == (checksum(payload),)
    assert struct.unpack_from("<Q", payload, 16) == (0x0102030405,)
    assert struct.unpack_from("<Q", payload, 24) == (7,)
    # One norm, 7 * 5 bits of codes, and padding to a multiple of 8.
    assert len(payload) == 32 + 4 + 5 + 7
    assert payload[41:] == bytes(7)
    assert wire.parse_header(payload[:32], len(payload)).scheme == scheme


def test_body_of_a_payload_made_by_hand(backend):
    # Norms 7 and 14 of two buckets of 2 and 1 values, 4-bit codes 7, -1 (0xf) and -7 (0x9).
    header = HEADER.pack(b"HVDQ", 1, 1, 4, 0, 0, bytes(3), 0, 2, 3)
    payload = with_checksum(header + struct.pack("<ff", 7, 14) + bytes([0xF7, 0x09]) + bytes(6))
    np.testing.assert_array_equal(decode(payload, backend=backend), np.array([7, -1, -14], np.float32))
    same = encode(np.array([7, -1, -14], np.float32), QSGD(4, "max", 2), backend=backend)
    assert same.tobytes() == payload


def test_body_of_powers_made_by_hand(backend):
    # Norms 8 and 3, 4-bit codes 7, -6 (0xa), 1, 0: 8, -8/2, 8/64, 0; and 3-bit two's complement's odd -8.
    header = HEADER.pack(b"HVDQ", 1, 2, 4, 0, 0, bytes(3), 0, 4, 6)
    payload = with_checksum(header + struct.pack("<ff", 8, 3) + bytes([0xA7, 0x01, 0x8E]) + bytes(5))
    expected = np.array([8, -4, 0.125, 0, -3 / 32, -6], np.float32)
    np.testing.assert_array_equal(decode(payload, backend=backend), expected)


def test_example_of_the_documentation(backend):
    text = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text()
    example = text.split("## Example")[1].split("\n## ")[0]
    payload = bytes.fromhex("".join(re.findall(r"^ {4}((?:[\da-f]{2} +)+)", example, re.MULTILINE)))
    expected = np.array([4.6666665, 0, -14, 1, 3], np.float32)
    np.testing.assert_array_equal(decode(payload, backend=backend), expected)
    values = np.array([7, -1, -14, 0.5, 3], np.float32)
    assert encode(values, QSGD(bits=3, bucket_size=3), backend="native").tobytes() == payload


@given(schemes, st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_reference_decoder_agrees(scheme, count, seed):
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    payload = encode(values, scheme, seed=seed).tobytes()
    np.testing.assert_array_equal(decode(payload), reference_decode(payload))


@given(schemes, st.integers(0, 2**64 - 1))
def test_payload_size(scheme, count):
    buckets = (count + scheme.bucket_size - 1) // scheme.bucket_size
    used = 32 + 4 * buckets + (count * scheme.bits + 7) // 8
    size = wire.payload_size(scheme, count)
    assert wire.used_size(scheme, count) == used
    assert size % 8 == 0
    assert 0 <= size - used < 8


@given(schemes, st.integers(0, 300))
def test_payload_has_the_size_announced(scheme, count):
    assert encode(np.ones(count, np.float32), scheme).size == wire.payload_size(scheme, count)


def test_pack_and_parse_are_inverse():
    for checksum_of_body in (0, 1, 2**32 - 1):
        header = wire.pack_header(QSGD(3, "l2", 77), 123, checksum_of_body)
        size = wire.payload_size(QSGD(3, "l2", 77), 123)
        assert wire.parse_header(header, size) == wire.Header(QSGD(3, "l2", 77), 123, checksum_of_body)


# --- errors ---------------------------------------------------------------------------------------------

FIELDS = {
    "magic": b"HVDQ",
    "version": 1,
    "scheme": 1,
    "bits": 4,
    "norm": 0,
    "coding": 0,
    "reserved": bytes(3),
    "checksum": 0,
    "bucket_size": 512,
    "count": 16,
}
SIZE = 32 + 4 + 8 + 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("magic", b"HVDq", "not a payload of hvd_quant: it begins with b'HVDq' instead of b'HVDQ'"),
        ("version", 0, "version 0; this hvd_quant reads version 1"),
        ("version", 2, "version 2; this hvd_quant reads version 1"),
        ("scheme", 0, "undefined values"),
        ("scheme", 3, "undefined values"),
        ("scheme", 255, "undefined values"),
        ("norm", 2, "undefined values"),
        ("coding", 3, "undefined values"),
        ("reserved", b"\0\0\1", "undefined values"),
        ("bits", 1, "bits must be from 2 to 8, not 1"),
        ("bits", 9, "bits must be from 2 to 8, not 9"),
        ("bucket_size", 0, "bucket_size must be from 1 to"),
        ("bucket_size", 2**63, "bucket_size must be from 1 to"),
        ("bucket_size", 1, f"it has {SIZE} bytes, but its 16 values take 104"),
        ("count", 17 + 8, f"it has {SIZE} bytes, but its 25 values take 56"),
        ("count", 2**64 - 1, f"it has {SIZE} bytes, but its {2**64 - 1} values take "),
    ],
)
def test_bad_header(field, value, message):
    good = HEADER.pack(*FIELDS.values())
    assert wire.parse_header(good, SIZE).count == 16
    with pytest.raises(ValueError, match=message):
        wire.parse_header(HEADER.pack(*(FIELDS | {field: value}).values()), SIZE)


@pytest.mark.parametrize("size", [0, 1, 31])
def test_short_of_a_header(size):
    header = HEADER.pack(*FIELDS.values())[:size]
    with pytest.raises(ValueError, match=f"{size} bytes are fewer than its header's 32"):
        wire.parse_header(header, size)


@pytest.mark.parametrize("size", [32, SIZE - 8, SIZE - 1, SIZE + 1, SIZE + 8])
def test_wrong_size(size):
    with pytest.raises(ValueError, match=f"it has {size} bytes, but its 16 values take {SIZE}"):
        wire.parse_header(HEADER.pack(*FIELDS.values()), size)


def test_check_body():
    header = wire.Header(QSGD(), 0, 5)
    wire.check_body(header, 5 + 2**32)
    with pytest.raises(ValueError, match="checksum"):
        wire.check_body(header, 6)


def test_common_header():
    header = wire.Header(QSGD(), 3, 5)
    assert wire.common_header([header, wire.Header(QSGD(), 3, 6)]) == header
    with pytest.raises(ValueError, match="no payloads"):
        wire.common_header([])
    for other in (wire.Header(QSGD(), 4, 5), wire.Header(QSGD(bits=3), 3, 5)):
        with pytest.raises(ValueError, match=r"differ: number 0 holds 3 .* number 2 holds"):
            wire.common_header([header, header, other])


# --- golden files ---------------------------------------------------------------------------------------


def test_golden_files_are_complete():
    for folder in {path.parent for path in GOLDEN_PAYLOADS}:
        with np.load(folder / "cases.npz") as cases:
            assert {path.stem for path in folder.glob("*.bin")} == {name.split(".")[0] for name in cases}
    names = {path.stem for path in GOLDEN_PAYLOADS if path.parent.name == "v1"}
    kinds = [f"{kind}{norm}" for kind in ("", "nuqsgd-") for norm in ("max", "l2")]
    assert {f"{kind}-{bits}bit" for kind in kinds for bits in range(2, 9)} <= names


@pytest.mark.parametrize("path", GOLDEN_PAYLOADS, ids=golden_name)
def test_golden_payload(backend, path):
    payload = path.read_bytes()
    # Bits, not values: they tell -0.0 from 0.0, and one NaN from another.
    expected = golden(path, "values").view(np.uint32)
    np.testing.assert_array_equal(decode(payload, backend=backend).view(np.uint32), expected)
    np.testing.assert_array_equal(reference_decode(payload).view(np.uint32), expected)
    if backend == "native" and payload[4] == wire.VERSION:
        scheme = wire.parse_header(payload, len(payload)).scheme
        again = native.encode(golden(path, "input"), scheme, int(golden(path, "seed")))
        assert again.tobytes() == payload
