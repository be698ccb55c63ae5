"""The codec in TensorFlow operations: the native codec's bytes and values, but for the noise."""

import itertools
import math
import os

import numpy as np
import pytest
from reference import GOLDEN_PAYLOADS, golden, golden_name, with_checksum

from hvd_quant import NUQSGD, QSGD, wire
from hvd_quant.codec import native
from hvd_quant.codec.message import PREAMBLE_SIZE, MessageLayout, Segment
from hvd_quant.codec.noise import Noise, shift

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")
from hvd_quant.codec import tf_ops  # noqa: E402

KINDS = [QSGD, NUQSGD]
DTYPES = ["float32", "float64", "float16", "bfloat16"]
COUNTS = [1, 7, 512, 1000, 5000]  # of values, and in buckets

# Seeds are fixed, so a test passes always or never. This bounds the probability that ideal noise would have
# failed any of this module's statistical comparisons; each gets its share of it.
FALSE_ALARMS = 1e-9
COMPARISONS = 100_000  # more than this module makes
LOG = math.log(2 * COMPARISONS / FALSE_ALARMS)


def deviation(variance, largest):
    """What |sum of independent centred terms| exceeds with that share at most: Bernstein's bound."""
    return largest * LOG / 3 + np.sqrt((largest * LOG / 3) ** 2 + 2 * variance * LOG)


def layout_of(schemes_and_counts, dtype="float32"):
    """A message with a tensor for each segment."""
    segments = [Segment(i, 0, count, dtype, scheme) for i, (scheme, count) in enumerate(schemes_and_counts)]
    return MessageLayout(segments, b"preamble")


def every_scheme(kind, **options):
    """All norms and bits with all counts; bucket sizes change places."""
    return [
        (kind(bits, norm, COUNTS[(i + bits + (norm == "l2")) % 5], **options), count)
        for norm, bits in itertools.product(["max", "l2"], range(2, 9))
        for i, count in enumerate(COUNTS)
    ]


def values_of(layout, seed=0):
    """Tensors of very different scales, with buckets of zeros and with a NaN or Inf in some."""
    rng = np.random.default_rng(seed)
    tensors = []
    for number, segment in enumerate(layout.segments):
        small = 3 if segment.dtype == "float16" else 34
        values = rng.standard_normal(segment.count) * 10.0 ** rng.integers(-small, small + 3)
        values[np.abs(values) < 2.0**-126] = 0  # subnormal ones are zeros in TensorFlow
        if number % 3 == 0:
            values[: segment.count // 3] = 0
        if number % 4 == 0:
            values[segment.count // 2] = [np.nan, np.inf, -np.inf][number // 4 % 3]
        with np.errstate(over="ignore"):
            tensors.append(tf.cast(tf.constant(values), segment.dtype))
    return tensors


def memory(tensor):
    """As the native codec reads and writes it."""
    array = tensor.numpy().copy()
    return array.view(np.int16) if tensor.dtype == tf.bfloat16 else array


def seeds_of(layout, start=0):
    return tf.range(start, start + len(layout.segments), dtype=tf.int64)


def encode(values, layout, seeds=None, shifts=None):
    seeds = seeds_of(layout) if seeds is None else seeds
    shifts = [0] * len(layout.segments) if shifts is None else shifts
    return tf_ops.encode_message(values, layout, seeds, shifts).numpy()


def native_encode(values, layout, start=0):
    count = len(layout.segments)
    noise = Noise(np.arange(start, start + count, dtype=np.uint64), np.zeros(count, np.uint32))
    message = np.zeros(layout.size, np.uint8)
    native.encode_message([memory(tensor) for tensor in values], layout, noise, message)
    return message


def shapes_of(layout):
    return [(segment.count,) for segment in layout.segments]


def decode(messages, layout, dtypes=None, shapes=None, factor=1.0):
    dtypes = [tf.as_dtype(segment.dtype) for segment in layout.segments] if dtypes is None else dtypes
    shapes = shapes_of(layout) if shapes is None else shapes
    return tf_ops.decode_messages(
        tf.constant(np.stack(messages)), layout, dtypes, shapes, tf.constant(factor, tf.float64)
    )


def native_decode(messages, layout, factor=1.0):
    out = [memory(tf.zeros([segment.count], segment.dtype)) for segment in layout.segments]
    native.decode_messages(messages, layout, out, factor)
    return out


def assert_same_bits(tensors, arrays):
    for number, (tensor, array) in enumerate(zip(tensors, arrays, strict=True)):
        found = memory(tensor)
        assert found.dtype == array.dtype
        nan = tf.math.is_nan(tensor).numpy()
        bits = f"i{array.itemsize}"
        same = found.view(bits) == array.view(bits)
        if nan.any():  # of which the bits are nobody's business
            expected = tf.bitcast(tf.constant(array), tensor.dtype) if array.dtype == np.int16 else array
            same |= nan & tf.math.is_nan(expected).numpy()
        assert same.all(), (number, np.flatnonzero(~same)[:5])


def arbitrary_messages(layout, count, seed):
    """Valid messages of norms and codes that no encoder writes."""
    rng = np.random.default_rng(seed)
    special = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-42, 2.0**-126, 3e-38, 1e-33, 2.0**-90, 3.4e38]
    messages = []
    for _ in range(count):
        message = bytearray(layout.size)
        message[:PREAMBLE_SIZE] = layout.preamble
        for segment, offset, header in zip(layout.segments, layout.offsets, layout.headers, strict=True):
            size = wire.norms_size(segment.scheme, segment.count)
            norms = (rng.standard_normal(size // 4) * 10.0 ** rng.integers(-40, 38)).astype(np.float32)
            replaced = rng.random(size // 4) < 0.3
            norms[replaced] = rng.choice(np.array(special, np.float32), replaced.sum())
            codes = rng.integers(0, 256, wire.codes_size(segment.scheme, segment.count), np.uint8)
            payload = header.tobytes() + norms.tobytes() + codes.tobytes()
            payload = with_checksum(payload.ljust(segment.payload_size, b"\0"))
            message[offset : offset + segment.payload_size] = payload
        messages.append(np.frombuffer(bytes(message), np.uint8))
    return messages


# Others are decoded by the host.
PACKED_GOLDEN = [path for path in GOLDEN_PAYLOADS if path.read_bytes()[8] == 0]


@pytest.mark.parametrize("path", PACKED_GOLDEN, ids=golden_name)
def test_golden_payload(path):
    payload = path.read_bytes()
    header = wire.parse_header(payload, len(payload))
    layout = layout_of([(header.scheme, header.count)])
    message = np.frombuffer(layout.preamble + payload, np.uint8)
    assert_same_bits(decode([message], layout), [golden(path, "values")])


# --- bytes and values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_nearest_gives_the_native_bytes(kind):
    layout = layout_of(every_scheme(kind, rounding="nearest"))
    values = values_of(layout)
    assert np.array_equal(encode(values, layout), native_encode(values, layout))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounding_to_nearest_gives_the_native_bytes_of_other_dtypes(dtype):
    schemes = [
        kind(bits, norm, 100, rounding="nearest") for kind in KINDS for norm, bits in (("max", 4), ("l2", 5))
    ]
    layout = layout_of([(scheme, 1000) for scheme in schemes], dtype)
    values = values_of(layout)
    assert np.array_equal(encode(values, layout), native_encode(values, layout))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_leaves_headers_norms_and_padding_as_they_are(kind):
    layout = layout_of(every_scheme(kind))
    values = values_of(layout)
    mine, other = encode(values, layout), native_encode(values, layout)
    for segment, offset in zip(layout.segments, layout.offsets, strict=True):
        norms = slice(
            offset + wire.HEADER_SIZE,
            offset + wire.HEADER_SIZE + wire.norms_size(segment.scheme, segment.count),
        )
        assert np.array_equal(mine[norms], other[norms])
    # The rest of the headers, checksums and padding: the native decoder looks at them.
    assert_same_bits(decode([mine], layout), native_decode([mine], layout))
    assert_same_bits(decode([other], layout), native_decode([other], layout))


@pytest.mark.parametrize(("count", "factor"), [(1, 1.0), (2, 1.0), (3, 3.0), (3, 2.0**-20)])
@pytest.mark.parametrize("kind", KINDS)
def test_means_are_those_of_native(kind, count, factor):
    schemes = every_scheme(kind)[::2]
    layout = layout_of(schemes)
    messages = [native_encode(values_of(layout, seed), layout, seed) for seed in range(count)]
    assert_same_bits(decode(messages, layout, factor=factor), native_decode(messages, layout, factor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_messages_that_no_encoder_writes_decode_alike(kind, dtype):
    layout = layout_of([(kind(bits, "max", 5), 300) for bits in range(2, 9)], dtype)
    messages = arbitrary_messages(layout, 3, seed=len(dtype))
    for some in (messages[:1], messages):
        assert_same_bits(decode(some, layout), native_decode(some, layout))
    for message in messages:
        assert_same_bits(decode([message], layout, factor=1e-9), native_decode([message], layout, 1e-9))


def test_decoding_without_subnormal_numbers_needs_no_float64():
    layout = layout_of([(QSGD(bits, "max", 5), 300) for bits in range(2, 9)] + [(NUQSGD(4, "max", 5), 300)])
    messages = tf.constant(
        np.stack([native_encode([tf.random.stateless_normal([300], [i, 0]) for i in range(8)], layout)])
    )
    assert not tf_ops._may_be_subnormal(messages, layout)
    assert tf_ops._may_be_subnormal(tf.constant(np.stack(arbitrary_messages(layout, 1, 0))), layout)


def test_ranges_of_tensors_of_any_shape():
    segments = [
        Segment(1, 0, 500, "float64", QSGD(4)),
        Segment(0, 0, 700, "float32", QSGD(3, rounding="nearest")),
        Segment(1, 500, 100, "float64", NUQSGD(5, bucket_size=33)),
        Segment(2, 0, 0, "float16", QSGD(2)),
        Segment(3, 5, 20, "float32", QSGD(8)),
    ]
    layout = MessageLayout(segments, b"\x80\xff\0abcde")
    rng = np.random.default_rng(1)
    shapes = [(7, 100), (20, 5, 6), (0, 3), (40,)]
    kinds = [np.float32, np.float64, np.float16, np.float32]
    values = [rng.standard_normal(shape).astype(kind) for shape, kind in zip(shapes, kinds, strict=True)]
    message = encode([tf.constant(array) for array in values], layout)
    out = [np.zeros(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    native.decode_messages([message], layout, out)
    decoded = decode([message], layout, [tf.as_dtype(kind) for kind in kinds], shapes)
    assert [tuple(tensor.shape) for tensor in decoded] == shapes
    assert_same_bits(decoded, out)
    assert not decoded[3].numpy()[:5].any()
    assert not decoded[3].numpy()[25:].any()


def test_large_payloads_have_the_native_checksum():
    layout = layout_of([(QSGD(8, "max", rounding="nearest"), 3_000_000)])
    values = [tf.random.stateless_normal([3_000_000], [1, 2])]
    assert np.array_equal(encode(values, layout), native_encode(values, layout))


def test_what_cannot_be_is_refused():
    coded = layout_of([(QSGD(coding="elias"), 10)])
    with pytest.raises(ValueError, match="packed"):
        encode([tf.zeros(10)], coded)
    with pytest.raises(ValueError, match="packed"):
        decode([np.zeros(coded.size, np.uint8)], coded)
    layout = layout_of([(QSGD(), 10)])
    with pytest.raises(ValueError, match="argument"):
        encode([tf.zeros(10)], layout, shifts=[0, 0])
    twice = MessageLayout(
        [Segment(0, 0, 10, "float32", QSGD()), Segment(0, 9, 10, "float32", QSGD())], b"preamble"
    )
    with pytest.raises(ValueError, match="segments of tensor 0 overlap at value 9"):
        decode([encode([tf.zeros(19)], twice)], twice, [tf.float32], [(19,)])


# --- damage ---------------------------------------------------------------------------------------------


def test_every_changed_byte_is_found():
    layout = layout_of([(QSGD(3, bucket_size=16), 50), (NUQSGD(4), 7)])
    message = encode(values_of(layout), layout)
    run = tf.function(
        lambda messages: tf_ops.decode_messages(messages, layout, [tf.float32] * 2, shapes_of(layout), 1.0)
    )
    run(tf.constant(np.stack([message, message])))
    rng = np.random.default_rng(0)
    for place in range(layout.size):
        damaged = message.copy()
        damaged[place] ^= 1 << int(rng.integers(8))
        number = place % 2
        pair = [damaged, message] if number == 0 else [message, damaged]
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"message {number} (is|holds) \w+"):
            run(tf.constant(np.stack(pair)))


@pytest.mark.parametrize(
    ("place", "repair", "says"),
    [
        (0, False, "message 1 is not the one that was expected"),
        (PREAMBLE_SIZE + 6, True, "message 1 holds another payload than was expected"),
        (
            PREAMBLE_SIZE + wire.HEADER_SIZE,
            False,
            "message 1 is damaged: its checksum does not match its bytes",
        ),
        (-1, True, "message 1 is damaged: its padding is not zero"),
    ],
)
@pytest.mark.parametrize("graph", [False, True])
def test_damage_is_named(graph, place, repair, says):
    layout = layout_of([(QSGD(), 3)])
    message = encode([tf.constant([1.0, 2.0, 3.0])], layout)
    damaged = message.copy()
    damaged[place] ^= 1
    if repair:
        payload = with_checksum(damaged[PREAMBLE_SIZE:].tobytes())
        damaged[PREAMBLE_SIZE:] = np.frombuffer(payload, np.uint8)
    run = (
        tf.function(lambda: decode([message, damaged], layout))
        if graph
        else lambda: decode([message, damaged], layout)
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=says):
        run()


def test_a_message_of_another_size_is_refused():
    layout = layout_of([(QSGD(), 3)])
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="shape"):
        decode([np.zeros(layout.size + 8, np.uint8)], layout)


# --- noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_with_the_exact_variance(kind, bits, norm):
    d, copies = 256, 2048
    v = np.random.default_rng(7).standard_normal(d).astype(np.float32)
    # A rank of several that round together is, alone, no different.
    scheme = kind(bits, norm, d, rounding="correlated" if bits == 4 else "independent")
    layout = layout_of([(scheme, d * copies)])
    message = encode([tf.tile(v, [copies])], layout, shifts=[shift(scheme, 5, 7)])
    errors = native_decode([message], layout)[0].reshape(copies, d) - v.astype(np.float64)
    scale = float(message[PREAMBLE_SIZE + wire.HEADER_SIZE :][:4].view(np.float32)[0])  # N
    levels = scheme.levels() * scale
    v = v.astype(np.float64)
    j = np.clip(np.searchsorted(levels, np.abs(v), side="right") - 1, 0, scheme.num_levels - 1)
    step = levels[j + 1] - levels[j]
    below = np.minimum(np.abs(v) - levels[j], step)
    above = step - below
    variance = below * above
    rounding = scale * 2.0**-22  # what float32 arithmetic and 23 bits of noise may shift an expectation by
    # Per value, and over all values: up or down, and towards zero or away from it.
    limit = deviation(copies * variance, step + rounding) / copies + rounding
    assert (np.abs(errors.mean(axis=0)) <= limit).all()
    limit = deviation(copies * variance.sum(), step.max() + rounding) + copies * d * rounding
    assert abs(errors.sum()) <= limit
    assert abs((errors * np.sign(v)).sum()) <= limit
    # The squared errors, each of which is below^2 or above^2.
    unit = step.max()
    spread = (variance * (above - below) ** 2).sum() / unit**4
    limit = deviation(copies * spread, 1.0) + copies * d * 3 * rounding / unit
    assert abs((errors**2).sum() / unit**2 - copies * variance.sum() / unit**2) <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_values_and_seeds_is_uncorrelated(kind):
    count, ups = 2**18, []
    scheme = kind(2, "max", count + 1)  # of the norm, a half is rounded up half of the time
    layout = layout_of([(scheme, count + 1)])
    values = [tf.concat([tf.fill([count], 0.5), [1.0]], 0)]
    for seed in (0, 1, 2**62):
        decoded = native_decode([encode(values, layout, tf.constant([seed], tf.int64))], layout)[0][:-1]
        ups.append(2.0 * decoded - 1)
        assert set(np.unique(ups[-1])) == {-1, 1}
    limit = deviation(count, 1.0)
    for a, b in itertools.combinations(ups, 2):
        assert abs(a.sum()) <= limit
        assert abs(a @ b) <= limit
        for lag in (1, 2, 4, 512, 4096):
            assert abs(a[lag:] @ a[:-lag]) <= limit
            assert abs(a[lag:] @ b[:-lag]) <= limit


@pytest.mark.parametrize("size", [2, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_correlated_rounding_makes_the_mean_of_equal_gradients_nearly_exact(kind, size):
    x = np.random.default_rng(size).standard_normal(300).astype(np.float32)
    layout = layout_of([(kind(bits, "max", 300, rounding="correlated"), 300) for bits in (2, 4, 7)])
    schemes = [segment.scheme for segment in layout.segments]
    messages = [
        encode([tf.constant(x)] * 3, layout, shifts=[shift(scheme, rank, size) for scheme in schemes])
        for rank in range(size)
    ]
    for scheme, mean in zip(schemes, native_decode(messages, layout), strict=True):
        n = np.abs(x).max()
        levels = scheme.levels() * n
        j = np.clip(np.searchsorted(levels, np.abs(x), side="right") - 1, 0, scheme.num_levels - 1)
        assert (np.abs(mean - x) <= (levels[j + 1] - levels[j]) / size + n * 2.0**-20).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_itself_is_never_rounded_up(kind, monkeypatch):
    monkeypatch.setattr(tf.random, "stateless_uniform", lambda shape, *args, **kwargs: tf.zeros(shape))
    layout = layout_of([(kind(bits, "max", 1), 20_000) for bits in (2, 7, 8)])
    x = np.random.default_rng(0).random(20_000).astype(np.float32)
    for decoded in native_decode([encode([tf.constant(x)] * 3, layout)], layout):
        assert (np.abs(decoded - x) <= 2.0**-22 * x).all()


def test_seeds_are_those_of_native():
    base = np.random.default_rng(0).integers(0, 2**64, 5, np.uint64)
    for use in (0, 1, 2**40):
        expected = native.step_seeds(base, np.zeros(5, np.int64), np.array([use], np.uint64))
        seeds = tf_ops.step_seeds(base, tf.constant(use, tf.int64))
        assert seeds.dtype == tf.int64
        assert np.array_equal(seeds.numpy().view(np.uint64), expected)


# --- graphs ---------------------------------------------------------------------------------------------


def test_one_trace_serves_many_steps_and_numbers_of_messages():
    layout = layout_of([(QSGD(4), 1000), (NUQSGD(7), 600)])
    base = np.array([3, 4], np.uint64)
    uses = tf.Variable(0, dtype=tf.int64)
    traces = []

    @tf.function(input_signature=[tf.TensorSpec([1000]), tf.TensorSpec([30, 20])])
    def send(*values):
        traces.append("send")
        seeds = tf_ops.step_seeds(base, uses.assign_add(1) - 1)
        return tf_ops.encode_message(values, layout, seeds, [0, 0])

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.uint8), tf.TensorSpec([], tf.float64)])
    def receive(messages, factor):
        traces.append("receive")
        return tf_ops.decode_messages(messages, layout, [tf.float32, tf.float16], [(1000,), (30, 20)], factor)

    values = [tf.random.stateless_normal([1000], [1, 1]), tf.random.stateless_normal([30, 20], [2, 2])]
    messages = [send(*values).numpy() for _ in range(4)]
    assert len({message.tobytes() for message in messages}) == 4
    for step, message in enumerate(messages):
        seeds = tf_ops.step_seeds(base, tf.constant(step, tf.int64))
        assert np.array_equal(encode(values, layout, seeds), message)  # the same eagerly
    for count in (1, 3, 4):
        out = [np.zeros(1000, np.float32), np.zeros((30, 20), np.float16)]
        half = MessageLayout(
            [layout.segments[0], Segment(1, 0, 600, "float16", layout.segments[1].scheme)], layout.preamble
        )
        native.decode_messages(messages[:count], half, out, 1 / 3)
        decoded = receive(tf.constant(np.stack(messages[:count])), tf.constant(1 / 3, tf.float64))
        assert_same_bits(decoded, out)
    assert traces == ["send", "receive"]


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_compute_what_is_computed_eagerly(kind):
    """TensorFlow's graph optimizer leaves the rounding alone."""
    layout = layout_of([(kind(bits, "max", 100, rounding="nearest"), 3000) for bits in range(2, 9)])
    values = [tf.random.stateless_normal([3000], [bits, 0]) for bits in range(2, 9)]
    message = native_encode(values, layout)
    graph = tf.function(lambda *values: tf_ops.encode_message(values, layout, seeds_of(layout), [0] * 7))
    assert np.array_equal(graph(*values).numpy(), message)
    for messages in ([message] * 3, arbitrary_messages(layout, 3, 0)):
        receive = tf.function(
            lambda messages: tf_ops.decode_messages(
                messages, layout, [tf.float32] * 7, shapes_of(layout), 1.0
            )
        )
        assert_same_bits(receive(tf.constant(np.stack(messages))), native_decode(messages, layout))
