"""Means and sums of gradients of all sorts, eager and traced, through stock Horovod."""

import gc
import os
import warnings

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from common_tf import Mlp, exact_mean, gathered, own_randn, same_everywhere
from shared import EXCHANGES, error_of, in_turns, make

import hvd_quant
import hvd_quant.tensorflow as hq
from hvd_quant.codec import native
from hvd_quant.codec.message import PREAMBLE_SIZE

exchanges = pytest.mark.parametrize("exchange", EXCHANGES)
DTYPES = [tf.float32, tf.float64, tf.float16, tf.bfloat16]


def assert_close(result, exact, bits=8, factor=1.0, roundings=2.5, precision=0.0):
    """The result is within a level's step of the exact mean for each rounding; the same bits everywhere."""
    assert same_everywhere(result)
    largest = max(gathered(float(np.abs(exact).max()))) * 4  # of one rank's values: more than the mean's
    step = largest / (2 ** (bits - 1) - 1) + precision * largest
    assert np.abs(np.asarray(result, np.float64) - factor * exact).max() <= factor * step * roundings


def reduced(tensors, compression, traced, **options):
    """By grouped_allreduce if there are several, by allreduce if there is one."""

    def reduce(*tensors):
        if len(tensors) > 1:
            return hvd.grouped_allreduce(list(tensors), compression=compression, **options)
        return [hvd.allreduce(tensors[0], compression=compression, **options)]

    return (tf.function(reduce) if traced else reduce)(*tensors)


@exchanges
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def check_mean_and_sum(exchange, traced, op):
    compressor = hq.QSGDCompressor(bits=8, exchange=exchange)
    factor = hvd.size() if op == hvd.Sum else 1.0
    one, two = own_randn(3000), own_randn(40, 50, seed=1)
    (result,) = reduced([one], compressor, traced, op=op)
    assert_close(result, exact_mean(one), factor=factor)
    results = reduced([one, two, one[:10]], compressor, traced, op=op)
    assert [tuple(result.shape) for result in results] == [(3000,), (40, 50), (10,)]
    assert_close(results[0], exact_mean(one), factor=factor)
    assert_close(results[1], exact_mean(two), factor=factor)
    np.testing.assert_allclose(results[2], factor * exact_mean(one[:10]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("traced", [False, True])
def check_scaling_factors(traced):
    x = own_randn(3000)
    (result,) = reduced([x], hq.QSGDCompressor(bits=8), traced, prescale_factor=0.5, postscale_factor=3.0)
    assert_close(result, exact_mean(x), factor=1.5)


@pytest.mark.parametrize(("dtype", "exchange"), in_turns(DTYPES, EXCHANGES))
@pytest.mark.parametrize("traced", [False, True])
def check_dtypes(exchange, dtype, traced):
    x = own_randn(2000, dtype=dtype)
    (result,) = reduced([x], hq.QSGDCompressor(bits=8, exchange=exchange), traced)
    assert result.dtype == dtype
    exact = exact_mean(tf.cast(x, tf.float64))
    assert_close(tf.cast(result, tf.float64), exact, precision={2: 0.01}.get(dtype.size, 0.0))


@pytest.mark.parametrize("traced", [False, True])
def check_what_is_not_quantized(traced):
    """Integers, and what has few values, go to Horovod as they are; so does what has none."""
    compressor = hq.QSGDCompressor()
    whole = tf.range(3000) * (hvd.rank() + 1)
    (result,) = reduced([whole], compressor, traced, op=hvd.Sum)
    assert result.dtype == tf.int32
    np.testing.assert_array_equal(result, np.arange(3000) * sum(range(1, hvd.size() + 1)))
    for small in (own_randn(), own_randn(1023), own_randn(0), own_randn(3, 0, 5)):
        (result,) = reduced([small], compressor, traced)
        assert result.shape == small.shape
        np.testing.assert_allclose(result, exact_mean(small), rtol=1e-5, atol=1e-6)


@exchanges
def check_scalars_and_few_values_when_all_are_to_be_quantized(exchange):
    compressor = hq.QSGDCompressor(bits=8, min_numel=0, exchange=exchange)
    for x in (own_randn(), own_randn(1), own_randn(0), own_randn(3)):
        (result,) = reduced([x], compressor, traced=True)
        assert result.shape == x.shape
        if x.shape.num_elements():
            assert_close(result, exact_mean(x), roundings=20.0)


@exchanges
def check_shapes_that_are_not_known_when_traced(exchange):
    compressor = hq.QSGDCompressor(bits=8, exchange=exchange)

    @tf.function(input_signature=[tf.TensorSpec([None, 8]), tf.TensorSpec(None)])
    def reduce(x, y):
        results = hvd.grouped_allreduce([x, y], compression=compressor)
        assert results[0].shape.as_list() == [None, 8]
        return results

    for count in (500, 700, 1, 500):
        x, y = own_randn(count, 8), own_randn(3, count, seed=1)
        for tensor, result in zip((x, y), reduce(x, y), strict=True):
            assert result.shape == tensor.shape
            assert_close(result, exact_mean(tensor), roundings=6.0)
    assert reduce.experimental_get_tracing_count() == 1


@pytest.mark.parametrize(
    ("options", "exchange"),
    in_turns(
        [{}, {"groups": 1}, {"groups": 3}, {"op": hvd.Sum}, {"gradient_predivide_factor": 2.0}], EXCHANGES
    ),
)
def check_tape(exchange, options):
    model = Mlp()
    compressor = hq.QSGDCompressor(bits=8, exchange=exchange)
    step = model.step_function(compressor, **options)
    for number in range(3):
        exact = [exact_mean(gradient) for gradient in model.local_gradients(number)]
        for one, result in zip(exact, step(tf.constant(number)), strict=True):
            assert_close(result, one, factor=hvd.size() if "op" in options else 1.0)
    assert step.experimental_get_tracing_count() == 1
    messages = {1: 1, 3: 2}.get(options.get("groups"), 2)
    stats = compressor.stats()
    assert stats["messages"] == 3 * messages
    assert stats["steps"] == 3
    assert stats["raw_bytes"] == 3 * 4 * sum(variable.shape.num_elements() for variable in model.variables)


def check_tape_outside_of_a_function():
    model, compressor = Mlp(), hq.QSGDCompressor(bits=8)
    for number in range(3):
        exact = [exact_mean(gradient) for gradient in model.local_gradients(number)]
        results = model.gradients(compressor, number)
        for one, result in zip(exact, results, strict=True):
            assert_close(result, one)


def check_gradients_that_are_none_and_sparse_ones():
    used, unused = tf.Variable(own_randn(40, 50) * 0 + 1), tf.Variable(tf.zeros([40, 50]))
    embedding = tf.Variable(tf.ones([100, 50]))
    compressor = hq.QSGDCompressor(bits=8)

    @tf.function
    def gradients(x, sparse_as_dense):
        with tf.GradientTape() as tape:
            rows = tf.gather(embedding, tf.constant([3, 7 + hvd.rank(), 3]))
            loss = tf.reduce_sum(x * used) + tf.reduce_sum(rows * x[:3])
        tape = hvd.DistributedGradientTape(tape, compression=compressor, sparse_as_dense=sparse_as_dense)
        return tape.gradient(loss, [used, unused, embedding])

    x = own_randn(40, 50)
    for sparse_as_dense in (True, False):
        dense, none, sparse = gradients(x, sparse_as_dense)
        assert none is None
        assert isinstance(sparse, tf.IndexedSlices) != sparse_as_dense
        assert_close(dense, exact_mean(x))
        own = np.zeros([100, 50])
        np.add.at(own, [3, 7 + hvd.rank(), 3], x[:3].numpy())
        assert_close(tf.convert_to_tensor(sparse), np.mean(gathered(own), axis=0))


def check_noise_differs_from_step_to_step_in_one_traced_function():
    compressor = hq.QSGDCompressor(bits=2)

    @tf.function
    def reduce(x):
        return hvd.allreduce(x, compression=compressor)

    @tf.function
    def constant():
        """Which nothing may compute in advance, or once for all passes of the loop."""
        results = tf.TensorArray(tf.float32, 3)
        for i in tf.range(3):
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            results = results.write(i, hvd.allreduce(tf.linspace(0.0, 1.0, 2000), compression=compressor))
        return results.stack()

    x = own_randn(2000)
    results = [reduce(x).numpy() for _ in range(4)] + [*constant().numpy(), *constant().numpy()]
    assert len({result.tobytes() for result in results}) == len(results)
    assert reduce.experimental_get_tracing_count() == constant.experimental_get_tracing_count() == 1
    eager = [hvd.allreduce(x, compression=compressor).numpy().tobytes() for _ in range(3)]
    assert len(set(eager)) == 3


@exchanges
@pytest.mark.parametrize("traced", [False, True])
def check_results_that_are_kept_stay_as_they_were(exchange, traced):
    """Their memory is used again in another step, but not while anything has it."""
    compressor = hq.QSGDCompressor(exchange=exchange)
    kept, variables, copies = [], [], []
    for _ in range(4):
        (result,) = reduced([own_randn(2000)], compressor, traced)
        kept.append(tf.reshape(result, [100, -1]))
        variables.append(tf.Variable(result))
        copies.append(result.numpy().tobytes())
    assert [tensor.numpy().tobytes() for tensor in kept] == copies
    assert [variable.numpy().tobytes() for variable in variables] == copies
    assert len(set(copies)) == len(copies)


@pytest.mark.parametrize("kind", ["QSGD", "DQ-SGD"])
def check_ranks_may_trace_other_things_beside(kind):
    """Horovod knows tensors by the names of operations, which have numbers."""
    compressor = make(hq, kind)

    @tf.function
    def reduce(large, small):
        for _ in range(hvd.rank()):
            tf.cast(large, tf.float64), tf.concat([small, small], 0), tf.identity(large), large + 0.0
        return [hvd.allreduce(tensor, compression=compressor) for tensor in (large, small)]

    assert same_everywhere(*reduce(own_randn(2000), own_randn(20)))


def check_a_function_that_is_traced_anew_goes_on_with_its_noise():
    compressor, x = hq.QSGDCompressor(bits=2), own_randn(2000)
    results = []
    for _ in range(3):
        reduce = tf.function(lambda x: hvd.allreduce(x, compression=compressor))
        results.append(reduce(x).numpy().tobytes())
    assert len(set(results)) == 3


@exchanges
def check_the_mean_is_unbiased(exchange):
    """The mean over many steps comes nearer to the truth, as it does for independent errors."""
    compressor = hq.QSGDCompressor(bits=3, exchange=exchange)
    x = own_randn(2000)
    exact = exact_mean(x)
    reduce = tf.function(lambda x: hvd.allreduce(x, compression=compressor))
    errors = np.array([reduce(x).numpy() - exact for _ in range(100)])
    one, many = np.mean(errors**2), np.mean(errors.mean(0) ** 2)
    # 2000 values in buckets with one noise each: the ratio is 1 / 100, give or take 3 % (a deviation).
    assert 0.8 < 100 * many / one < 1.2


def check_payloads_are_those_of_everyone():
    """What travels is read by the native codec, and by torch's."""
    compressor = hq.QSGDCompressor(bits=4, exchange="allgather")
    sent, encode = [], native.encode_message

    def spy(values, layout, noise, message, residuals=()):
        size = encode(values, layout, noise, message, residuals)
        sent.append(message[:size].copy())
        return size

    native.encode_message = spy
    try:
        x = own_randn(3000)
        result = tf.function(lambda x: hvd.allreduce(x, compression=compressor))(x)
    finally:
        native.encode_message = encode
    assert len(sent) == 1
    payloads = gathered(sent[0][PREAMBLE_SIZE:])
    decoded = [hvd_quant.decode(payload, backend="native") for payload in payloads]
    np.testing.assert_allclose(result, np.mean(decoded, axis=0, dtype=np.float32), rtol=1e-6, atol=1e-7)
    pytest.importorskip("torch")
    for payload, values in zip(payloads, decoded, strict=True):
        np.testing.assert_array_equal(hvd_quant.decode(payload, backend="torch"), values)


@exchanges
@pytest.mark.parametrize("coding", ["huffman", "elias"])
def check_entropy_coding(exchange, coding):
    packed, coded = (
        hq.QSGDCompressor(bits=4, exchange=exchange, coding=name, bucket_size=4096)
        for name in ("packed", coding)
    )
    x = own_randn(20_000) * tf.cast(tf.random.stateless_uniform([20_000], [1, hvd.rank()]) < 0.1, tf.float32)
    for _ in range(2):
        results = [reduced([x], compressor, traced=True)[0] for compressor in (packed, coded)]
        np.testing.assert_array_equal(*results)
        assert same_everywhere(results[1])
    assert coded.stats()["wire_bytes"] < packed.stats()["wire_bytes"]


@exchanges
def check_error_feedback_loses_nothing(exchange):
    """What all steps have brought, plus the mean of what ranks have kept, is the sum of the means."""
    compressor = hq.QSGDCompressor(bits=2, error_feedback=True, exchange=exchange)
    reduce = tf.function(lambda x: hvd.allreduce(x, compression=compressor))
    brought, exact = np.zeros(2000), np.zeros(2000)
    for step in range(6):
        x = own_randn(2000, seed=step)
        brought += reduce(x).numpy()
        exact += exact_mean(x)
    kept = np.mean(gathered(compressor.state_dict()["residuals"]["0.0"]), axis=0)
    np.testing.assert_allclose(brought + kept, exact, atol=1e-4)
    assert np.abs(kept).max() > 1e-3


def check_error_feedback_of_another_model_is_an_error():
    compressor = hq.QSGDCompressor(bits=2, error_feedback=True)
    for count in (2000, 3000):
        reduce = tf.function(lambda x: hvd.allreduce(x, compression=compressor))
        error = error_of(lambda count=count, reduce=reduce: reduce(own_randn(count)))
    assert "One compressor serves one model" in str(error)


@pytest.mark.parametrize("kind", ["error feedback", "DQ-SGD"])
def check_what_needs_places_is_refused_outside_of_a_function(kind):
    error = error_of(lambda: hvd.allreduce(own_randn(2000), compression=make(hq, kind)))
    assert "within a tf.function" in str(error)


def check_process_sets():
    if hvd.size() < 3:
        pytest.skip("needs 3 ranks")
    some = hvd.add_process_set([0, hvd.size() - 1])
    if some.included():
        compressor = hq.QSGDCompressor(bits=8, process_set=some)
        x = own_randn(3000)
        result = tf.function(lambda x: hvd.allreduce(x, compression=compressor, process_set=some))(x)
        both = hvd.allgather(x[None], process_set=some).numpy()
        assert np.abs(result - both.mean(0)).max() < 0.1
    hvd.allreduce(tf.zeros(1), name="process_sets")
    hvd.remove_process_set(some)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_memory_is_flat_and_nothing_is_traced_again():
    model = Mlp(256)
    step = model.step_function(hq.QSGDCompressor(exchange="scatter_allgather"))
    for number in range(1200):
        step(tf.constant(number))
        if number == 199:
            gc.collect()
            before = resident()
    gc.collect()
    assert step.experimental_get_tracing_count() == 1
    grown = resident() - before
    assert grown < 8 << 20, f"{grown >> 10} KiB in 1000 steps"


def check_no_warnings_in_use():
    compressor = hq.QSGDCompressor()  # may be one of many in this process
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Mlp().gradients(compressor, 0)
