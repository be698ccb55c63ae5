"""Memory of results is given out again, and never while anything looks at it."""

import numpy as np
import pytest
from launch import need

need("tensorflow")
import tensorflow as tf  # noqa: E402

from hvd_quant.tensorflow.buffer_pool import BufferPool  # noqa: E402

COUNT = 100_000
FLOAT = np.dtype("float32")


def tensor(array):
    """As the front end gives it to TensorFlow, which then has it alone."""
    given = [array.reshape(10, -1).view(FLOAT)]
    del array
    return tf.numpy_function(given.pop, [], tf.float32)


HOLDERS = {
    "the array": lambda array: array,
    "a view": lambda array: array[1:],
    "a view of a view": lambda array: array.reshape(10, -1)[2:].view(np.int32)[0, :5],
    "a memoryview": memoryview,
    "a buffer's view": lambda array: np.frombuffer(memoryview(array), np.uint8),
    "a tensor": tensor,
    "a graph's tensor": lambda array: tf.function(lambda: tensor(array))(),
    "a tensor's array": lambda array: tensor(array).numpy(),
    "a reshaped tensor": lambda array: tf.reshape(tensor(array), [-1]),
    "a variable": lambda array: tf.Variable(tensor(array)),
}


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_is_looked_at_is_not_given_out(holder):
    pool = BufferPool()
    array = pool.empty("w", COUNT, FLOAT)
    array[:] = 1
    held = HOLDERS[holder](array)
    before = np.asarray(held).tobytes()
    del array
    for _ in range(3):
        pool.empty("w", COUNT, FLOAT)[:] = 2
    assert np.asarray(held).tobytes() == before


def test_it_is_given_out_again():
    pool = BufferPool()
    kept = {address(pool.empty("w", COUNT, FLOAT)) for _ in range(5)}
    assert len(kept) == 1
    assert address(pool.empty("w", COUNT // 2, np.dtype("float64"))) in kept  # as many bytes


def test_another_size_is_other_memory():
    pool = BufferPool()
    for count in (1000, 10, 2000):
        assert pool.empty("w", count, FLOAT).shape == (count,)


def test_tensorflow_lets_go_in_time():
    """Else every step would have new memory, and this class no use."""
    pool, seen = BufferPool(), set()

    def fill():
        array = pool.empty("w", COUNT, FLOAT)
        array[:] = len(seen)
        seen.add(address(array))
        return array

    @tf.function
    def step():
        return tf.reduce_sum(tf.numpy_function(fill, [], tf.float32))

    for _ in range(20):
        step()
    assert len(seen) <= 2


def test_keys_and_sizes_do_not_share():
    pool = BufferPool()
    arrays = [pool.empty(key, count, FLOAT) for key in "ab" for count in (10, 1000, 10)]
    for i, array in enumerate(arrays):
        array[:] = i
    assert [array.tolist() for array in arrays] == [[i] * array.size for i, array in enumerate(arrays)]


@pytest.mark.parametrize("count", [0, 1, 63, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int16"])
def test_shapes_and_alignment(count, dtype):
    pool = BufferPool()
    for _ in range(2):  # new memory, and that again
        array = pool.empty("w", count, np.dtype(dtype))
        assert array.shape == (count,)
        assert array.dtype == dtype
        assert array.flags.writeable
        assert count == 0 or address(array) % 64 == 0  # else TensorFlow would copy it
        del array
