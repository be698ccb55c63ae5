"""Fixtures of the unit tests. They need one process, no Horovod and no network."""

import backends
import pytest
from hypothesis import HealthCheck, settings

from hvd_quant.codec import _native

# Deterministic, so that a failure is a failure on every machine; nothing here asserts a duration. Fixtures
# that Hypothesis warns of only choose a backend, which does not change between examples.
settings.register_profile(
    "unit",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("unit")


@pytest.fixture(params=_native.available_isas())
def isa(request):
    """Each instruction set of this machine in turn, chosen for the native kernels."""
    before = _native.isa()
    _native.choose_isa(request.param)
    yield request.param
    _native.choose_isa(before)


@pytest.fixture(params=backends.ALL)
def backend(request, monkeypatch):
    """Value for ``backend=``, with what it stands for chosen: one of backends.py after the other."""
    before = _native.isa()
    yield backends.choose(request.param, monkeypatch)
    _native.choose_isa(before)


@pytest.fixture
def on_gpu(request):
    """Whether the backend is one on a GPU."""
    return "cuda" in request.node.callspec.params["backend"]
