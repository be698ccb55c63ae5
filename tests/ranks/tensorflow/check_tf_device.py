"""The exchange that GPUs take, on CPU tensors: TensorFlow's operations in place of the native codec."""

from types import SimpleNamespace

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from check_tf_gradients import assert_close
from common_tf import exact_mean, gathered, own_randn, same_everywhere, same_mismatch
from shared import EXCHANGES, error_of

import hvd_quant.tensorflow as hq
from hvd_quant.codec import native
from hvd_quant.tensorflow import device

exchanges = pytest.mark.parametrize("exchange", EXCHANGES)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(native, "encode_message", None)  # not called


@exchanges
@pytest.mark.parametrize(("op", "traced"), [(hvd.Average, True), (hvd.Sum, False)])
@pytest.mark.parametrize("scheme", ["QSGD", "NUQSGD"])
def check_mean_and_sum_of_several_types(exchange, op, traced, scheme):
    bits = 8 if scheme == "QSGD" else 4
    compressor = getattr(hq, f"{scheme}Compressor")(bits=bits, norm="max", exchange=exchange)
    tensors = [own_randn(3001), own_randn(40, 50, seed=1, dtype=tf.float64)]

    def reduce(*tensors):
        return [*hvd.grouped_allreduce(list(tensors), compression=compressor, op=op)]

    results = (tf.function(reduce) if traced else reduce)(*tensors)
    for tensor, result in zip(tensors, results, strict=True):
        assert result.dtype == tensor.dtype
        assert result.shape == tensor.shape
        assert_close(
            tf.cast(result, tf.float64),
            exact_mean(tensor),
            bits=bits,
            factor=hvd.size() if op == hvd.Sum else 1.0,
        )


@exchanges
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16], ids=lambda dtype: dtype.name)
def check_halves(exchange, dtype):
    x = own_randn(2000, dtype=dtype)
    compressor = hq.QSGDCompressor(bits=8, exchange=exchange)
    result = tf.function(lambda x: hvd.allreduce(x, compression=compressor))(x)
    assert result.dtype == dtype
    assert_close(tf.cast(result, tf.float64), exact_mean(tf.cast(x, tf.float64)), precision=0.01)


@exchanges
@pytest.mark.parametrize("rounding", ["independent", "correlated"])
def check_noise_and_what_is_not_finite(exchange, rounding):
    compressor = hq.QSGDCompressor(bits=2, bucket_size=500, exchange=exchange, rounding=rounding)
    reduce = tf.function(lambda x: hvd.allreduce(x, compression=compressor))
    x = own_randn(2000).numpy()
    results = [reduce(tf.constant(x)).numpy() for _ in range(4)]
    assert all(same_everywhere(result) for result in results)
    assert len({result.tobytes() for result in results}) == 4
    assert reduce.experimental_get_tracing_count() == 1
    if hvd.rank() == hvd.size() - 1:
        x[700] = np.nan
    result = reduce(tf.constant(x)).numpy()
    assert same_everywhere(result)
    assert not np.isfinite(result[500:1000]).any()
    assert np.isfinite(result[:500]).all()
    assert np.isfinite(result[1000:]).all()


@exchanges
def check_different_shapes(exchange):
    compressor = hq.QSGDCompressor(exchange=exchange)
    x = tf.ones(2000 if hvd.rank() == 0 else 2100)
    error = error_of(lambda: tf.function(lambda x: hvd.allreduce(x, compression=compressor))(x))
    assert all(
        text == "OpError" for text in gathered("OpError" if isinstance(error, tf.errors.OpError) else "")
    )


@pytest.mark.parametrize("traced", [False, True])
def check_lengths_that_do_not_add_up(traced):
    steps = SimpleNamespace(mismatch=lambda who: f"{who} sent other gradients.")

    def cut(received):
        return device._cut(steps, received, [8, 24])

    cut = tf.function(cut, input_signature=[tf.TensorSpec([None], tf.uint8)]) if traced else cut
    assert [len(message) for message in cut(tf.zeros(32, tf.uint8))] == [8, 24]
    text = str(error_of(lambda: cut(tf.zeros(31, tf.uint8))))
    assert "some rank has sent other gradients. (the lengths of the 2 messages do not add up" in text
    assert "together they have 31 bytes, and 32 were expected" in text


@pytest.mark.parametrize("options", [{"coding": "huffman"}, {"error_feedback": True}])
def check_what_is_left_to_the_host(options, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    compressor = hq.QSGDCompressor(**options)
    result = tf.function(lambda x: hvd.allreduce(x, compression=compressor))(own_randn(2000))
    assert same_everywhere(result)


def check_a_gpu_on_one_rank_only_is_an_error_everywhere(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(device, "has_gpu", lambda: hvd.rank() == 0)
    compressor = hq.QSGDCompressor()
    text = same_mismatch(error_of(lambda: hvd.allreduce(own_randn(2000), compression=compressor)))
    assert 'computes on is "GPU" on rank 0, "CPU" on rank' in text
