"""Gradients that are quantized otherwise than the rest, or not at all, by their variables' names."""

import os
import warnings

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from common_tf import Mlp, exact_mean, gathered, own_randn, same_everywhere, same_mismatch
from shared import EXCHANGES, error_of

import hvd_quant.tensorflow as hq
from hvd_quant import NUQSGD, QSGD

pytestmark = pytest.mark.skipif(os.environ.get("TF_USE_LEGACY_KERAS") == "1", reason="is of Keras 3")
exchanges = pytest.mark.parametrize("exchange", EXCHANGES)
# Of four gradients the first is as the compressor has it, the third finer, and the others exact.
OVERRIDES = {"*bias": None, "2/*": NUQSGD(bits=8, norm="max")}
NAMES = ["1/kernel", "1/bias", "2/kernel", "2/bias"]


class Named(Mlp):
    def __init__(self):
        super().__init__(width=128)
        self.variables = [
            tf.Variable(one, name=name) for one, name in zip(self.variables, NAMES, strict=True)
        ]

    def reduced(self, compression, seed=0, **options):
        """By our tape."""
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self(own_randn(16, 32, seed=seed)) ** 2)
        tape = hq.DistributedGradientTape(tape, compression=compression, **options)
        return tape.gradient(loss, self.variables)


def errors(results, exact):
    assert same_everywhere(*results)
    return [
        float(np.linalg.norm(result - mean) / np.linalg.norm(mean))
        for result, mean in zip(results, exact, strict=True)
    ]


def assert_each_has_its_own(results, exact, *, coarse=True):
    wrong = errors(results, exact)
    assert wrong[1] < 1e-6
    assert wrong[3] < 1e-6
    assert 1e-3 < wrong[2] < 0.4
    assert not coarse or wrong[0] > 0.5


@pytest.mark.parametrize(
    ("kind", "traced", "groups", "exchange"),
    [  # every two of the values together
        ("qsgd", False, None, EXCHANGES[0]),
        ("qsgd", True, 1, EXCHANGES[-1]),
        ("dqsgd", True, None, EXCHANGES[0]),
        ("dqsgd", False, 1, EXCHANGES[0]),
        ("dqsgd", False, None, EXCHANGES[-1]),
    ],
)
def check_tape(kind, traced, groups, exchange):
    model = Named()
    options = {"overrides": OVERRIDES, "exchange": exchange, "min_numel": 0}
    if kind == "qsgd":
        compressor = hq.QSGDCompressor(bits=2, **options)
    else:
        compressor = hq.DQSGDCompressor(k=1e-6, **options)

    def step(seed):
        return model.reduced(compressor, seed, groups=groups)

    step = tf.function(step) if traced else step
    for number in range(2):  # DQ-SGD begins with 8 bits, and has 2 from then on
        seed = tf.constant(number)
        exact = [exact_mean(gradient) for gradient in model.local_gradients(seed)]
        assert_each_has_its_own(step(seed), exact, coarse=kind == "qsgd" or number == 1)
    stats = compressor.stats()
    assert stats["steps"] == 2
    assert stats["messages"] == (2 if groups else 4)
    assert stats["raw_bytes"] == 2 * 4 * sum(one.shape.num_elements() for one in model.variables)
    assert len(compressor._names) == 4  # of what is traced, once


@exchanges
def check_keras(exchange):
    import keras

    import hvd_quant.tensorflow.keras as hqk

    def variable(name, *shape):
        return keras.Variable(np.zeros(shape, np.float32), name=name)

    variables = [
        variable("plain", 40, 50),
        variable("exact", 60, 50),
        variable("fine", 40, 50),
        variable("small", 9),
    ]
    compressor = hq.QSGDCompressor(
        bits=2, overrides={"exact": None, "fine": QSGD(bits=8), "small": QSGD()}, exchange=exchange
    )
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compressor)
    optimizer.build(variables)
    gradients = [own_randn(*one.shape, seed=i) for i, one in enumerate(variables)]
    apply = tf.function(lambda *gradients: optimizer.apply(gradients, variables))
    for how in (apply, lambda *gradients: optimizer.apply(gradients, variables)):
        before = [one.numpy() for one in variables]
        how(*gradients)
        moved = [then - one.numpy() for one, then in zip(variables, before, strict=True)]
        wrong = errors(moved, [exact_mean(gradient) for gradient in gradients])
        assert wrong[0] > 0.3
        assert max(wrong[1], wrong[3]) < 1e-5
        assert 1e-4 < wrong[2] < 0.1
    stats = compressor.stats()
    assert stats["messages"] == 2  # the two that are quantized travel together
    sent = stats["wire_bytes"] / 2
    assert 4 * 3000 < sent < 1.5 * 4 * 3000  # the exact one as float32, in a call of its own


def check_keras_fit_by_paths(tmp_path):
    import keras
    from check_tf_keras import fit

    import hvd_quant.tensorflow.keras as hqk

    path = tmp_path / "overrides.yaml"
    path.write_text('"*/last/kernel": none\n"net/*": {scheme: qsgd, bits: 8}\n"embed*": none\n')
    layers = [keras.layers.Dense(64, name="first"), keras.layers.Dense(32, name="last")]
    model = keras.Sequential([keras.Input((32,)), *layers], name="net")
    compressor = hq.QSGDCompressor(overrides=path)
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=compressor)
    with pytest.warns(UserWarning, match=r"'embed\*' holds for no gradient") as caught:
        fit(optimizer, model)
    assert len([one for one in caught if "override" in str(one.message)]) == 1
    assert same_everywhere(*(variable.numpy() for variable in model.variables))
    assert compressor.stats()["messages"] == 8


@pytest.mark.parametrize("traced", [False, True])
def check_two_variables_with_one_gradient(traced):
    one, two = (tf.Variable(tf.zeros([40, 50]), name=name) for name in ("one", "two"))
    compressor = hq.QSGDCompressor(bits=2, overrides={"one": None})

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(x * (one + two))
        return hq.DistributedGradientTape(tape, compression=compressor).gradient(loss, [one, two])

    x = own_randn(40, 50)
    wrong = errors((tf.function(step) if traced else step)(x), [exact_mean(x)] * 2)
    assert wrong[0] < 1e-6
    assert wrong[1] > 0.3


def check_other_sources_of_the_same_shapes():
    """Outside of a function, what has been traced for some is not taken for others."""
    variables = [tf.Variable(tf.zeros([40, 50]), name=name) for name in ("exact", "coarse")]
    compressor = hq.QSGDCompressor(bits=2, overrides={"exact": None})
    x = own_randn(40, 50)
    for one in (*variables, *variables):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(x * one)
        (result,) = hq.DistributedGradientTape(tape, compression=compressor).gradient(loss, [one])
        (wrong,) = errors([result], [exact_mean(x)])
        assert (wrong < 1e-6) == (one is variables[0])


def check_none_sparse_and_dense_sparse_gradients():
    used, unused = tf.Variable(tf.ones([40, 50]), name="used"), tf.Variable(tf.ones([40, 50]), name="unused")
    rows = tf.Variable(tf.ones([100, 50]), name="rows")
    compressor = hq.QSGDCompressor(bits=2, overrides={"used": None, "unused": None, "rows": QSGD(bits=8)})

    @tf.function
    def gradients(x, sparse_as_dense):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(x * used) + tf.reduce_sum(tf.gather(rows, [3, 7]) * x[:2])
        tape = hq.DistributedGradientTape(tape, compression=compressor, sparse_as_dense=sparse_as_dense)
        return tape.gradient(loss, [used, unused, rows])

    x = own_randn(40, 50)
    own = np.zeros([100, 50])
    own[[3, 7]] = x[:2]
    for sparse_as_dense in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            dense, none, sparse = gradients(x, sparse_as_dense)
        assert none is None
        assert isinstance(sparse, tf.IndexedSlices) != sparse_as_dense
        wrong = errors([dense, tf.convert_to_tensor(sparse)], [exact_mean(x), np.mean(gathered(own), axis=0)])
        assert wrong[0] < 1e-6
        assert (wrong[1] > 1e-6) == sparse_as_dense
        assert wrong[1] < 0.1


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.float16], ids=lambda dtype: dtype.name)
def check_by_hand_and_with_shapes_that_are_not_known(dtype):
    compressor = hq.QSGDCompressor(bits=2, overrides={"exact": None, "fine": QSGD(bits=8)}, min_numel=0)

    @tf.function(input_signature=[tf.TensorSpec([None], dtype)] * 2)
    def together(x, y):
        compressor.name_gradients([("exact", x), ("fine", y)], grouped=True)
        return hvd.grouped_allreduce([x, y], compression=compressor)

    def alone(x):
        compressor.name_gradients([("exact", x)])
        return hvd.allreduce(x, compression=compressor)

    exactly = {"rtol": 2e-2 if dtype.size == 2 else 1e-5, "atol": 1e-2 if dtype.size == 2 else 1e-6}
    unknown = tf.function(alone, input_signature=[tf.TensorSpec([None], dtype)])
    for count in (2000, 5, 1):
        x, y = own_randn(count, dtype=dtype), own_randn(count, seed=1, dtype=dtype)
        results = [*together(x, y), alone(x), unknown(x)]
        assert all(result.dtype == dtype for result in results)
        assert same_everywhere(*results)
        for result in (results[0], *results[2:]):
            np.testing.assert_allclose(result, exact_mean(x), **exactly)
        assert np.abs(results[1] - exact_mean(y)).max() < 0.1


def check_error_feedback():
    model = Named()
    compressor = hq.QSGDCompressor(bits=2, error_feedback=True, min_numel=0, overrides={"2/*": QSGD(bits=8)})
    step = tf.function(lambda seed: model.reduced(compressor, seed))
    for number in range(2):
        step(tf.constant(number))
    kept = compressor.state_dict()["residuals"]
    assert sorted(kept) == ["0.0", "1.0", "2.0", "3.0"]
    assert np.linalg.norm(kept["2.0"]) < 0.2 * np.linalg.norm(kept["0.0"])


def check_on_a_gpu_on_cpu_tensors(monkeypatch):
    """TensorFlow's operations; where one scheme of a group is none of theirs, the host."""
    from hvd_quant.codec import native
    from hvd_quant.tensorflow import device

    monkeypatch.setattr(device, "has_gpu", lambda: True)
    model = Named()
    exact = [exact_mean(gradient) for gradient in model.local_gradients(0)]
    for overrides in (OVERRIDES, {**OVERRIDES, "2/*": QSGD(bits=8, coding="huffman")}):
        packed = overrides is OVERRIDES
        with monkeypatch.context() as patch:
            if packed:
                patch.setattr(native, "encode_message", None)  # not called
            compressor = hq.QSGDCompressor(bits=2, overrides=overrides, min_numel=0)
            assert_each_has_its_own(model.reduced(compressor, groups=1), exact)


def check_different_overrides_are_an_error_everywhere():
    overrides = {"1/kernel": None} if hvd.rank() == 0 else {"1/*": None}
    compressor = hq.QSGDCompressor(overrides=overrides)
    text = same_mismatch(error_of(lambda: Named().reduced(compressor)))
    assert 'overrides is [["1/kernel", "None"]] on rank 0' in text


@exchanges
@pytest.mark.parametrize("traced", [False, True])
def check_different_names_are_an_error_everywhere(exchange, traced):
    compressor = hq.QSGDCompressor(bits=4, overrides={"mine": QSGD(bits=8)}, exchange=exchange)
    x = own_randn(3000)

    def reduce():
        compressor.name_gradients([("mine" if hvd.rank() == 0 else "yours", x)])
        return hvd.allreduce(x, compression=compressor)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        error = error_of(tf.function(reduce) if traced else reduce)
    assert all("different gradients at place 0" in text for text in gathered(str(error)))


def check_names_are_needed():
    compressor = hq.QSGDCompressor(overrides={"1/*": None})
    for action in (
        lambda: Named().gradients(compressor, 0),  # by Horovod's own tape
        tf.function(lambda: hvd.allreduce(own_randn(2000), compression=compressor)),
        lambda: hvd.allreduce(own_randn(3), compression=compressor),
    ):
        error = error_of(action)
        assert isinstance(error, ValueError)
        assert "overrides need the variables' names" in str(error)
        assert "hvd_quant.tensorflow.DistributedGradientTape" in str(error)
        assert "keras.DistributedOptimizer" in str(error)
        compressor.reset()


def check_schemes_that_need_error_feedback():
    with pytest.raises(ValueError, match="biased"):
        hq.QSGDCompressor(overrides={"1/*": QSGD(rounding="nearest")})
