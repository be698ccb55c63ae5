"""Unused compressors travel to workers of ``horovod.run``, Spark and Ray, which train with them.

Spark and Ray where they are installed: ``pip install "pyspark<4" pyarrow fsspec ray``.
"""

import os
import sys

import pytest
from launch import ROOT, SHARED_CORES, need

need("torch")
import horovod  # noqa: E402  after it is known to be there

import hvd_quant.torch as hq  # noqa: E402

WORKERS = {**SHARED_CORES, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


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
        stats = compressor.stats() | {"error_feedback": "residuals" in compressor.state_dict()}
        return hvd.rank(), model.weight.detach().numpy().tobytes(), stats

    return train


def check(results):
    assert [rank for rank, *_ in results] == [0, 1]
    assert len({weights for _, weights, _ in results}) == 1
    for *_, stats in results:
        assert stats["steps"] == 5
        assert stats["compression_ratio"] > 4
        assert stats["error_feedback"]


@pytest.fixture
def compressor():
    return hq.QSGDCompressor(bits=4, error_feedback=True)


def test_horovod_run(compressor, monkeypatch):
    for name, value in WORKERS.items():
        monkeypatch.setenv(name, value)
    check(horovod.run(make_trainer(), (compressor,), num_proc=2, use_gloo=True))


def test_spark_run(compressor, monkeypatch):
    pyspark = pytest.importorskip("pyspark")
    import horovod.spark

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    options = {"spark.driver.host": "127.0.0.1", "spark.ui.enabled": "false"}
    with pyspark.sql.SparkSession.builder.master("local[2]").config(map=options).getOrCreate():
        environment = {**os.environ, **WORKERS}
        check(horovod.spark.run(make_trainer(), (compressor,), num_proc=2, use_gloo=True, env=environment))


def test_ray_executor(compressor):
    ray = pytest.importorskip("ray")
    from horovod.ray import RayExecutor

    where = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(num_cpus=2, runtime_env={"env_vars": WORKERS}, **where)
    try:
        executor = RayExecutor(RayExecutor.create_settings(timeout_s=60), num_workers=2, use_gpu=False)
        executor.start()
        check(executor.run(make_trainer(), (compressor,)))
        executor.shutdown()
    finally:
        ray.shutdown()
