"""What users combine: each trains as without quantization, at 8 bits; docs/works-with.md lists them."""

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from common_tf import Mlp, own_randn, same_everywhere

import hvd_quant.tensorflow as hq


@pytest.mark.parametrize("in_graph", [False, True])
def check_join_is_refused_on_the_rank_that_calls_it(in_graph, monkeypatch):
    """Or the others would wait for it without end. As soon as they have met, in any check before."""
    monkeypatch.setattr(hvd, "join", lambda: "not refused")
    assert hvd.join() == "not refused"
    compressor = hq.QSGDCompressor(bits=4)

    def step():
        return hvd.allreduce(own_randn(2000), name="step", compression=compressor)

    (tf.function(step) if in_graph else step)()
    with pytest.raises(RuntimeError, match=f"rank {hvd.rank()} cannot be used .* equally many steps"):
        hvd.join()


def check_join_is_not_refused_for_other_process_sets(monkeypatch):
    if hvd.size() < 3:
        pytest.skip("needs 3 ranks")
    monkeypatch.setattr(hvd, "join", lambda: "not refused")
    some = hvd.add_process_set([0, hvd.size() - 1])
    if some.included():
        compressor = hq.QSGDCompressor(bits=4, process_set=some)
        hvd.allreduce(own_randn(2000), name="step", compression=compressor, process_set=some)
        assert compressor.stats()["messages"] == 1
    assert hvd.join() == "not refused"
    hvd.allreduce(tf.zeros(1))
    hvd.remove_process_set(some)


def trained(compression, in_graph, optimizer, **options):
    """The variables at the beginning and after some steps, each in one vector."""
    model = Mlp()
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compression, **options)

    def step(inputs):
        pairs = optimizer.compute_gradients(lambda: tf.reduce_mean(model(inputs) ** 2), model.variables)
        optimizer.apply_gradients(pairs)

    step = tf.function(step) if in_graph else step
    start = np.concatenate([variable.numpy().ravel() for variable in model.variables])
    for number in range(6):
        step(own_randn(16, 32, seed=number))
    assert same_everywhere(*model.variables)
    return start, np.concatenate([variable.numpy().ravel() for variable in model.variables])


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("options", [{}, {"groups": 1}])
def check_optimizers_of_tensorflow_1(in_graph, options):
    """Within a quarter of what float32's steps have moved."""
    train = tf.compat.v1.train
    start, exact = trained(hvd.Compression.none, in_graph, train.MomentumOptimizer(0.1, 0.9), **options)
    _, close = trained(hq.QSGDCompressor(bits=8), in_graph, train.MomentumOptimizer(0.1, 0.9), **options)
    assert 0.0 < np.linalg.norm(close - exact) < 0.25 * np.linalg.norm(exact - start)
