"""Keras 3: model.fit with our optimizer, and the cases in which Horovod's own would do nothing."""

import os
import types

import horovod.tensorflow as hvd
import keras
import numpy as np
import pytest
import tensorflow as tf
from common_tf import exact_mean, gathered, own_randn, same_everywhere
from shared import error_of, make

import hvd_quant.tensorflow as hq
import hvd_quant.tensorflow.keras as hqk
from hvd_quant.codec import native
from hvd_quant.tensorflow.keras import elastic

pytestmark = pytest.mark.skipif(os.environ.get("TF_USE_LEGACY_KERAS") == "1", reason="is of Keras 3")


def make_model():
    return keras.Sequential(
        [keras.Input((32,)), keras.layers.Dense(64, activation="tanh"), keras.layers.Dense(32)]
    )


def own_data(count=64, seed=0):
    return own_randn(count, 32, seed=seed).numpy(), own_randn(count, 32, seed=seed + 1).numpy()


def fit(optimizer, model=None, epochs=2, callbacks=(), **options):
    model = model or make_model()
    model.compile(optimizer, "mse", jit_compile=False, **options)
    history = model.fit(
        *own_data(),
        batch_size=16,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=[hqk.BroadcastGlobalVariablesCallback(0), *callbacks],
    )
    return model, history


@pytest.mark.parametrize("options", [{}, {"groups": 1}, {"op": hvd.Sum}, {"gradient_predivide_factor": 2.0}])
def check_fit_keeps_replicas_identical_and_encodes_every_gradient_once(options, monkeypatch):
    encoded = []
    encode = native.encode_message

    def count(values, *rest):
        encoded.extend(value.shape for value in values)
        return encode(values, *rest)

    monkeypatch.setattr(native, "encode_message", count)
    keras.utils.set_random_seed(hvd.rank())  # replicas begin apart, and are broadcast
    optimizer = hqk.DistributedOptimizer(
        keras.optimizers.Adam(0.01), compression=hq.QSGDCompressor(exchange="allgather"), **options
    )
    model, _ = fit(optimizer)
    assert same_everywhere(*(variable.numpy() for variable in model.variables))
    assert same_everywhere(*(variable.numpy() for variable in model.optimizer.variables))
    assert sorted(encoded) == sorted(2 * 4 * [(32, 64), (64, 32)])  # epochs, steps; biases are small
    assert type(optimizer).__name__ == "Adam"


def check_training_is_that_of_one_process_with_all_data():
    """With a fine quantization; clipping comes after the mean."""
    size = hvd.size()
    optimizer = hqk.DistributedOptimizer(
        keras.optimizers.SGD(0.5, global_clipnorm=0.1), compression=hq.QSGDCompressor(bits=8, bucket_size=32)
    )
    model = make_model()
    start = model.get_weights()
    fit(optimizer, model, epochs=3)

    alone = make_model()
    alone.set_weights(start)
    alone.compile(keras.optimizers.SGD(0.5, global_clipnorm=0.1), "mse", jit_compile=False)
    parts = [np.stack(gathered(part)) for part in own_data()]
    x, y = (part.reshape(size, 4, 16, 32).swapaxes(0, 1).reshape(-1, 32) for part in parts)
    alone.fit(x, y, batch_size=16 * size, epochs=3, verbose=0, shuffle=False)
    moved = max(np.abs(one - two).max() for one, two in zip(alone.get_weights(), start, strict=True))
    for one, two in zip(model.get_weights(), alone.get_weights(), strict=True):
        assert np.abs(one - two).max() < 0.1 * moved


@pytest.mark.parametrize("average", [False, True])
def check_backward_passes_per_step(average):
    compressor = hq.QSGDCompressor(bits=8, bucket_size=32, exchange="allgather")
    optimizer = hqk.DistributedOptimizer(
        keras.optimizers.SGD(1.0),
        compression=compressor,
        backward_passes_per_step=2,
        average_aggregated_gradients=average,
    )
    variable = keras.Variable(np.zeros((40, 50), np.float32))
    gradients = [own_randn(40, 50, seed=seed) for seed in range(4)]
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([gradient], [variable])
    exact = -sum(exact_mean(gradient) for gradient in gradients) / (2 if average else 1)
    assert np.abs(variable.numpy() - exact).max() < 0.2
    assert same_everywhere(variable.numpy())
    assert compressor.stats()["messages"] == 2


def check_a_loss_scaler_skips_the_step_on_all_ranks():
    compressor = hq.QSGDCompressor(min_numel=0)
    optimizer = hqk.DistributedOptimizer(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=8.0),
        compression=compressor,
    )
    variable = keras.Variable(np.zeros((40, 50), np.float32))
    optimizer.build([variable])
    apply = tf.function(lambda gradient: optimizer.apply([gradient], [variable]))
    for step in range(3):
        gradient = own_randn(40, 50, seed=step).numpy()
        if step == 1 and hvd.rank() == hvd.size() - 1:
            gradient[3, 4] = np.inf
        before = variable.numpy()
        apply(tf.constant(gradient))
        assert same_everywhere(variable.numpy())
        assert np.array_equal(before, variable.numpy()) == (step == 1)
        assert np.isfinite(variable.numpy()).all()
    assert float(optimizer.dynamic_scale) == 4.0


def check_mixed_float16_needs_a_loss_scaler_in_ours():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        error = error_of(
            lambda: fit(hqk.DistributedOptimizer(keras.optimizers.SGD(), compression=hq.QSGDCompressor()))
        )
        assert "DistributedOptimizer(keras.optimizers.LossScaleOptimizer" in str(error)
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))
        model, _ = fit(hqk.DistributedOptimizer(scaled, compression=hq.QSGDCompressor()))
        assert same_everywhere(*(variable.numpy() for variable in model.variables))
        assert all(np.isfinite(variable.numpy()).all() for variable in model.variables)
    finally:
        keras.config.set_dtype_policy("float32")


def check_a_loss_scaler_around_ours_is_an_error():
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(), compression=hq.QSGDCompressor())
    around = keras.optimizers.LossScaleOptimizer(optimizer)
    variable = keras.Variable(np.zeros((40, 50), np.float32))
    around.build([variable])
    error = error_of(lambda: around.apply([own_randn(40, 50)], [variable]))
    assert "a loss scaler must be in the DistributedOptimizer" in str(error)


@pytest.mark.parametrize("kind", ["error feedback", "DQ-SGD"])
def check_a_loss_scale_does_not_matter(kind):
    """When it changes, what error feedback has kept must not be taken for more or less than it is."""
    results = []
    for scale in (1.0, 8.0):
        compressor = make(hq, kind, min_numel=0, exchange="allgather")
        scaled = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(1.0), initial_scale=scale, dynamic_growth_steps=2
        )
        optimizer = hqk.DistributedOptimizer(scaled, compression=compressor)
        variable = keras.Variable(np.zeros((40, 50), np.float32))
        optimizer.build([variable])
        for step in range(4):
            optimizer.apply([optimizer.scale_loss(own_randn(40, 50, seed=step))], [variable])
        results.append((variable.numpy(), compressor.stats().get("bits")))
        assert float(optimizer.dynamic_scale) == 4 * scale
    if kind == "error feedback":  # others have the noise of another compressor
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert results[0][1] == results[1][1]


def check_float16_gradients_under_a_loss_scaler():
    """Some are too small for float16 without the scale, which is itself too large for it."""
    optimizer = hqk.DistributedOptimizer(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=2.0**16),
        compression=hq.QSGDCompressor(bits=8),
    )
    variable = keras.Variable(np.zeros(2000, np.float32))
    optimizer.build([variable])
    optimizer.apply([tf.cast(2.0**16 * tf.fill([2000], 3e-8), tf.float16)], [variable])
    np.testing.assert_allclose(variable.numpy(), -3e-8, rtol=1e-2)


class Sum(keras.optimizers.SGD):
    """Has an apply of its own, as users' optimizers may."""

    def apply(self, grads, trainable_variables=None):
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            variable.assign_add(gradient)


class Multi(keras.optimizers.MultiOptimizer):
    def __init__(self):
        one, two = keras.optimizers.SGD(1.0), keras.optimizers.Adam(0.1)
        super().__init__(keras.optimizers.OptimizerMap(one, {"second": two}))


@pytest.mark.parametrize("kind", [Sum, Multi])
def check_an_optimizer_with_an_apply_of_its_own(kind):
    compressor = hq.QSGDCompressor(bits=8, exchange="allgather")
    optimizer = hqk.DistributedOptimizer(kind(), compression=compressor)
    variables = [keras.Variable(np.zeros((40, 50), np.float32), name=name) for name in ("first", "second")]
    gradients = [own_randn(40, 50, seed=seed) for seed in range(2)]
    optimizer.build(variables)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    assert same_everywhere(*(variable.numpy() for variable in variables))
    sign = 1.0 if kind is Sum else -1.0
    assert np.abs(variables[0].numpy() - sign * exact_mean(gradients[0])).max() < 0.1
    assert compressor.stats()["messages"] == 1
    with pytest.raises(ValueError, match="backward_passes_per_step is not supported with"):
        hqk.DistributedOptimizer(kind(), backward_passes_per_step=2)


def check_variables_that_their_gradients_overwrite_are_refused():
    variable = keras.Variable(np.ones(3, np.float32))
    variable.overwrite_with_gradient = True
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(), compression=hq.QSGDCompressor())
    optimizer.build([variable])
    for variables in (None, [variable], (one for one in [variable])):
        with pytest.raises(ValueError, match="overwritten by its gradient"):
            optimizer.apply([tf.ones(3)], variables)


def check_an_optimizer_with_an_apply_gradients_of_its_own_is_refused():
    class Own(keras.optimizers.SGD):
        def apply_gradients(self, grads_and_vars):
            pass

    with pytest.raises(TypeError, match="Own has an apply_gradients of its own"):
        hqk.DistributedOptimizer(Own())


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("quantized", [False, True])
def check_ranks_may_have_made_other_things_before(quantized, passes):
    """Keras numbers what it makes: names differ between ranks."""
    for _ in range(hvd.rank()):
        keras.optimizers.Adam(), make_model()
    compression = hq.QSGDCompressor() if quantized else hvd.Compression.none
    optimizer = hqk.DistributedOptimizer(
        keras.optimizers.Adam(0.01), compression=compression, backward_passes_per_step=passes
    )
    model, _ = fit(optimizer)
    assert len(set(gathered(optimizer.name))) == len(set(gathered(model.name))) == hvd.size()
    assert same_everywhere(*(variable.numpy() for variable in model.variables))


def check_one_rank_has_a_checkpoint(tmp_path):
    """Its optimizer has variables, and the others' have none yet."""
    optimizer = hqk.DistributedOptimizer(keras.optimizers.Adam(0.02), compression=hq.QSGDCompressor())
    model = make_model()
    model.compile(optimizer, "mse", jit_compile=False)
    if hvd.rank() == 0:
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(100)
    fit(optimizer, model, epochs=1)
    assert gathered(int(optimizer.iterations)) == [104] * hvd.size()
    assert same_everywhere(*(variable.numpy() for variable in optimizer.variables))


class Pair(keras.Model):
    """Two models, trained by a step of its own: Keras never takes it for built."""

    def __init__(self):
        super().__init__()
        self.one, self.two = make_model(), make_model()
        self.other_optimizer = self.make_optimizer()

    def make_optimizer(self):
        return hqk.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=hq.QSGDCompressor(min_numel=0))

    def train_step(self, data):
        optimizers = [self.other_optimizer, self.optimizer]
        for model, optimizer in zip([self.one, self.two], optimizers, strict=True):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(data[0]) - data[1]) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
        return {"loss": loss}


def check_a_model_with_a_training_step_of_its_own():
    keras.utils.set_random_seed(hvd.rank())
    model = Pair()
    model.compile(model.make_optimizer(), jit_compile=False)
    broadcast = hqk.BroadcastGlobalVariablesCallback(0)
    for _ in range(2):
        model.fit(*own_data(), batch_size=16, epochs=2, verbose=0, callbacks=[broadcast])
        assert same_everywhere(*(variable.numpy() for variable in model.variables))


def check_a_broadcast_leaves_accumulated_gradients_alone():
    """They are each rank's own: the first update, too, is by the mean over passes and ranks."""
    optimizer = hqk.DistributedOptimizer(
        keras.optimizers.SGD(0.5),
        compression=hq.QSGDCompressor(),
        backward_passes_per_step=2,
        average_aggregated_gradients=True,
    )
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, "linear", False, "zeros")])
    model.compile(optimizer, "mse", jit_compile=False)
    x, y = np.ones((2, 1)), np.full((2, 1), 1.0 + 2.0 * hvd.rank())
    model.fit(x, y, batch_size=1, verbose=0, callbacks=[hqk.BroadcastGlobalVariablesCallback(0)])
    assert model.weights[0].numpy().item() == np.mean(gathered(y))


def check_different_models_are_an_error_when_they_are_broadcast():
    width = 64 + hvd.rank()
    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(width), keras.layers.Dense(32)])
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(), compression=hq.QSGDCompressor())
    text = str(error_of(lambda: fit(optimizer, model)))
    assert all("the ranks have different models" in one for one in gathered(text))


def check_a_compressor_serves_one_optimizer():
    compressor = hq.QSGDCompressor()
    hqk.DistributedOptimizer(keras.optimizers.SGD(), compression=compressor)
    with pytest.raises(ValueError, match="a compressor serves one optimizer"):
        hqk.DistributedOptimizer(keras.optimizers.SGD(), compression=compressor)
    only_zero = hvd.add_process_set([0])
    with pytest.raises(ValueError, match="the same process_set"):
        hqk.DistributedOptimizer(
            keras.optimizers.SGD(), compression=hq.QSGDCompressor(), process_set=only_zero
        )
    hvd.remove_process_set(only_zero)


def check_an_optimizer_keeps_what_it_has():
    """Its state, and what its configuration cannot hold."""
    variables = [keras.Variable(np.ones((40, 50), np.float32), name=name) for name in "ab"]
    optimizer = keras.optimizers.SGD(lambda: 0.5, momentum=0.9, weight_decay=0.1)
    optimizer.exclude_from_weight_decay([variables[0]])
    optimizer.build(variables)
    optimizer.apply([tf.ones((40, 50))] * 2, variables)
    before = [variable.numpy() for variable in optimizer.variables]
    distributed = hqk.DistributedOptimizer(optimizer, compression=hq.QSGDCompressor())
    for one, two in zip(distributed.variables, before, strict=True):
        np.testing.assert_array_equal(one.numpy(), two)
    assert int(distributed.iterations) == 1
    assert float(distributed.learning_rate) == 0.5
    distributed.apply([tf.zeros((40, 50))] * 2, variables)
    assert variables[0].numpy()[0, 0] > variables[1].numpy()[0, 0]  # which has decayed
    with pytest.raises(ValueError, match="already"):
        hqk.DistributedOptimizer(distributed)


@pytest.mark.parametrize("kind", ["error feedback", "DQ-SGD"])
def check_run_eagerly(kind):
    compressor = make(hq, kind, fusion_bytes=0, min_numel=0)
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=compressor)
    model, _ = fit(optimizer, run_eagerly=True)
    assert same_everywhere(*(variable.numpy() for variable in model.variables))
    assert compressor.stats()["steps"] == 8


def check_sparse_gradients():
    """They travel uncompressed, with a warning, once; or dense."""
    for sparse_as_dense in (False, True):
        compressor = hq.QSGDCompressor(bits=8, min_numel=0, exchange="allgather")
        optimizer = hqk.DistributedOptimizer(
            keras.optimizers.SGD(1.0), compression=compressor, sparse_as_dense=sparse_as_dense
        )
        variable = keras.Variable(np.zeros((40, 50), np.float32))
        optimizer.build([variable])
        rows = own_randn(2, 50)
        gradient = tf.IndexedSlices(rows, tf.constant([3, 5 + hvd.rank()]), tf.constant([40, 50]))
        if sparse_as_dense:
            optimizer.apply([gradient], [variable])
        else:
            with pytest.warns(UserWarning, match=r"sparse .*sparse_as_dense=True has them quantized"):
                optimizer.apply([gradient], [variable])
        exact = np.zeros((40, 50))
        exact[[3, 5 + hvd.rank()]] = -rows.numpy()
        assert np.abs(variable.numpy() - np.mean(gathered(exact), axis=0)).max() < 0.1
        assert compressor.stats()["messages"] == (1 if sparse_as_dense else 0)


def check_local_variables_and_groups_of_variables():
    compressor = hq.QSGDCompressor(bits=8, min_numel=0, exchange="allgather")
    variables = [keras.Variable(np.zeros((40, 50), np.float32)) for _ in range(4)]
    rows = keras.Variable(np.zeros((3, 2), np.float32))
    optimizer = hqk.DistributedOptimizer(
        keras.optimizers.SGD(1.0), compression=compressor, groups=((variables[2], variables[0]),)
    )
    optimizer.register_local_var(variables[3].value)  # Keras's and TensorFlow's variables are one
    optimizer.register_local_var(rows)
    with pytest.raises(ValueError, match="cannot have local variables"):
        hqk.DistributedOptimizer(
            keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
        ).register_local_var(rows)
    gradients = [own_randn(40, 50, seed=seed) for seed in range(4)]
    sparse = tf.IndexedSlices(tf.ones([1, 2]), tf.constant([1]), tf.constant([3, 2]))
    optimizer.build([*variables, rows])
    optimizer.apply([*gradients, sparse], [*variables, rows])
    np.testing.assert_allclose(rows.numpy(), [[0, 0], [-1 / hvd.size()] * 2, [0, 0]], rtol=1e-6)
    for variable, gradient in zip(variables[:3], gradients, strict=False):
        assert np.abs(variable.numpy() + exact_mean(gradient)).max() < 0.1
    np.testing.assert_allclose(variables[3].numpy(), -gradients[3] / hvd.size(), rtol=1e-6)
    assert compressor.stats()["messages"] == 2


def check_metrics_are_averaged_before_others_see_them():
    seen = []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=hq.QSGDCompressor())
    _, history = fit(optimizer, callbacks=[hqk.MetricAverageCallback(), watch])
    assert len(set(gathered(tuple(history.history["loss"])))) == 1
    assert [one["loss"] for one in seen] == history.history["loss"]


class Rates(keras.callbacks.Callback):
    """The learning rate of every batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(float(self.model.optimizer.learning_rate))


def rates(callback, epochs):
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(0.5), compression=hq.QSGDCompressor())
    watch = Rates()
    _, history = fit(optimizer, epochs=epochs, callbacks=[callback, watch])
    ends = watch.seen[3::4]  # of 4 batches an epoch
    np.testing.assert_allclose(history.history["lr"], ends, rtol=1e-6)
    return watch.seen


def check_learning_rates_warm_up():
    size = hvd.size()
    found = rates(hqk.LearningRateWarmupCallback(0.8, warmup_epochs=2), 3)
    expected = [0.8 / size * ((batch + 1) / 4 * (size - 1) / 2 + 1) for batch in range(8)] + [0.8] * 4
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def check_learning_rates_follow_a_schedule():
    found = rates(hqk.LearningRateScheduleCallback(0.8, 0.5, start_epoch=1, end_epoch=3), 4)
    np.testing.assert_allclose(found, [0.5] * 4 + [0.8] * 4 + [0.4] * 8, rtol=1e-6)
    schedule = hqk.LearningRateScheduleCallback(0.8, lambda epoch: 1 / (1 + epoch), staircase=False)
    np.testing.assert_allclose(rates(schedule, 1), [0.8 / (1 + batch / 4) for batch in range(4)], rtol=1e-6)


def check_learning_rates_that_cannot_be_set():
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(decay), compression=hq.QSGDCompressor())
    with pytest.raises(ValueError, match="is a schedule already"):
        fit(optimizer, callbacks=[hqk.LearningRateScheduleCallback(0.8, 0.5)])
    momentum = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer = hqk.DistributedOptimizer(momentum, compression=hq.QSGDCompressor())
    with pytest.warns(UserWarning, match="momentum_correction=False"):
        fit(optimizer, epochs=1, callbacks=[hqk.LearningRateWarmupCallback(0.8)])


@pytest.mark.parametrize("given", ["fit", "callback"])
def check_epochs_of_a_resumed_fit(given):
    """The first one ends after the batches that were left; who stops training is listened to."""
    state = types.SimpleNamespace(batch=5, epoch=2)
    counts, model = [], make_model()
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    count = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: counts.append(0),
        on_train_batch_end=lambda batch, logs: counts.append(counts.pop() + 1),
    )
    stop = keras.callbacks.EarlyStopping(monitor="loss", patience=0)
    of_epochs = elastic.UpdateEpochStateCallback(state)
    of_batches = elastic.UpdateBatchStateCallback(state, 12 if given == "callback" else None)
    data = tf.data.Dataset.from_tensors((tf.ones([4, 32]), tf.ones([4, 32]))).repeat()
    options = {"steps_per_epoch": 12, "epochs": 5, "verbose": 0, "shuffle": False}
    model.fit(data, callbacks=[of_epochs, of_batches, count], **options)
    assert counts == [7, 12, 12, 12, 12]
    assert (state.epoch, state.batch) == (7, 0)
    for callbacks in ([stop, of_epochs, of_batches, count], [of_epochs, of_batches, stop, count]):
        counts.clear()
        model.fit(data, callbacks=callbacks, **options)
        assert counts == [12, 12]


@keras.saving.register_keras_serializable("checks")
class Registered(keras.optimizers.Adam):
    """As users register theirs."""


@pytest.mark.parametrize("kind", [keras.optimizers.Adam, Registered])
def check_a_saved_model_has_the_plain_optimizer(tmp_path, kind):
    optimizer = hqk.DistributedOptimizer(kind(0.02), compression=hq.QSGDCompressor())
    model, _ = fit(optimizer)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is kind
    assert float(loaded.optimizer.learning_rate) == pytest.approx(0.02)
    assert int(loaded.optimizer.iterations) == int(optimizer.iterations)


@pytest.mark.parametrize("compression", [hvd.Compression.none, hvd.Compression.fp16])
def check_without_quantization(compression):
    model, _ = fit(hqk.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=compression))
    assert same_everywhere(*(variable.numpy() for variable in model.variables))


def check_several_steps_in_one_execution():
    compressor = hq.DQSGDCompressor(mean_bits=4, total_steps=8)
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=compressor)
    model, _ = fit(optimizer, steps_per_execution=4)
    assert same_everywhere(*(variable.numpy() for variable in model.variables))
    bits = compressor.stats()["bits"]
    assert len(bits) == 8
    assert sum(bits) == pytest.approx(4 * 8, abs=1)


def check_xla_is_a_clear_error():
    optimizer = hqk.DistributedOptimizer(keras.optimizers.SGD(0.1), compression=hq.QSGDCompressor())
    model = make_model()
    model.compile(optimizer, "mse", jit_compile=True)  # as Keras has it by itself for some models
    error = error_of(lambda: model.fit(*own_data(), batch_size=16, verbose=0))
    assert "jit_compile=False" in str(error)

    compressor = hq.QSGDCompressor()
    compiled = tf.function(lambda x: hvd.allreduce(x, compression=compressor), jit_compile=True)
    assert "that XLA compiles" in str(error_of(lambda: compiled(own_randn(2000))))


def check_horovods_own_optimizer_is_refused():
    import horovod.tensorflow.keras as hvd_keras

    with pytest.raises(RuntimeError, match=r"hvd_quant\.tensorflow\.keras\.DistributedOptimizer"):
        hvd_keras.DistributedOptimizer(keras.optimizers.Adam(), compression=hq.QSGDCompressor())
    with pytest.raises(RuntimeError, match=r"hvd_quant\.tensorflow\.keras\.DistributedOptimizer"):
        hvd.DistributedOptimizer(keras.optimizers.SGD(), compression=hq.NUQSGDCompressor())
    hvd_keras.DistributedOptimizer(keras.optimizers.SGD())  # which is none of ours


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"op": hvd.Adasum}, "op must be hvd.Average or hvd.Sum"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor needs"),
        ({"backward_passes_per_step": 0}, "must be positive"),
        ({"groups": -1}, "groups must be"),
    ],
)
def check_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        hqk.DistributedOptimizer(keras.optimizers.SGD(), **options)
    with pytest.raises(TypeError, match="must be a Keras optimizer"):
        hqk.DistributedOptimizer("adam")
