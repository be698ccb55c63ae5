"""Unused compressors travel to workers of ``horovod.run``, Spark and Ray, which train with them.

Spark and Ray where they are installed: ``pip install "pyspark<4" ray``. Its estimators need petastorm, too.
"""

import os

import pytest
from launch import ROOT, SHARED_CORES, need

need("torch")
import horovod  # noqa: E402  after it is known to be there
import torch  # noqa: E402

import hvd_quant.torch as hq  # noqa: E402

WORKERS = {**SHARED_CORES, "PYTHONPATH": str(ROOT)}
ENVIRONMENT = {**os.environ, **WORKERS}


def make_trainer():
    """A function that is pickled by value: workers cannot import this module."""

    def train(compressor):
        import horovod.torch as hvd
        import torch

        import hvd_quant.torch as hq

        hvd.init()
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer = hq.DistributedOptimizer(optimizer, model.named_parameters(), compression=compressor)
        for step in range(5):
            optimizer.zero_grad()
            inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(100 * step + hvd.rank()))
            model(inputs).square().mean().backward()
            optimizer.step()
        return hvd.rank(), model.weight.detach().numpy().tobytes(), compressor.stats()

    return train


def check(results):
    assert [rank for rank, *_ in results] == [0, 1]
    assert len({weights for _, weights, _ in results}) == 1
    for *_, stats in results:
        assert stats["steps"] == 5
        assert stats["compression_ratio"] > 4


@pytest.fixture
def compressor():
    return hq.QSGDCompressor(bits=4, error_feedback=True)


def test_horovod_run(compressor, monkeypatch):
    for name, value in WORKERS.items():
        monkeypatch.setenv(name, value)
    check(horovod.run(make_trainer(), (compressor,), num_proc=2, use_gloo=True))


@pytest.fixture(scope="module")
def spark():
    pyspark = pytest.importorskip("pyspark")
    builder = pyspark.sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    session = builder.config("spark.driver.bindAddress", "127.0.0.1").getOrCreate()
    yield session
    session.stop()


def test_spark_run(spark, compressor):
    import horovod.spark

    check(horovod.spark.run(make_trainer(), (compressor,), num_proc=2, use_gloo=True, env=ENVIRONMENT))


def test_ray_executor(compressor):
    ray = pytest.importorskip("ray")
    from horovod.ray import RayExecutor

    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": WORKERS})
    try:
        executor = RayExecutor(RayExecutor.create_settings(timeout_s=60), num_workers=2, use_gpu=False)
        executor.start()
        check(executor.run(make_trainer(), (compressor,)))
        executor.shutdown()
    finally:
        ray.shutdown()


def test_an_estimator_of_spark(spark, compressor, tmp_path):
    """Which trains with Horovod's own optimizer."""
    pytest.importorskip("petastorm")
    from horovod.spark.common.backend import SparkBackend
    from horovod.spark.common.store import LocalStore
    from horovod.spark.torch import TorchEstimator

    model = torch.nn.Linear(2, 1)
    rows = [(float(i % 7), float(i % 3), float(i % 7 - i % 3)) for i in range(256)]
    frame = spark.createDataFrame(rows, ["a", "b", "label"])
    estimator = TorchEstimator(
        backend=SparkBackend(num_proc=2, use_gloo=True, env=ENVIRONMENT),
        store=LocalStore(str(tmp_path)),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        loss=lambda output, labels: torch.nn.functional.mse_loss(output.flatten(), labels.flatten()),
        input_shapes=[[-1, 2]],
        feature_cols=["a", "b"],
        label_cols=["label"],
        batch_size=16,
        epochs=3,
        gradient_compression=compressor,
        verbose=0,
    )
    trained = estimator.fit(frame)
    losses = [epoch["train"]["loss"] for epoch in trained.getHistory()]
    assert losses[-1] < losses[0]
