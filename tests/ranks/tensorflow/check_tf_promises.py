"""Promises 1, 3, 4 and 5 for every kind of compressor, in the cases that torch's front end is tested for."""

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from common_tf import Mlp, same_everywhere, same_mismatch
from shared import EXCHANGES, KINDS, error_of, in_turns, make, other_kind

import hvd_quant.tensorflow as hq

kinds = pytest.mark.parametrize("kind", KINDS)
kinds_and_exchanges = pytest.mark.parametrize(("kind", "exchange"), in_turns(KINDS, EXCHANGES))


def trained(kind, exchange, seed, **options):
    model = Mlp()
    step = model.step_function(make(hq, kind, min_numel=0, exchange=exchange, seed=seed), **options)
    for number in range(4):
        assert same_everywhere(*step(tf.constant(number)))
    return np.concatenate([variable.numpy().ravel() for variable in model.variables])


@kinds_and_exchanges
def check_same_bits_on_every_rank_and_in_every_run(kind, exchange):
    one, two = trained(kind, exchange, seed=5), trained(kind, exchange, seed=5)
    np.testing.assert_array_equal(one, two)
    # Error feedback rounds without noise; for the others, one exchange is enough.
    if not kind.startswith("error feedback") and exchange == EXCHANGES[0]:
        assert not np.array_equal(one, trained(kind, exchange, seed=6))


@kinds_and_exchanges
def check_what_is_not_finite_reaches_every_rank(kind, exchange):
    model = Mlp()
    compressor = make(hq, kind, min_numel=0, exchange=exchange, bucket_size=256)

    @tf.function
    def step(factor):
        with tf.GradientTape() as tape:
            x = sum(tf.reduce_sum(variable**2) for variable in model.variables)
            place = tf.reshape(model.variables[2], [-1])[300]
            x += place * factor
        tape = hvd.DistributedGradientTape(tape, compression=compressor)
        return tape.gradient(x, model.variables)

    for value in (0.0, float("nan"), 0.0, float("-inf"), 0.0):
        gradients = step(tf.constant(value if hvd.rank() == hvd.size() - 1 else 0.0))
        assert same_everywhere(*gradients)
        finite = np.isfinite(gradients[2].numpy().ravel())
        assert finite[:256].all()
        assert finite[512:].all()
        assert finite.all() if value == 0.0 else not finite[256:512].any()
        assert all(np.isfinite(gradients[i]).all() for i in (0, 1, 3))


@kinds
def check_another_configuration_is_an_error_everywhere(kind):
    """One rank has this kind, and the others have the next one."""
    compressor = make(hq, kind if hvd.rank() == 0 else other_kind(kind), min_numel=0)
    text = same_mismatch(error_of(lambda: Mlp().gradients(compressor, 0)))
    assert "hvd_quant is configured differently on the ranks" in text
    assert "on rank 0" in text
