"""Several payloads in one message: the same bytes as one by one, and nothing trusted."""

import numpy as np
import pytest
import torch
from backends import EACH
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import with_checksum

from hvd_quant import NUQSGD, QSGD, encode, wire
from hvd_quant.codec import _native, native, torch_ops
from hvd_quant.codec.message import PREAMBLE_SIZE, SIZE_SIZE, MessageLayout, Messages, Segment, cut
from hvd_quant.codec.noise import Noise

PREAMBLE = b"preamble"
ENCODING = {"seeds": np.zeros(1, np.uint64), "shifts": np.zeros(1, np.uint32), "residuals": []}


def layout_of(*segments):
    return MessageLayout([Segment(*segment) for segment in segments], PREAMBLE)


def values_of(layout, seed=0):
    """Arrays that the segments are ranges of, and tensors over the same memory."""
    rng = np.random.default_rng(seed)
    ends = {}
    for segment in layout.segments:
        ends[segment.tensor] = max(ends.get(segment.tensor, 0), segment.start + segment.count)
    arrays = [
        rng.standard_normal(ends.get(i, 0)).astype(np.float32) for i in range(max(ends, default=-1) + 1)
    ]
    return arrays, [torch.from_numpy(array) for array in arrays]


def noise_of(layout, seeds=None):
    seeds = np.arange(len(layout.segments)) if seeds is None else seeds
    return Noise(np.array(seeds, np.uint64), np.zeros(len(seeds), np.uint32))


def native_message(layout, arrays, noise=None):
    message = np.full(layout.size, 0xAB, np.uint8)
    native.encode_message(arrays, layout, noise_of(layout) if noise is None else noise, message)
    return message


QUITE_GENERAL = layout_of(
    (1, 0, 1000, "float32", QSGD(bits=4)),
    (0, 512, 513, "float32", QSGD(bits=3, norm="l2", bucket_size=100)),
    (0, 0, 512, "float32", QSGD(bits=8)),
    (2, 5, 0, "float32", QSGD(bits=2)),
    (2, 0, 7, "float32", QSGD(bits=5, bucket_size=1)),
    (1, 1003, 900, "float32", NUQSGD(bits=3, bucket_size=64)),
)


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(0, 3000), max_size=6),
    bits=st.integers(2, 8),
    norm=st.sampled_from(["max", "l2"]),
    bucket_size=st.sampled_from([1, 100, 512, 5000]),
)
def test_payloads_are_those_of_encode(counts, bits, norm, bucket_size):
    scheme = QSGD(bits=bits, norm=norm, bucket_size=bucket_size)
    layout = layout_of(*((i, 0, count, "float32", scheme) for i, count in enumerate(counts)))
    arrays, _ = values_of(layout)
    message = native_message(layout, arrays)
    assert message[:PREAMBLE_SIZE].tobytes() == PREAMBLE
    expected = [encode(array, scheme, seed=seed) for seed, array in enumerate(arrays)]
    assert message[PREAMBLE_SIZE:].tobytes() == b"".join(payload.tobytes() for payload in expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_both_backends_read_both_backends_messages(dtype, factor):
    layout = layout_of((0, 0, 700, dtype, QSGD(bits=4)), (1, 0, 900, dtype, NUQSGD(bits=7, bucket_size=33)))
    tensors = [torch.randn(700).to(getattr(torch, dtype)), torch.randn(30, 30).to(getattr(torch, dtype))]

    def arrays(tensors):
        return [(t.view(torch.int16) if dtype == "bfloat16" else t).numpy() for t in tensors]

    one = native_message(layout, arrays(tensors))
    two = torch.empty(layout.size, dtype=torch.uint8)
    torch_ops.encode_message(tensors, layout, noise_of(layout, [5, 6]), two)
    by_native, by_torch = ([torch.full_like(t, float("nan")) for t in tensors] for _ in range(2))
    native.decode_messages([one, two.numpy()], layout, arrays(by_native), factor)
    torch_ops.decode_messages([torch.from_numpy(one), two], layout, by_torch, factor)
    for a, b, exact in zip(by_native, by_torch, tensors, strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()
        assert (a.double() - factor * exact.double()).abs().max() < factor * exact.abs().max()


def test_only_the_segments_are_written():
    layout = layout_of((0, 100, 50, "float32", QSGD()), (0, 200, 50, "float32", QSGD()))
    message = native_message(layout, [np.ones(300, np.float32)])
    out = np.full(300, 7.0, np.float32)
    native.decode_messages([message], layout, [out])
    written = np.zeros(300, bool)
    written[100:150] = written[200:250] = True
    assert np.all((out == 7.0) == ~written)


def test_flattened_reads_the_same_message():
    arrays, _ = values_of(QUITE_GENERAL)
    message = native_message(QUITE_GENERAL, arrays)
    apart = [np.zeros_like(array) for array in arrays]
    native.decode_messages([message], QUITE_GENERAL, apart)
    flat = np.empty(QUITE_GENERAL.count, np.float32)
    native.decode_messages([message], QUITE_GENERAL.flattened, [flat])
    expected = [apart[s.tensor][s.start : s.start + s.count] for s in QUITE_GENERAL.segments]
    assert np.array_equal(flat, np.concatenate(expected))


@pytest.mark.parametrize("backend", EACH, indirect=True)
def test_every_changed_byte_is_found(backend):
    arrays, _ = values_of(QUITE_GENERAL)
    message = native_message(QUITE_GENERAL, arrays)
    out = [np.zeros_like(array) for array in arrays]
    rng = np.random.default_rng(1)
    places = {
        *range(PREAMBLE_SIZE + wire.HEADER_SIZE),
        *rng.integers(0, message.size, 60).tolist(),
        message.size - 1,
    }
    codec = native if backend == "native" else torch_ops
    buffers = (lambda array: array) if backend == "native" else torch.from_numpy
    for place in places:
        damaged = message.copy()
        damaged[place] ^= 1 << int(rng.integers(8))
        both = [buffers(message), buffers(damaged)]
        with pytest.raises(ValueError, match=r"message|payload"):
            codec.decode_messages(both, QUITE_GENERAL, list(map(buffers, out)))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_message_with_damaged_padding_is_named(number):
    layout = layout_of((0, 0, 3, "float32", QSGD()), (1, 0, 8, "float32", QSGD()))
    arrays, _ = values_of(layout)
    messages = [native_message(layout, arrays) for _ in range(3)]
    first = slice(layout.offsets[0], layout.offsets[1])
    payload = bytearray(messages[number][first].tobytes())
    payload[-1] = 1  # two of its last eight bytes are padding
    messages[number][first] = np.frombuffer(with_checksum(bytes(payload)), np.uint8)
    with pytest.raises(ValueError, match=f"message {number} is damaged: its padding is not zero"):
        native.decode_messages(messages, layout, arrays)


@pytest.mark.parametrize("size", [0, 7, 8, QUITE_GENERAL.size - 1, QUITE_GENERAL.size + 1])
def test_other_sizes_are_refused(size):
    arrays, tensors = values_of(QUITE_GENERAL)
    message = np.resize(native_message(QUITE_GENERAL, arrays), size)
    says = f"^message 0 has {size} bytes, and {QUITE_GENERAL.size} were expected$"
    with pytest.raises(ValueError, match=says):
        native.decode_messages([message], QUITE_GENERAL, arrays)
    with pytest.raises(ValueError, match=says):
        torch_ops.decode_messages([torch.from_numpy(message)], QUITE_GENERAL, tensors)


def test_a_message_of_another_layout_is_refused():
    layout = layout_of((0, 0, 1000, "float32", QSGD(bits=4)))
    other = layout_of((0, 0, 1000, "float32", QSGD(bits=4, norm="l2")))
    message = native_message(other, [np.ones(1000, np.float32)])
    assert message.size == layout.size
    with pytest.raises(ValueError, match="another payload than was expected"):
        native.decode_messages([message], layout, [np.empty(1000, np.float32)])


def test_a_preamble_has_its_size():
    with pytest.raises(ValueError, match="8 bytes"):
        MessageLayout([], b"short")


# --- whose message it is --------------------------------------------------------------------------------

CODED = layout_of((0, 0, 1000, "float32", QSGD(bits=4, coding="elias")), (0, 0, 9, "float32", QSGD(2)))
PACKED = layout_of((0, 0, 1000, "float32", QSGD(bits=4)), (0, 0, 3, "float32", QSGD(2)))
FIRST_CODES = SIZE_SIZE + PREAMBLE_SIZE + wire.HEADER_SIZE + wire.norms_size(QSGD(), 1000)


def with_stated_size(message):
    message[PREAMBLE_SIZE : PREAMBLE_SIZE + SIZE_SIZE] = np.frombuffer(
        message.size.to_bytes(SIZE_SIZE, "little"), np.uint8
    )
    return message


def damage(kind, message):
    message = message.copy()
    if kind == "short":
        return message[:-8]
    if kind == "long":
        return np.append(message, np.zeros(8, np.uint8))
    if kind == "shorter than it says":
        return message[:-8]
    if kind == "too short to say it":
        return message[:12]
    if kind == "about something else":
        message[3] ^= 1
    elif kind == "another payload":
        message[PREAMBLE_SIZE + 6] ^= 1
    elif kind == "a flipped bit":
        message[PREAMBLE_SIZE + wire.HEADER_SIZE] ^= 1
    elif kind == "padding":
        payload = message[PACKED.offsets[1] :].copy()
        payload[-1] = 1
        message[PACKED.offsets[1] :] = np.frombuffer(with_checksum(payload.tobytes()), np.uint8)
    elif kind == "an unknown form":
        message[FIRST_CODES] = 99
    elif kind == "codes that go on":
        message[FIRST_CODES + 1 : FIRST_CODES + 2] = 1
    elif kind == "cut off":
        message = with_stated_size(message[: FIRST_CODES + 24])
    elif kind == "left over":
        message = with_stated_size(np.append(message, np.zeros(8, np.uint8)))
    return message


DAMAGES = [
    (PACKED, "short", "has {size} bytes, and {expected} were expected"),
    (PACKED, "long", "has {size} bytes, and {expected} were expected"),
    (
        PACKED,
        "about something else",
        "is about something else than was expected: its preamble is another one",
    ),
    (PACKED, "another payload", "holds another payload than was expected"),
    (PACKED, "a flipped bit", "is damaged: its checksum does not match its bytes"),
    (PACKED, "padding", "is damaged: its padding is not zero"),
    (CODED, "shorter than it says", "has {size} bytes, but says that it has {expected}"),
    (CODED, "too short to say it", "has 12 bytes, too few to say how many it should have"),
    (CODED, "an unknown form", "is damaged: its codes have an unknown form"),
    (CODED, "codes that go on", "is damaged: the head of its codes holds undefined values"),
    (CODED, "cut off", "is damaged: it ends before its codes"),
    (CODED, "left over", "has bytes left over"),
]


@pytest.mark.parametrize("ranks", [None, (7, 3, 5)])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(("layout", "kind", "says"), DAMAGES, ids=[kind for _, kind, _ in DAMAGES])
@pytest.mark.parametrize("codec", [native, torch_ops])
def test_an_error_is_a_sentence_about_the_message_that_is_wrong(codec, layout, kind, says, number, ranks):
    arrays, _ = values_of(layout)
    room = np.zeros(layout.size, np.uint8)
    message = room[: native.encode_message(arrays, layout, noise_of(layout), room)]
    messages = [message] * 3
    messages[number] = damage(kind, message)
    says = says.format(size=messages[number].size, expected=message.size)
    name = f"message {number}" if ranks is None else f"the message of rank {ranks[number]}"
    if codec is torch_ops:
        messages, arrays = ([torch.from_numpy(one.copy()) for one in many] for many in (messages, arrays))
    if ranks is not None:
        messages = Messages(messages, ranks)
    with pytest.raises(ValueError, match=r"\w") as raised:
        codec.decode_messages(messages, layout, arrays)
    assert str(raised.value) == f"{name} {says}"


@pytest.mark.parametrize("ranks", [None, (7, 3, 5)])
@pytest.mark.parametrize("codec", [native, torch_ops])
def test_an_error_of_what_is_averaged_as_it_is(codec, ranks):
    part = np.frombuffer(PREAMBLE + np.arange(4, dtype=np.float32).tobytes(), np.uint8)
    for kind, says in [
        ("long", "has 32 bytes, and 24 were expected"),
        ("about something else", "is about something else than was expected: its preamble is another one"),
    ]:
        parts, out = [part, damage(kind, part), part], np.zeros(4, np.float32)
        if codec is torch_ops:
            parts, out = [torch.from_numpy(one.copy()) for one in parts], torch.from_numpy(out)
        with pytest.raises(
            ValueError, match=f"^{'message 1' if ranks is None else 'the message of rank 3'} {says}$"
        ):
            codec.mean_float32(Messages(parts, ranks), PREAMBLE, out)


def test_what_the_native_codec_says_of_other_things_stays():
    messages = Messages([], [4])
    assert messages.name_in("no messages to decode") == "no messages to decode"
    assert (
        messages.name_in("message 0 is damaged: it is late") == "the message of rank 4 is damaged: it is late"
    )


@pytest.mark.parametrize("codec", [native, torch_ops])
@pytest.mark.parametrize(
    ("layout", "whence", "says"),
    [
        (PACKED, "", f"together they have 13 bytes, and {2 * PACKED.size} were expected"),
        (PACKED, " that rank 6 has passed on", f"together they have 13 bytes, and {2 * PACKED.size} were"),
        (CODED, "", "together they have 13 bytes, not what they say that they have"),
    ],
)
def test_lengths_that_do_not_add_up_are_nobodys(codec, layout, whence, says):
    received, (arrays, tensors) = np.zeros(13, np.uint8), values_of(layout)
    messages = cut(received, [layout.fixed_size] * 2, [5, 8], whence)
    assert [message.size for message in messages] == [0, 0]
    for some in (messages, messages.of([1])):
        if codec is torch_ops:
            some = Messages([torch.from_numpy(one) for one in some], some.ranks, some.fault)
        with pytest.raises(ValueError, match=f"^the lengths of the 2 messages{whence} do not add up: {says}"):
            codec.decode_messages(some, layout, arrays if codec is native else tensors)


def test_a_message_alone_has_its_own_length():
    (message,) = messages = cut(np.zeros(13, np.uint8), [PACKED.size], [5])
    assert message.size == 13
    with pytest.raises(
        ValueError, match=f"^the message of rank 5 has 13 bytes, and {PACKED.size} were expected$"
    ):
        native.decode_messages(messages, PACKED, values_of(PACKED)[0])


# --- the native functions, called with nonsense ---------------------------------------------------------


def arguments(**changes):
    layout = layout_of((0, 0, 100, "float32", QSGD()))
    return {
        "table": layout.table.copy(),
        "headers": layout.headers,
        "first_word": wire.FIRST_BODY_WORD,
        "checksum_word": wire.CHECKSUM_WORD,
        "threads": 1,
        **changes,
    }


COLUMNS = (
    "tensor",
    "start",
    "count",
    "dtype",
    "bits",
    "norm",
    "spacing",
    "rounding",
    "bucket_size",
    "offset",
)
BAD_ROWS = [
    (column, value)
    for column, bad in {
        "tensor": (-1, 1, 2**62),
        "start": (-1, 1, 101, 2**62),
        "count": (-1, 101, 2**62, 2**63 - 1),
        "dtype": (-1, 1, 4, 2**62),
        "bits": (-1, 0, 1, 9, 2**32 + 4),
        "norm": (-1, 2),
        "spacing": (-1, 2),
        "rounding": (-1, 2),
        "bucket_size": (-1, 0),
        "offset": (-1, 9, 2**62, 2**63 - 1),
    }.items()
    for value in bad
]


@pytest.mark.parametrize(("column", "value"), BAD_ROWS)
def test_a_table_that_reaches_out_of_bounds_is_refused(column, value):
    table = arguments()["table"]
    table[0, COLUMNS.index(column)] = value
    size = layout_of((0, 0, 100, "float32", QSGD())).size
    array, message = np.ones(100, np.float32), np.zeros(size, np.uint8)
    with pytest.raises(ValueError, match=r"table row 0|wrong size|count is too large"):
        _native.encode_segments([array], **ENCODING, message=message, **arguments(table=table))
    with pytest.raises(ValueError, match=r"table row 0|wrong size|count is too large"):
        _native.decode_segments([message], outs=[array], weight=1.0, **arguments(table=table))
    assert np.all(array == 1)


def test_payloads_that_overlap_in_a_message_of_varying_size_are_refused():
    packed, coded = QSGD(8, "max", 2**40), QSGD(8, "max", 2**40, "elias")
    count = 4000
    layout = layout_of(
        (0, 0, count, "float32", packed), (0, 0, count, "float32", packed), (0, 0, 8, "float32", coded)
    )
    table = layout.table.copy()
    table[:, COLUMNS.index("offset")] = [0, 0, layout.segments[0].payload_size]
    size = int(table[2, COLUMNS.index("offset")]) + layout.segments[2].payload_size
    message = np.zeros(size, np.uint8)
    with pytest.raises(ValueError, match="row 1 overlaps the one before"):
        _native.encode_segments(
            [np.ones(count, np.float32)],
            table,
            layout.headers,
            np.zeros(3, np.uint64),
            np.zeros(3, np.uint32),
            first_word=wire.FIRST_BODY_WORD,
            checksum_word=wire.CHECKSUM_WORD,
            message=message,
            residuals=[],
            threads=1,
        )
    assert not message.any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"table": np.zeros((1, 9), np.int64)}, "table has the wrong shape"),
        ({"table": np.zeros(10, np.int64)}, "table has the wrong shape"),
        ({"headers": np.zeros((2, 32), np.uint8)}, "headers have the wrong shape"),
        ({"headers": np.zeros((1, 31), np.uint8)}, "headers have the wrong shape"),
        ({"checksum_word": 8}, "checksum_word is outside"),
    ],
)
def test_tables_of_the_wrong_shape_are_refused(changes, says):
    array, message = np.ones(100, np.float32), np.zeros(500, np.uint8)
    with pytest.raises(ValueError, match=says):
        _native.encode_segments([array], **ENCODING, message=message, **arguments(**changes))
    with pytest.raises(ValueError, match=says):
        _native.decode_segments([message], outs=[array], weight=1.0, **arguments(**changes))


def test_seeds_of_tensors_that_are_not_there_are_refused():
    seeds = np.zeros(2, np.uint64)
    assert len(set(native.step_seeds(seeds, np.array([0, 1]), np.array([5, 6], np.uint64)).tolist())) == 2
    for tensors in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="not there"):
            native.step_seeds(seeds, np.array(tensors), seeds)
    with pytest.raises(ValueError, match="wrong shape"):
        native.step_seeds(seeds, np.array([0]), seeds)


def shifted(array):
    """The array at an address that is not a multiple of its items' size."""
    moved = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def test_numbers_that_are_not_aligned_are_refused():
    array, message, table = np.ones(100, np.float32), np.zeros(500, np.uint8), arguments()["table"]
    for name in ("seeds", "shifts"):
        with pytest.raises(ValueError, match=f"{name} are not aligned"):
            _native.encode_segments(
                [array], **(ENCODING | {name: shifted(ENCODING[name])}), message=message, **arguments()
            )
    with pytest.raises(ValueError, match="table is not aligned"):
        _native.encode_segments([array], **ENCODING, message=message, **arguments(table=shifted(table)))
    with pytest.raises(ValueError, match="table is not aligned"):
        _native.decode_segments([message], outs=[array], weight=1.0, **arguments(table=shifted(table)))
    good = [np.zeros(2, np.uint64), np.zeros(2, np.int64), np.zeros(2, np.uint64)]
    for i in range(3):
        with pytest.raises(ValueError, match="are not aligned"):
            native.step_seeds(*good[:i], shifted(good[i]), *good[i + 1 :])


def test_arrays_that_cannot_be_used_are_refused():
    message = np.zeros(500, np.uint8)
    for array in (np.ones(200, np.float32)[::2], np.ones(100), np.ones(100, np.float16)):
        with pytest.raises(ValueError, match=r"contiguous|wrong size"):
            _native.encode_segments([array], **ENCODING, message=message, **arguments())
    array = np.ones(100, np.float32)
    with pytest.raises(ValueError, match="one seed"):
        _native.encode_segments(
            [array], **(ENCODING | {"shifts": np.zeros(2, np.uint32)}), message=message, **arguments()
        )
    with pytest.raises(ValueError, match="one seed"):
        _native.encode_segments(
            [array], **(ENCODING | {"seeds": np.zeros(2, np.uint64)}), message=message, **arguments()
        )
    message.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _native.encode_segments([array], **ENCODING, message=message, **arguments())
    array.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _native.decode_segments([message], outs=[array], weight=1.0, **arguments())
    with pytest.raises(ValueError, match="no messages"):
        _native.decode_segments([], outs=[np.ones(100, np.float32)], weight=1.0, **arguments())
    with pytest.raises(ValueError, match="differ in size"):
        _native.decode_segments(
            [message, message[:-8]], outs=[np.ones(100, np.float32)], weight=1.0, **arguments()
        )
