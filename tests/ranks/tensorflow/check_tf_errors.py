"""Differences between ranks, misuse and states: the same clear error on every rank, and never a hang."""

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from common_tf import Mlp, gathered, own_randn, same_everywhere, same_mismatch
from shared import EXCHANGES, error_of

import hvd_quant.tensorflow as hq
from hvd_quant.reducer.stall import StallCheck
from hvd_quant.tensorflow import stall

exchanges = pytest.mark.parametrize("exchange", EXCHANGES)


def first_and_rest(first, rest):
    return first if hvd.rank() == 0 else rest


@pytest.mark.parametrize(
    ("field", "first", "rest"),
    [("bits", 4, 8), ("norm", "max", "l2"), ("bucket_size", 512, 511), ("min_numel", 0, 10_000)],
)
@pytest.mark.parametrize("traced", [False, True])
def check_different_configuration_is_named_on_every_rank(field, first, rest, traced):
    compressor = hq.QSGDCompressor(**{field: first_and_rest(first, rest)})

    def reduce(x):
        return hvd.allreduce(x, compression=compressor)

    text = same_mismatch(error_of(lambda: (tf.function(reduce) if traced else reduce)(own_randn(2000))))
    assert f"{field} is " in text
    assert "on rank 0" in text


def check_different_exchange():
    compressor = hq.QSGDCompressor(exchange=first_and_rest(*EXCHANGES))
    text = same_mismatch(error_of(lambda: hvd.allreduce(own_randn(2000), compression=compressor)))
    assert 'exchange is "allgather" on rank 0' in text


def check_other_number_of_compressors():
    extra = hq.QSGDCompressor() if hvd.rank() == 0 else None
    text = same_mismatch(error_of(lambda: Mlp().gradients(hq.QSGDCompressor(), 0)))
    assert "Create the same compressors, in the same order, on every rank" in text
    extra = extra or hq.QSGDCompressor()  # the numbers agree again
    del extra


@exchanges
@pytest.mark.parametrize("traced", [False, True])
def check_different_shapes(exchange, traced):
    compressor = hq.QSGDCompressor(exchange=exchange)
    x = tf.ones(first_and_rest(2000, 2100))

    def reduce(x):
        return hvd.allreduce(x, compression=compressor)

    error = error_of(lambda: (tf.function(reduce) if traced else reduce)(x))
    assert isinstance(error, tf.errors.OpError if traced else hq.RankMismatchError)
    assert "Every rank must build the same model" in str(error)
    assert all("different gradients at place 0" in text for text in gathered(str(error)))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("first", "rest", "says"),
    [
        ((2000, tf.int32), (2000, tf.float32), "Mismatched data types"),
        ((2000, tf.float32), (10, tf.float32), "Mismatched ALLREDUCE tensor shapes"),
    ],
)
def check_tensors_that_travel_in_different_ways(traced, first, rest, says):
    """One by Horovod, untouched or because it is small, and one quantized: Horovod's own error, at once."""
    compressor = hq.QSGDCompressor()

    def reduce(x):
        return hvd.allreduce(x, compression=compressor)

    x = tf.ones(*first_and_rest(first, rest))
    error = error_of(lambda: (tf.function(reduce) if traced else reduce)(x))
    assert isinstance(error, tf.errors.OpError)
    assert says in str(error)


@exchanges
def check_operations_without_a_name_between_steps(exchange):
    """With a rank that is late, and one that traces and computes more than the others."""
    step = Mlp().step_function(hq.QSGDCompressor(exchange=exchange, min_numel=0))
    for number in range(3):
        if hvd.rank() == number % hvd.size():
            time.sleep(0.1)
            tf.function(lambda x: tf.reduce_mean(x + 1.0))(tf.ones(3))
        step(tf.constant(number))
        assert hvd.allreduce(tf.constant(float(hvd.rank()))) == (hvd.size() - 1) / 2
        assert hvd.broadcast(tf.constant([hvd.rank()]), 0)[0] == 0
        mean = tf.function(lambda x: hvd.allreduce(tf.reduce_mean(x)))(tf.fill([3], float(hvd.rank())))
        assert mean == (hvd.size() - 1) / 2


def check_who_waits_says_so():
    """Where Horovod itself would hang, every rank that waits tells for what, and at which line."""
    step = Mlp().step_function(hq.QSGDCompressor(min_numel=0))
    step(tf.constant(0))
    check = StallCheck(stall.in_flight, stall.describe)
    check.watched = stall.check.watched

    def watch():
        while (text := check.poll(time.monotonic(), 0.5)) is None:
            time.sleep(0.1)
        return text

    if hvd.rank() == 0:  # late, without a thread that watches
        time.sleep(3.0)
        step(tf.constant(1))
        return
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(watch)
        step(tf.constant(1))
        text = text.result()
    assert text.startswith(f"hvd_quant: rank {hvd.rank()} of {hvd.size()} has waited 0.5 s for other ranks.")
    assert "Waited for: group 0" in text
    assert "MainThread is at " in text
    assert ", in check_who_waits_says_so: step(tf.constant(1))" in text


@exchanges
def check_different_shapes_that_are_known_only_at_run_time(exchange):
    compressor = hq.QSGDCompressor(exchange=exchange)

    @tf.function(input_signature=[tf.TensorSpec([None])])
    def reduce(x):
        return hvd.allreduce(x, compression=compressor)

    error = error_of(lambda: reduce(tf.ones(first_and_rest(2000, 2100))))
    assert isinstance(error, tf.errors.OpError)
    assert "sent other gradients at place 0 than this one, which has float32 of shape unknown" in str(error)
    assert same_everywhere(np.array(type(error).__name__.encode()))


@exchanges
def check_the_ranks_compare_notes_in_every_step(exchange):
    """And not once, when TensorFlow folds constants."""
    compressor = hq.QSGDCompressor(exchange=exchange)
    reduce = tf.function(lambda x: hvd.allreduce(x, compression=compressor))
    x = own_randn(2000)
    for _ in range(2):
        reduce(x)
    if hvd.rank() == 0:
        compressor._membership.own.assign_add(tf.ones(5, tf.float64))  # it is in all that is compared
    assert isinstance(error_of(lambda: reduce(x)), tf.errors.OpError)


@exchanges
@pytest.mark.parametrize("traced", [False, True])
def check_the_same_number_of_values_in_another_shape(exchange, traced):
    """In the second gradient of a group, of which the message itself does not tell that."""
    compressor = hq.QSGDCompressor(exchange=exchange)
    tensors = [tf.ones(2000), tf.ones(first_and_rest([40, 60], [60, 40]))]

    def reduce(tensors):
        return hvd.grouped_allreduce(tensors, compression=compressor)

    error = error_of(lambda: (tf.function(reduce) if traced else reduce)(tensors))
    assert isinstance(error, tf.errors.OpError if traced else hq.RankMismatchError)
    assert all("different gradients at place 0" in text for text in gathered(str(error)))


@exchanges
def check_a_state_that_one_rank_has_loaded(exchange):
    """All go on where that rank is in its schedule."""
    compressor = hq.DQSGDCompressor(k=10.0, exchange=exchange)
    if hvd.rank() == 0:
        state = compressor.state_dict()
        state["schedule"] |= {"step": 5, "bits": 4}
        compressor.load_state_dict(state)
    step = Mlp().step_function(compressor)
    assert same_everywhere(*step(tf.constant(0)))
    assert gathered(compressor.state_dict()["schedule"]["step"]) == [6] * hvd.size()


@pytest.mark.parametrize("op", ["Adasum", "Min", "Max", "Product"])
@pytest.mark.parametrize("traced", [False, True])
def check_unsupported_reductions(op, traced):
    if op == "Adasum" and (not hvd.mpi_enabled() or hvd.size() == 3):
        pytest.skip("Horovod itself has Adasum with MPI and 2^k ranks only")
    compressor = hq.QSGDCompressor()

    def reduce(x):
        return hvd.allreduce(x, compression=compressor, op=getattr(hvd, op))

    error = error_of(lambda: (tf.function(reduce) if traced else reduce)(own_randn(3000)))
    assert "Use op=Average or op=Sum" in str(error)


def check_reducescatter_is_an_error():
    compressor = hq.QSGDCompressor()
    error = error_of(lambda: hvd.reducescatter(own_randn(2000), compression=compressor))
    assert isinstance(error, hq.UnsupportedReductionError)
    assert "no reducescatter" in str(error)


def check_training_goes_on_after_an_error():
    compressor = hq.QSGDCompressor(bits=8)
    x = tf.ones(first_and_rest(2000, 2100))
    assert error_of(lambda: hvd.allreduce(x, compression=compressor)) is not None
    compressor.reset()
    result = hvd.allreduce(tf.ones(2000), compression=compressor)
    np.testing.assert_allclose(result, np.ones(2000), rtol=1e-6)


@pytest.mark.parametrize("kind", ["DQSGD", "QSGD", "error feedback"])
def check_a_resumed_run_continues(kind):
    """Bit by bit: noise, schedule and residuals."""

    def make():
        if kind == "DQSGD":
            return hq.DQSGDCompressor(mean_bits=4, total_steps=6, min_numel=0)
        return hq.QSGDCompressor(bits=2, error_feedback=kind == "error feedback", min_numel=0)

    model, compressor = Mlp(), make()
    step = model.step_function(compressor)
    for number in range(3):
        step(tf.constant(number))
    state, weights = compressor.state_dict(), [variable.numpy() for variable in model.variables]
    for number in range(3, 6):
        step(tf.constant(number))
    resumed, again = Mlp(), make()
    for variable, value in zip(resumed.variables, weights, strict=True):
        variable.assign(value)
    again.load_state_dict(copy.deepcopy(state))
    step = resumed.step_function(again)
    for number in range(3, 6):
        step(tf.constant(number))
    for one, two in zip(model.variables, resumed.variables, strict=True):
        np.testing.assert_array_equal(one, two)
    assert again.stats()["steps"] == 6
    if kind == "DQSGD":
        assert len(set(gathered(tuple(compressor.stats()["bits"])))) == 1
        assert sum(compressor.stats()["bits"]) == pytest.approx(24, abs=1)
        assert compressor.stats()["bits"] == again.stats()["bits"]


def check_the_bits_follow_the_norm_on_all_ranks_alike():
    compressor = hq.DQSGDCompressor(k=1.0, min_numel=0)

    @tf.function
    def reduce(x):
        return hvd.grouped_allreduce([1e-3 * x, x], compression=compressor)

    x = own_randn(2000)  # of norm 45
    for scale in (1e-3, 1.0, 1e3):
        for _ in range(2):
            reduce(scale * x)
    bits = compressor.stats()["bits"]
    assert bits[0] == 8
    assert bits[2] == 2  # after the small ones
    assert bits[4] == 7
    assert bits[-1] == 8
    assert len(set(gathered(tuple(bits)))) == 1


def check_states_that_are_none():
    compressor = hq.DQSGDCompressor(k=1.0)
    state = compressor.state_dict()
    for change in ({"uses": {"0": -1}}, {"seed": "x"}, {"schedule": None}):
        with pytest.raises(ValueError, match="not a state of this hvd_quant compressor"):
            compressor.load_state_dict({**state, **change})
    feedback = hq.QSGDCompressor(error_feedback=True)
    with pytest.raises(ValueError, match="has no residuals"):
        feedback.load_state_dict(hq.QSGDCompressor().state_dict())
    with pytest.raises(ValueError, match="not finite"):
        feedback.load_state_dict({**feedback.state_dict(), "residuals": {"0.0": np.array([np.nan])}})
    Mlp().step_function(compressor)(tf.constant(0))
    with pytest.raises(RuntimeError, match="before its first step"):
        compressor.load_state_dict(state)


def check_compressors_in_use_are_not_copied():
    compressor = hq.QSGDCompressor(bits=3)
    assert pickle.loads(pickle.dumps(compressor)).options.scheme == compressor.options.scheme
    hvd.allreduce(own_randn(2000), compression=compressor)
    for action in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            action(compressor)
    assert compressor == compressor
    assert compressor != hq.QSGDCompressor()
    assert len({compressor, compressor}) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"bits": 9}, ValueError),
        ({"exchange": "ring"}, ValueError),
        ({"min_numel": -1}, ValueError),
        ({"error_feedback": 1}, TypeError),
        ({"rounding": "nearest"}, ValueError),
        ({"seed": -1}, ValueError),
        ({"process_set": 3}, TypeError),
        ({"process_set": hvd.ProcessSet([0])}, ValueError),
        ({"overrides": []}, TypeError),
    ],
)
def check_arguments(options, error):
    with pytest.raises(error):
        hq.QSGDCompressor(**options)
