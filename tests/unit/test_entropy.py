"""Elias and Huffman codes: the same values as packed ones, in no more bytes than the theory says."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Bits, canonical, unpack, with_checksum
from reference import decode as reference_decode
from reference import expand as reference_expand
from test_message import noise_of

from hvd_quant import NUQSGD, QSGD, decode, encode, wire
from hvd_quant.codec import _native, native, torch_ops
from hvd_quant.codec.message import MessageLayout, Segment, cut
from hvd_quant.exchange.algorithms import ALGORITHMS, BucketData
from hvd_quant.exchange.driver import Exchange
from hvd_quant.exchange.in_process import Network
from hvd_quant.exchange.layout import Entry, GroupLayout

CODED = ("elias", "huffman")
STORED, DENSE, SPARSE = range(3)
ONE_BUCKET = 2**20


def gradient(kind, count, seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "gaussian": lambda: rng.standard_normal(count),
        "heavy-tailed": lambda: rng.laplace(size=count) ** 3,
        "sparse": lambda: rng.standard_normal(count) * (rng.random(count) < 0.01),
        "zeros": lambda: np.zeros(count),
        "extremes": lambda: rng.choice([-1.0, 1.0], count),
        "one value": lambda: np.full(count, -2.5),
        "one nonzero": lambda: np.arange(count) == count // 2,
        "non-finite": lambda: np.where(np.arange(count) % 97 == 5, np.nan, rng.standard_normal(count)),
    }
    return values[kind]().astype(np.float32)


KINDS = (
    "gaussian",
    "heavy-tailed",
    "sparse",
    "zeros",
    "extremes",
    "one value",
    "one nonzero",
    "non-finite",
)


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def codes_section(payload, scheme, count):
    return payload[wire.HEADER_SIZE + wire.norms_size(scheme, count) :]


def packed_like(scheme):
    return type(scheme)(scheme.bits, scheme.norm, scheme.bucket_size)


def entropy_of(values, scheme, seed):
    """Bits a value, of order 0, of the packed codes."""
    payload = encode(values, packed_like(scheme), seed=seed)
    codes = unpack(codes_section(payload, scheme, values.size).tobytes(), values.size, scheme.bits)
    shares = np.unique(codes, return_counts=True)[1] / values.size
    return -(shares * np.log2(shares)).sum()


# --- the same values ------------------------------------------------------------------------------------


@given(
    family=st.sampled_from([QSGD, NUQSGD]),
    bits=st.integers(2, 8),
    norm=st.sampled_from(["max", "l2"]),
    bucket_size=st.sampled_from([1, 3, 64, 1000, ONE_BUCKET]),
    coding=st.sampled_from(CODED),
    count=st.integers(0, 70) | st.integers(0, 5000) | st.sampled_from([2**14 - 1, 2**14, 2**14 + 77]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 5),
)
@settings(max_examples=150)
def test_decodes_to_what_packed_codes_decode_to(family, bits, norm, bucket_size, coding, count, kind, seed):
    scheme, values = family(bits, norm, bucket_size, coding), gradient(kind, count, seed)
    packed = encode(values, packed_like(scheme), seed=seed)
    payload = encode(values, scheme, seed=seed)
    assert payload.size <= wire.max_payload_size(scheme, count)
    assert payload.size <= packed.size + 8
    expected = decode(packed)
    assert same(decode(payload), expected)
    assert same(decode(payload, backend="torch"), expected)
    assert same(reference_decode(payload.tobytes()), expected)
    if count:
        both = native.decode_mean([payload, encode(values, scheme, seed=seed + 1)])
        assert same(both, native.decode_mean([packed, encode(values, packed_like(scheme), seed=seed + 1)]))


@pytest.mark.parametrize("coding", CODED)
def test_torch_makes_the_same_codes(coding):
    values = torch.from_numpy(gradient("gaussian", 20_000))
    scheme = QSGD(4, "l2", coding=coding)
    coded, packed = (torch_ops.encode(values, s, 7) for s in (scheme, packed_like(scheme)))
    assert coded.numel() < packed.numel()
    assert torch.equal(torch_ops.decode_mean([coded]), torch_ops.decode_mean([packed]))
    assert same(decode(coded.numpy()), decode(packed.numpy()))


@pytest.mark.parametrize("coding", CODED)
def test_payloads_do_not_depend_on_the_instruction_set(isa, coding):
    values = gradient("heavy-tailed", 50_000)
    scheme = NUQSGD(5, "l2", 8192, coding)
    payload = encode(values, scheme)
    _native.choose_isa("portable")
    assert same(payload, encode(values, scheme))


@pytest.mark.parametrize(
    ("scheme", "kind", "form"),
    [
        (QSGD(2, "l2", 8192, "elias"), "gaussian", SPARSE),
        (QSGD(8, "max", 512, "elias"), "gaussian", STORED),
        (QSGD(8, "max", 8192, "elias"), "heavy-tailed", SPARSE),
        (NUQSGD(5, "l2", 8192, "elias"), "heavy-tailed", DENSE),
        (QSGD(2, "l2", 8192, "huffman"), "gaussian", SPARSE),
        (QSGD(4, "max", 8192, "huffman"), "gaussian", DENSE),
        (QSGD(8, "l2", 8192, "huffman"), "gaussian", DENSE),
        (QSGD(2, "max", ONE_BUCKET, "huffman"), "extremes", DENSE),
        (QSGD(4, "max", 1, "elias"), "extremes", STORED),
    ],
)
def test_the_form_follows_the_values(scheme, kind, form):
    values = gradient(kind, 100_000)
    payload = encode(values, scheme)
    assert codes_section(payload, scheme, values.size)[0] == form
    assert same(decode(payload), decode(encode(values, packed_like(scheme))))


def test_very_long_gaps_are_coded_otherwise():
    # A gap of 2^24 and more has no code word, and too many values in a few bytes are refused by decoders.
    for coding in CODED:
        scheme = QSGD(2, "max", 2**62, coding)
        values = np.zeros(2**24 + 100, np.float32)
        values[-1] = 1
        payload = encode(values, scheme)
        assert values.size <= wire.MAX_VALUES_A_BYTE * payload.size
        assert same(decode(payload), values)


# --- sizes ----------------------------------------------------------------------------------------------


def omega(n):
    """The Elias omega code of n, from its definition (Elias 1975, as QSGD's section 3.2 has it)."""
    code = "0"
    while n > 1:
        code = format(n, "b") + code
        n = len(format(n, "b")) - 1
    return code


def test_elias_codes_are_those_of_the_textbook():
    assert [omega(n) for n in (1, 2, 3, 4, 7, 8, 16, 100)] == [
        "0",
        "100",
        "110",
        "101000",
        "101110",
        "1110000",
        "10100100000",
        "1011011001000",
    ]
    # Levels 0 to 127 of a bucket in which each value is a level exactly, after enough zeros.
    levels = np.concatenate([np.zeros(3000), np.arange(128)]).astype(np.float32)
    scheme = QSGD(8, "max", ONE_BUCKET, "elias")
    section = codes_section(encode(levels, scheme), scheme, levels.size)
    assert section[0] == SPARSE
    (size,) = struct.unpack_from("<Q", section.tobytes(), 16)
    stream = "".join(map(str, np.unpackbits(section[24:], bitorder="little")[:size]))
    gaps = [3002] + [1] * 126
    assert stream == "".join(omega(gap) + "0" + omega(level) for level, gap in enumerate(gaps, start=1))


def test_words_of_the_dense_elias_form():
    values = np.tile(np.array([1, 0, 0, 0, -3, 0, -1, 0], np.float32), 100)
    scheme = QSGD(3, "max", ONE_BUCKET, "elias")
    payload = encode(values, scheme)
    words = {0: "0", 1: "1000", -1: "1001", -3: "1010001"}
    text = "".join(words[value] for value in values.astype(int).tolist())
    stream = np.packbits(np.array(list(text), np.uint8), bitorder="little").tobytes()
    section = bytes([DENSE]) + bytes(7) + struct.pack("<Q", len(text)) + stream
    section += bytes(-(len(section) + 4) % 8)
    by_hand = with_checksum(payload[:36].tobytes() + section)
    for backend in ("native", "torch"):
        assert same(decode(np.frombuffer(by_hand, np.uint8), backend=backend), values)


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_elias_codes_are_within_the_theorem(kind, bits):
    # QSGD, Theorem 3.2, for each bucket of d values. Its o(1) is taken as 0, which makes the bound smaller.
    count, d = 2**16, 2**13
    scheme = QSGD(bits, "l2", d, "elias")
    s = scheme.num_levels
    bound = (3 + 1.5 * math.log2(2 * (s**2 + d) / (s * (s + math.sqrt(d))))) * s * (s + math.sqrt(d)) + 32
    payload = encode(gradient(kind, count), scheme)
    assert 8 * (payload.size - wire.HEADER_SIZE) <= bound * count / d


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed"])
@pytest.mark.parametrize(("family", "norm"), [(QSGD, "max"), (QSGD, "l2"), (NUQSGD, "l2")])
@pytest.mark.parametrize("bits", range(2, 9))
def test_huffman_codes_are_near_the_entropy(kind, family, norm, bits):
    scheme = family(bits, norm, 8192, "huffman")
    values = gradient(kind, 2**20)
    payload = encode(values, scheme)
    section = payload.size - wire.HEADER_SIZE - wire.norms_size(scheme, values.size)
    assert 8 * section / values.size <= 1.05 * entropy_of(values, scheme, 0)


def test_nothing_is_larger_than_stored():
    rng = np.random.default_rng(3)
    for coding in CODED:
        for count in (1, 7, 100, 2**14, 2**15 + 1):
            values = rng.choice(np.arange(-127, 128), count).astype(np.float32)
            values[0] = 127
            scheme = QSGD(8, "max", ONE_BUCKET, coding)
            payload = encode(values, scheme)
            assert payload.size <= encode(values, packed_like(scheme)).size + 8
            assert same(decode(payload), values)


# --- damage ---------------------------------------------------------------------------------------------

DAMAGED = [
    (QSGD(2, "l2", 1000, "elias"), "gaussian", 1000),
    (NUQSGD(5, "l2", 300, "elias"), "heavy-tailed", 300),
    (QSGD(8, "max", 50, "elias"), "gaussian", 50),
    (QSGD(2, "l2", 3000, "huffman"), "sparse", 3000),
    (QSGD(4, "max", 500, "huffman"), "gaussian", 1500),
    (QSGD(8, "l2", 2048, "huffman"), "heavy-tailed", 2000),
]


def outcome(payload, backend="native"):
    try:
        return decode(payload, backend=backend)
    except ValueError:
        return None


@pytest.mark.parametrize(("scheme", "kind", "count"), DAMAGED)
def test_truncated_or_extended(scheme, kind, count):
    payload = encode(gradient(kind, count), scheme).tobytes()
    for size in range(len(payload)):
        assert outcome(payload[:size]) is None
        if size >= 32 and size % 8 == 0:
            assert outcome(with_checksum(payload[:size])) is None
    for more in (1, 4, 8, 16):
        assert outcome(payload + bytes(more)) is None
        if more % 8 == 0:
            assert outcome(with_checksum(payload + bytes(more))) is None


@pytest.mark.parametrize(("scheme", "kind", "count"), DAMAGED)
def test_any_flipped_bit(scheme, kind, count):
    payload = encode(gradient(kind, count), scheme)
    rng = np.random.default_rng(0)
    head = 8 * (32 + wire.norms_size(scheme, count) + 200)
    places = {*range(64, min(head, 8 * payload.size), 3), *rng.integers(0, 8 * payload.size, 300).tolist()}
    for place in places:
        damaged = payload.copy()
        damaged[place // 8] ^= 1 << place % 8
        assert outcome(damaged) is None
        # With its checksum made right, it may be another payload; what it holds is then what the page says.
        sound = with_checksum(damaged.tobytes())
        values = outcome(sound)
        if values is not None and values.size < 10_000:
            assert same(values, reference_decode(sound))


@given(st.sampled_from(DAMAGED), st.data())
@settings(max_examples=300)
def test_fuzz(damaged, data):
    scheme, kind, count = damaged
    payload = bytearray(encode(gradient(kind, count), scheme).tobytes())
    start = 32 + wire.norms_size(scheme, count)
    places = st.tuples(st.integers(start, len(payload) - 1), st.integers(0, 255))
    for place, byte in data.draw(st.lists(places, min_size=1, max_size=5)):
        payload[place] = byte
    sound = with_checksum(bytes(payload))
    values = outcome(sound)
    if values is not None:
        assert same(values, reference_decode(sound))


def coded_payload(scheme, count, section):
    body = bytes(wire.norms_size(scheme, count)) + section
    body += bytes(-len(body) % 8)
    return with_checksum(wire.pack_header(scheme, count, 0) + body)


def table(lengths, symbols):
    lengths = [*lengths, *[0] * (symbols - len(lengths))]
    return bytes(low | high << 4 for low, high in zip(lengths[::2], lengths[1::2], strict=True))


def stream_of(text):
    return np.packbits(np.array(list(text), np.uint8), bitorder="little").tobytes()


def dense(bits=640, shape=0, code=b"", stream=bytes(80), reserved=0):
    """Of 640 zeros, in words of one bit."""
    return struct.pack("<BBB5xQ", DENSE, shape, reserved, bits) + code + stream


def sparse(nonzero, text):
    return struct.pack("<B7xQQ", SPARSE, nonzero, len(text)) + stream_of(text)


ELIAS, HUFFMAN = (QSGD(4, "max", 2**30, coding) for coding in CODED)
HOSTILE = {
    "unknown form": (ELIAS, struct.pack("<B7x", 3) + bytes(80)),
    "shape where there is none": (ELIAS, dense(shape=0x14)),
    "reserved bytes": (ELIAS, dense(reserved=1)),
    "no shape": (HUFFMAN, dense(code=table([1, 1], 16))),
    "too wide": (HUFFMAN, dense(shape=0x15, code=table([1, 1], 32))),
    "no digits": (HUFFMAN, dense(shape=0x04, code=table([1, 1], 16))),
    "three digits": (HUFFMAN, dense(shape=0x32, code=table([1, 1], 64))),
    "too many digits": (HUFFMAN, dense(shape=0x43, code=table([1, 1], 256))),
    "no code": (HUFFMAN, dense(shape=0x14, code=table([], 16))),
    "one word": (HUFFMAN, dense(shape=0x14, code=table([1], 16))),
    "incomplete code": (HUFFMAN, dense(shape=0x14, code=table([1, 2], 16))),
    "too many words": (HUFFMAN, dense(shape=0x14, code=table([1, 1, 1], 16))),
    "too long words": (HUFFMAN, dense(shape=0x14, code=table([*range(1, 12), 12, 12], 16))),
    "stream beyond the end": (ELIAS, dense(bits=641)),
    "stream beyond all ends": (ELIAS, dense(bits=2**64 - 1)),
    "too few bits": (ELIAS, dense(bits=639)),
    "too many bits": (ELIAS, dense(bits=641, stream=bytes(81))),
    "bytes left over": (ELIAS, dense(stream=bytes(88))),
    "nonzero padding": (ELIAS, dense(stream=bytes(80) + b"\1")),
    "nonzero bits after the end": (ELIAS, dense(bits=639, stream=bytes(79) + b"\x80")),
    "level above s, densely": (ELIAS, dense(bits=639 + 8, stream=stream_of("0" * 639 + "11100010"))),
    "gap beyond the end": (ELIAS, sparse(1, omega(641) + "0" + omega(1))),
    "gaps beyond the end": (ELIAS, sparse(2, 2 * (omega(321) + "0" + omega(1)))),
    "more nonzeros than values": (ELIAS, sparse(641, "000" * 641)),
    "more nonzeros than bits": (ELIAS, sparse(640, "000" * 639)),
    "endless nonzeros": (ELIAS, sparse(2**64 - 1, "000" * 640)),
    "bits after the last": (ELIAS, sparse(3, "000" * 4)),
    "level above s": (ELIAS, sparse(1, omega(1) + "0" + omega(8))),
    "huge gap": (ELIAS, sparse(1, "1" * 64)),
    "huge level": (ELIAS, sparse(1, "00" + "1" * 64)),
    "stored, but short": (ELIAS, struct.pack("<B7x", STORED) + bytes(312)),
    "stored, with a shape": (ELIAS, struct.pack("<BB6x", STORED, 1) + bytes(320)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_codes(backend, case):
    scheme, section = HOSTILE[case]
    payload = coded_payload(scheme, 640, section)
    wire.parse_header(payload[:32], len(payload))  # it is the codes that are refused
    with pytest.raises(ValueError, match="payload is damaged"):
        decode(np.frombuffer(payload, np.uint8), backend=backend)


def test_values_that_fill_up_must_be_zero(backend):
    last = stream_of("0" * 639 + omega(2) + "0")
    values = decode(
        np.frombuffer(coded_payload(ELIAS, 640, dense(643, stream=last)), np.uint8), backend=backend
    )
    assert same(values, np.zeros(640, np.float32))  # the norm is 0
    with pytest.raises(ValueError, match="payload is damaged: its codes"):
        decode(np.frombuffer(coded_payload(ELIAS, 639, dense(643, stream=last)), np.uint8), backend=backend)


def test_what_hostile_codes_are_made_from_is_sound(backend):
    for scheme, section in (
        (ELIAS, dense()),
        (HUFFMAN, dense(shape=0x14, code=table([1, 1], 16))),
        (ELIAS, sparse(2, 2 * (omega(320) + "0" + omega(7)))),
        (ELIAS, sparse(640, "000" * 640)),
        (ELIAS, struct.pack("<B7x", STORED) + bytes(320)),
    ):
        payload = coded_payload(scheme, 640, section)
        assert same(decode(np.frombuffer(payload, np.uint8), backend=backend), np.zeros(640, np.float32))


LARGE = QSGD(4, "max", 2**63 - 1, "elias")


def test_as_many_values_as_the_bytes_allow():
    # 4096 values a byte are believed, more are not: an allocation must have its reason in the input.
    section = struct.pack("<B7xQQ", SPARSE, 0, 0)
    size = len(coded_payload(LARGE, 1, section))
    for backend in ("native", "torch"):
        payload = np.frombuffer(coded_payload(LARGE, 4096 * size, section), np.uint8)
        assert decode(payload, backend=backend).size == 4096 * size
    for count in (4096 * size + 1, 2**40, 2**63, 2**64 - 1):
        with pytest.raises(ValueError, match="payload is damaged"):
            decode(coded_payload(LARGE, count, section))


# --- messages -------------------------------------------------------------------------------------------


def layout_of(coding):
    scheme = QSGD(4, "max", 512, coding)
    segments = [
        Segment(0, 0, 3000, "float32", scheme),
        Segment(0, 3000, 2000, "float32", NUQSGD(3, "l2", 512, coding)),
        Segment(1, 0, 7, "float32", QSGD(2)),
        Segment(1, 7, 0, "float32", scheme),
    ]
    return MessageLayout(segments, b"preamble"), [gradient("gaussian", 5000), gradient("gaussian", 7, 1)]


def message_of(layout, values, codec=native):
    room = codec.empty(layout.size, "uint8", torch.empty(0))
    if codec is torch_ops:
        values = [torch.from_numpy(value) for value in values]
    size = codec.encode_message(values, layout, noise_of(layout), room)
    return np.asarray(room[:size])


@pytest.mark.parametrize("coding", CODED)
def test_messages_are_payloads_end_to_end(coding):
    layout, values = layout_of(coding)
    message = message_of(layout, values)
    assert message.size < layout.size
    assert int.from_bytes(message[8:16].tobytes(), "little") == message.size
    parts = [values[s.tensor][s.start : s.start + s.count] for s in layout.segments]
    payloads = [
        encode(part, s.scheme, seed=i) for i, (part, s) in enumerate(zip(parts, layout.segments, strict=True))
    ]
    assert message[16:].tobytes() == b"".join(payload.tobytes() for payload in payloads)


@pytest.mark.parametrize("coding", CODED)
def test_both_backends_read_messages_of_any_size(coding):
    layout, values = layout_of(coding)
    messages = [message_of(layout, values), message_of(layout, values, torch_ops)]
    assert messages[0].size != messages[1].size
    by_native, by_torch = ([np.full_like(value, np.nan) for value in values] for _ in range(2))
    native.decode_messages(messages, layout, by_native, 2.0)
    torch_ops.decode_messages(
        [torch.from_numpy(m) for m in messages], layout, [torch.from_numpy(out) for out in by_torch], 2.0
    )
    for a, b in zip(by_native, by_torch, strict=True):
        assert same(a, b)
        assert not np.isnan(a).any()


@pytest.mark.parametrize("codec", [native, torch_ops])
@pytest.mark.parametrize("coding", CODED)
def test_damaged_messages_are_refused(codec, coding):
    layout, values = layout_of(coding)
    message = message_of(layout, values)
    out = [np.empty_like(value) for value in values]
    if codec is torch_ops:
        out = [torch.from_numpy(value) for value in out]
    rng = np.random.default_rng(0)
    sizes = [*range(40), *rng.integers(40, message.size, 20).tolist(), message.size - 8]
    damaged = [message[:size].copy() for size in sizes]
    for part in damaged:  # of which half say so themselves
        if part.size >= 16 and part.size % 2:
            part[8:16] = np.frombuffer(struct.pack("<Q", part.size), np.uint8)
    for place in [*range(90), *rng.integers(0, message.size, 60).tolist()]:
        damaged.append(message.copy())
        damaged[-1][place] ^= 1 << int(rng.integers(8))
    longer = np.append(message, np.zeros(8, np.uint8))
    longer[8:16] = np.frombuffer(struct.pack("<Q", longer.size), np.uint8)
    damaged += [longer, np.append(message, np.zeros(8, np.uint8))]
    for one in damaged:
        pair = [message, one] if codec is native else [torch.from_numpy(message), torch.from_numpy(one)]
        with pytest.raises(ValueError, match=r"\w"):
            codec.decode_messages(pair, layout, out, 1.0)


def refusal(codec, layout, payloads):
    """What a codec says to a message of these payloads, whose size is stated rightly."""
    body = b"".join(payloads)
    message = np.frombuffer(layout.preamble + struct.pack("<Q", 16 + len(body)) + body, np.uint8).copy()
    out = [np.empty(sum(s.count for s in layout.segments), np.float32)]
    if codec is torch_ops:
        message, out = torch.from_numpy(message), [torch.from_numpy(value) for value in out]
    try:
        codec.decode_messages([message], layout, out, 1.0)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("codec", [native, torch_ops])
def test_a_packed_payload_that_is_cut_off_in_a_message_of_varying_size(codec):
    coded, packed = (QSGD(8, "max", 2**40, coding) for coding in ("elias", "packed"))
    count = 397
    layout = MessageLayout(
        [Segment(0, 0, 50, "float32", coded), Segment(0, 50, count, "float32", packed)], b"preamble"
    )
    first, second = (encode(gradient("gaussian", s.count), s.scheme).tobytes() for s in layout.segments)
    assert refusal(codec, layout, [first, second]) is None
    for size in range(len(second)):
        cut_off = second[:size]
        assert refusal(codec, layout, [first, cut_off])
        if size >= wire.HEADER_SIZE and size % 4 == 0:
            assert "too short" in refusal(codec, layout, [first, with_checksum(cut_off)])


@pytest.mark.parametrize("codec", [native, torch_ops])
def test_payloads_in_messages_are_of_the_sizes_that_payloads_can_have(codec):
    scheme, packed = QSGD(8, "max", 2**40, "elias"), QSGD(8, "max", 2**40)
    count = 1000
    text = ("101111000000000") * count  # omega(128) and a sign: twice as long as the packed codes
    long = coded_payload(scheme, count, struct.pack("<B7xQ", DENSE, len(text)) + stream_of(text))
    assert len(long) > wire.max_payload_size(scheme, count)
    assert refusal(codec, MessageLayout([Segment(0, 0, count, "float32", scheme)], b"preamble"), [long])
    count = 2**20
    short = coded_payload(scheme, count, struct.pack("<B7xQQ", SPARSE, 0, 0))
    assert len(short) < wire.min_payload_size(scheme, count)
    segments = [Segment(0, 0, count, "float32", scheme), Segment(0, count, 3000, "float32", packed)]
    tail = encode(gradient("gaussian", 3000), packed).tobytes()
    assert "short" in refusal(codec, MessageLayout(segments, b"preamble"), [short, tail])


@given(st.lists(st.integers(16, 60) | st.none(), max_size=5), st.binary(max_size=200), st.data())
def test_cut(sizes, noise, data):
    messages = []
    for size in sizes:
        own = size or data.draw(st.integers(16, 60))
        messages.append(bytes(8) + struct.pack("<Q", own) + bytes(own - 16))
    received = np.frombuffer(b"".join(messages), np.uint8)
    assert [part.tobytes() for part in cut(received, sizes)] == messages
    # Whatever comes, there are as many parts as messages, and they are all of it, or empty.
    parts = cut(np.frombuffer(noise, np.uint8), sizes)
    assert len(parts) == len(sizes)
    assert b"".join(part.tobytes() for part in parts) in (noise, b"")


@pytest.mark.parametrize("exchange", ["allgather", "scatter_allgather"])
@pytest.mark.parametrize("coding", CODED)
def test_exchange(exchange, coding):
    ranks, counts = 3, (5000, 3, 1200)
    network = Network(ranks)
    kinds = ("gaussian", "sparse", "zeros")  # messages of different sizes
    values = [[gradient(kinds[rank], count, rank) for count in counts] for rank in range(ranks)]
    results = {}
    for how in ("packed", coding):
        scheme = QSGD(4, "max", 100, how)
        entries = [Entry(str(i), count, "float32", scheme) for i, count in enumerate(counts)]
        exchanges = []
        for rank in range(ranks):
            bucket = GroupLayout(entries, ranks, rank, 0)
            uses = np.zeros(len(counts), np.uint64)
            data = BucketData(bucket, values[rank], uses, native)
            exchanges.append(Exchange(data, ALGORITHMS[exchange], network.ranks[rank], how))
        for one in exchanges:
            assert one.advance(wait=False)
        outs = [[np.empty(count, np.float32) for count in counts] for _ in range(ranks)]
        for one, out in zip(exchanges, outs, strict=True):
            one.finish(out)
        for out in outs[1:]:
            assert all(same(a, b) for a, b in zip(out, outs[0], strict=True))
        results[how] = outs[0], sum(one.received_bytes for one in exchanges)
        assert all(one.data.encoded_bytes > 0 for one in exchanges)
    assert all(same(a, b) for a, b in zip(results["packed"][0], results[coding][0], strict=True))
    assert results[coding][1] < results["packed"][1]


def test_reference_reads_what_it_should():
    # The reference's own parts, on words from the textbook.
    assert Bits(bytes([0b00000101]), 6).omega() == 4
    assert canonical([2, 1, 0, 2]) == {"0": 1, "10": 0, "11": 3}
    assert reference_expand(bytes([SPARSE]) + bytes(23), 5, 4, 1).tolist() == [0] * 5
