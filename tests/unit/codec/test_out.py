"""Memory that callers give to the codec gets the bytes and values that fresh memory gets, and no more."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hvd_quant
from hvd_quant import NUQSGD, QSGD, decode, encode, max_payload_size, wire
from hvd_quant.codec import flat_array, native, torch_ops

GUARD = 0xA5
schemes = st.builds(
    lambda kind, *fields: kind(*fields),
    st.sampled_from([QSGD, NUQSGD]),
    st.integers(2, 8),
    st.sampled_from(["max", "l2"]),
    st.integers(1, 70),
    st.sampled_from(["packed", "elias", "huffman"]),
    st.sampled_from(["independent", "nearest"]),
)
counts = st.integers(0, 400)
TORCH_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def gaussian(n, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def guarded(size, before):
    """Bytes within others, at an address of any alignment; and a check that the others are as they were."""
    memory = np.full(before + size + 24, GUARD, np.uint8)

    def is_untouched():
        return np.all(memory[:before] == GUARD) and np.all(memory[before + size :] == GUARD)

    return memory[before : before + size], is_untouched


def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data


def bits_of(tensor):
    """Its bytes, which tell -0.0 from 0.0 and one NaN from another."""
    return flat_array(tensor).tobytes()


# --- the same as in fresh memory ------------------------------------------------------------------------


@given(counts, schemes, st.integers(0, 2**64 - 1), st.integers(0, 9), st.integers(0, 20))
def test_encoding_to_memory_writes_the_same_bytes(backend, count, scheme, seed, before, extra):
    values = gaussian(count, seed % 100)
    expected = encode(values, scheme, seed=seed, backend=backend)
    size = max_payload_size(scheme, count) + (extra if scheme.coding != "packed" else 0)
    out, is_untouched = guarded(size, before)
    payload = encode(values, scheme, seed=seed, backend=backend, out=out)
    assert payload.tobytes() == expected.tobytes()
    assert address(payload) == address(out)
    assert (payload is out) == (payload.size == out.size)
    assert is_untouched()

    for is_part in (False, True):  # of a tensor: then torch counts from that one's beginning
        out, is_untouched = guarded(size, before)
        out = torch.from_numpy(out.base)[before : before + size] if is_part else torch.from_numpy(out)
        payload = encode(torch.from_numpy(values), scheme, seed=seed, backend=backend, out=out)
        assert payload.numpy().tobytes() == expected.tobytes()
        assert address(payload) == address(out)
        assert (payload is out) == (payload.numel() == out.numel())
        assert is_untouched()


@given(
    counts, schemes, st.sampled_from([np.float32, np.float64, np.float16]), st.sampled_from([1.0, 1e-6, 1e5])
)
def test_decoding_to_an_array_writes_the_same_values(backend, count, scheme, dtype, scale):
    payload = encode(gaussian(count, scale=scale), scheme, backend=backend)
    with np.errstate(over="ignore"):
        expected = decode(payload, backend=backend).astype(dtype)
    for shape in ((count,), (1, count, 1), (count // 2, 2) if count % 2 == 0 else (count, 1)):
        memory, is_untouched = guarded(count * expected.itemsize, 8)
        out = memory.view(dtype).reshape(shape)
        for given_payload in (payload, payload.tobytes()):
            out[...] = -1
            assert decode(given_payload, backend=backend, out=out) is out
            assert out.tobytes() == expected.tobytes()
            assert is_untouched()


@given(counts, schemes, st.sampled_from(TORCH_DTYPES), st.sampled_from([1.0, 1e-6, 1e5]))
def test_decoding_to_a_tensor_writes_the_same_values(backend, count, scheme, dtype, scale):
    payload = torch.from_numpy(encode(gaussian(count, scale=scale), scheme, backend=backend))
    expected = decode(payload, backend=backend).to(dtype)
    for shape in ((count,), (1, count, 1)):
        memory = torch.full((count + 2,), 7.0, dtype=dtype)
        out = memory[1 : count + 1].view(shape)
        assert decode(payload, backend=backend, out=out) is out
        assert bits_of(out) == bits_of(expected)
        assert memory[0] == memory[-1] == 7.0


def test_decoding_to_bfloat16_of_a_package_beside_numpy(backend):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    payload = encode(gaussian(300), QSGD(), backend=backend)
    out = np.zeros((30, 10), bfloat16)
    assert decode(payload, backend=backend, out=out) is out
    expected = torch.from_numpy(decode(payload, backend=backend)).to(torch.bfloat16)
    np.testing.assert_array_equal(out.reshape(-1).astype(np.float32), expected.float().numpy())


def test_large_arrays(backend):
    """So large that they are written past the caches."""
    values, scheme = gaussian(3_000_000), QSGD(bits=8)
    if backend == "torch":
        values = values[:100_000]
    expected = encode(values, scheme, backend=backend)
    for before in (0, 1):
        out, is_untouched = guarded(expected.size, before)
        assert encode(values, scheme, backend=backend, out=out) is out
        np.testing.assert_array_equal(out, expected)
        assert is_untouched()
    approximation = np.empty_like(values)
    decode(out, backend=backend, out=approximation)
    np.testing.assert_array_equal(approximation, decode(expected, backend=backend))


def test_arrays_of_another_class():
    payload = encode(gaussian(12), QSGD())
    out = np.zeros((3, 4), np.float32).view(np.matrix)
    assert decode(payload, out=out) is out
    np.testing.assert_array_equal(np.asarray(out).reshape(-1), decode(payload))


def test_a_mean_is_written_to_memory():
    payloads = [torch.from_numpy(encode(gaussian(100, seed), QSGD())) for seed in range(3)]
    expected = torch_ops.decode_mean(payloads, factor=0.7)
    out = torch.empty(100)
    assert torch_ops.decode_mean(payloads, out, factor=0.7) is out
    assert torch.equal(out, expected)


def test_error_feedback_of_coded_payloads_in_memory():
    values, scheme = gaussian(1000), QSGD(3, "max", 100, "huffman")
    residual, other = np.full(1000, 0.5, np.float32), np.full(1000, 0.5, np.float32)
    expected = native.encode(values, scheme, 4, 9, residual=residual)
    out = np.empty(max_payload_size(scheme, 1000), np.uint8)
    payload = native.encode(values, scheme, 4, 9, residual=other, out=out)
    assert payload.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(other, residual)


# --- the largest size -----------------------------------------------------------------------------------


@given(counts, schemes)
def test_the_largest_size(count, scheme):
    size = max_payload_size(scheme, count)
    assert size == hvd_quant.max_payload_size(scheme, np.int64(count)) == wire.max_payload_size(scheme, count)
    payload = encode(gaussian(count), scheme)
    assert payload.size == size if scheme.coding == "packed" else payload.size <= size


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((4, 10), TypeError, "scheme must be a scheme such as"),
        ((QSGD, 10), TypeError, "scheme must be a scheme such as"),
        ((QSGD(), 1.5), TypeError, "count must be an integer"),
        ((QSGD(), -1), ValueError, "count must be .*from 0"),
        ((QSGD(), 2**64), ValueError, "count must be .*from 0"),
    ],
)
def test_the_largest_size_of_nonsense(arguments, error, says):
    with pytest.raises(error, match=says):
        max_payload_size(*arguments)


# --- memory that is refused -----------------------------------------------------------------------------

COUNT = 1000
VALUES = gaussian(COUNT)
SIZE = max_payload_size(QSGD(), COUNT)
PAYLOAD = encode(VALUES, QSGD())


def room(size=SIZE):
    return np.empty(size, np.uint8)


def read_only(array):
    array.flags.writeable = False
    return array


def unaligned(dtype, count=COUNT):
    return np.empty(count * np.dtype(dtype).itemsize + 1, np.uint8)[1:].view(dtype)


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        (room(SIZE - 1), ValueError, f"{SIZE} bytes for 1000 values of QSGD.*, not {SIZE - 1}"),
        (room(SIZE + 8), ValueError, f"{SIZE} bytes for 1000 values of QSGD.*, not {SIZE + 8}"),
        (room(0), ValueError, f"out must have {SIZE} bytes .*, not 0"),
        (room().reshape(8, -1), ValueError, "out must be one-dimensional, not of 2 dimensions"),
        (room(2 * SIZE)[::2], ValueError, "out must be contiguous in C order"),
        (room()[::-1], ValueError, "out must be contiguous in C order"),
        (read_only(room()), ValueError, "out must be writable, but it is read-only"),
        (room().view(np.int8), TypeError, "out must be of dtype uint8, not int8"),
        (np.empty(SIZE, np.float32), TypeError, "out must be of dtype uint8, not float32"),
        (torch.empty(SIZE, dtype=torch.uint8), TypeError, "out must be a NumPy array, not Tensor"),
        (bytearray(SIZE), TypeError, "out must be a NumPy array, not bytearray"),
        (np.ma.array(room()), TypeError, "out must be a NumPy array, not MaskedArray"),
        (VALUES.view(np.uint8)[:SIZE], ValueError, "out must not overlap x in memory"),
        (VALUES.view(np.uint8)[-SIZE:], ValueError, "out must not overlap x in memory"),
    ],
)
def test_arrays_that_cannot_hold_a_payload(backend, out, error, says):
    before = VALUES.copy()
    with pytest.raises(error, match=says):
        encode(VALUES, QSGD(), backend=backend, out=out)
    np.testing.assert_array_equal(VALUES, before)


@pytest.mark.parametrize("coding", ["elias", "huffman"])
def test_coded_payloads_need_room_for_the_largest(backend, coding):
    scheme = QSGD(coding=coding)
    size = max_payload_size(scheme, COUNT)
    with pytest.raises(ValueError, match=f"out must have at least {size} bytes for 1000 values of QSGD"):
        encode(VALUES, scheme, backend=backend, out=room(size - 1))


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        (torch.empty(SIZE + 1, dtype=torch.uint8), ValueError, f"out must have {SIZE} bytes"),
        (torch.empty(8, SIZE // 8, dtype=torch.uint8), ValueError, "out must be one-dimensional, not of 2"),
        (torch.empty(2 * SIZE, dtype=torch.uint8)[::2], ValueError, "out must be contiguous in C order"),
        (torch.empty(1, dtype=torch.uint8).expand(SIZE), ValueError, "out must be contiguous in C order"),
        (torch.empty(SIZE, dtype=torch.uint8, device="meta"), ValueError, "on cpu, as x is, not on meta"),
        (torch.empty(SIZE), TypeError, "out must be of dtype uint8, not float32"),
        (torch.empty(SIZE, dtype=torch.uint8).to_sparse(), TypeError, "out must be a dense tensor"),
        (room(), TypeError, "out must be a torch tensor, as x is, not ndarray"),
        (torch.from_numpy(VALUES).view(torch.uint8)[4:][:SIZE], ValueError, "out must not overlap x"),
    ],
)
def test_tensors_that_cannot_hold_a_payload(backend, out, error, says):
    with pytest.raises(error, match=says):
        encode(torch.from_numpy(VALUES), QSGD(), backend=backend, out=out)


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        (np.empty(COUNT - 1, np.float32), ValueError, "out must have room for 1000 values, .*, not 999"),
        (np.empty(COUNT + 1, np.float64), ValueError, "out must have room for 1000 values, .*, not 1001"),
        (np.empty(0, np.float32), ValueError, "out must have room for 1000 values, .*, not 0"),
        (np.empty(2 * COUNT, np.float32)[::2], ValueError, "out must be contiguous in C order"),
        (np.empty((10, 100), np.float32).T, ValueError, "out must be contiguous in C order"),
        (unaligned(np.float32), ValueError, "out must be contiguous in C order, and aligned"),
        (read_only(np.empty(COUNT, np.float32)), ValueError, "out must be writable, but it is read-only"),
        (np.empty(COUNT, np.dtype(np.float32).newbyteorder()), TypeError, "in this machine's byte order"),
        (np.empty(COUNT, np.int32), TypeError, "of dtype float32, .*, bfloat16, not int32"),
        (np.empty(COUNT, np.complex64), TypeError, "of dtype float32, .*, bfloat16, not complex64"),
        (np.ma.array(np.empty(COUNT, np.float32)), TypeError, "out must be a NumPy array, not MaskedArray"),
        (torch.empty(COUNT), TypeError, "out must be a NumPy array, not Tensor"),
        ([0.0] * COUNT, TypeError, "out must be a NumPy array, not list"),
    ],
)
def test_arrays_that_cannot_hold_the_values(backend, out, error, says):
    for payload in (PAYLOAD, PAYLOAD.tobytes()):
        with pytest.raises(error, match=says):
            decode(payload, backend=backend, out=out)


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        (torch.empty(COUNT + 1), ValueError, "out must have room for 1000 values, .*, not 1001"),
        (torch.empty(10, 100).t(), ValueError, "out must be contiguous in C order"),
        (torch._neg_view(torch.empty(COUNT)), ValueError, "out must be contiguous in C order"),
        (torch.empty(COUNT, device="meta"), ValueError, "out must be on cpu, as the payload is, not on meta"),
        (torch.empty(COUNT, dtype=torch.int32), TypeError, "out must be of dtype float32, .*, not int32"),
        (2 * torch.empty(COUNT, requires_grad=True), ValueError, "out is part of an autograd graph"),
        (np.empty(COUNT, np.float32), TypeError, "a torch tensor, as the payload is, not ndarray"),
    ],
)
def test_tensors_that_cannot_hold_the_values(backend, out, error, says):
    with pytest.raises(error, match=says):
        decode(torch.from_numpy(PAYLOAD), backend=backend, out=out)


@pytest.mark.parametrize("place", [0, 8, 4 * COUNT - 8, 4 * COUNT])
def test_values_do_not_go_to_where_the_payload_is(backend, place):
    memory = np.zeros(4 * COUNT + SIZE, np.uint8)
    payload, out = memory[place : place + SIZE], memory[: 4 * COUNT].view(np.float32)
    payload[:] = PAYLOAD
    if place == 4 * COUNT:  # right behind
        np.testing.assert_array_equal(decode(payload, backend=backend, out=out), decode(PAYLOAD))
        return
    for one, other in ((payload, out), (torch.from_numpy(payload), torch.from_numpy(out))):
        with pytest.raises(ValueError, match="out must not overlap the payload in memory"):
            decode(one, backend=backend, out=other)
    np.testing.assert_array_equal(payload, PAYLOAD)


def test_values_that_lie_backwards_in_memory_are_seen_there(backend):
    values = gaussian(COUNT)[::-1]
    with pytest.raises(ValueError, match="out must not overlap x in memory"):
        encode(values, QSGD(), backend=backend, out=values.base.view(np.uint8)[:SIZE])


def test_the_size_is_looked_at_before_codes_are(backend, monkeypatch):
    """A few bytes may claim to hold many values."""

    def expand(*_):
        raise AssertionError

    payload = encode(np.zeros(10**5, np.float32), QSGD(coding="elias"))
    assert payload.size < 10**4
    monkeypatch.setattr("hvd_quant.codec.entropy.entropy_decode", expand)
    with pytest.raises(ValueError, match="out must have room for 100000 values"):
        decode(payload, backend=backend, out=np.empty(7, np.float32))


def test_damage_is_found_all_the_same(backend):
    damaged = PAYLOAD.copy()
    damaged[-20] ^= 4
    with pytest.raises(ValueError, match="damage"):
        decode(damaged, backend=backend, out=np.empty(COUNT, np.float32))


def test_autograd_is_told(backend):
    factors, kept = torch.ones(COUNT, requires_grad=True), torch.ones(COUNT)
    loss = (factors * kept).sum()
    decode(torch.from_numpy(PAYLOAD), backend=backend, out=kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    parameter = torch.zeros(COUNT, requires_grad=True)
    assert decode(torch.from_numpy(PAYLOAD), backend=backend, out=parameter) is parameter
    np.testing.assert_array_equal(parameter.detach().numpy(), decode(PAYLOAD))
