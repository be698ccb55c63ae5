"""What hvd_quant.torch does without a second rank: names, arguments, and errors before training."""

import gc
import re
import subprocess
import sys
import weakref

import pytest
import torch
from launch import need

need("torch")

import hvd_quant.torch as hq  # noqa: E402
from hvd_quant import QSGD  # noqa: E402
from hvd_quant.torch.identity import ParameterNames  # noqa: E402


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


# --- names ----------------------------------------------------------------------------------------------


def with_gradients(count):
    pairs = [(f"p{i}", torch.nn.Parameter(torch.zeros(3))) for i in range(count)]
    for _, parameter in pairs:
        parameter.grad = torch.ones(3)
    return pairs


def test_a_gradient_is_found_by_identity_in_any_order():
    pairs = with_gradients(5)
    names = ParameterNames(pairs)
    for order in ([4, 3, 2, 1, 0], [4, 3, 2, 1, 0], [0, 2, 4, 1, 3], [1, 1, 1]):
        for i in order:
            assert names.find(pairs[i][1].grad) == f"p{i}"
    assert names.find(torch.ones(3)) is None
    pairs[2][1].grad = None
    assert names.find(pairs[3][1].grad) == "p3"


def test_a_parameter_that_is_listed_twice_has_its_first_name():
    (_, tied), (_, other) = with_gradients(2)
    for order in ([tied, other], [other, tied]):
        names = ParameterNames([("a", tied), ("other", other), ("b", tied)])
        assert [names.find(parameter.grad) for parameter in order].count("a") == 1
        assert names.find(tied.grad) == "a"
        assert [name for name, _ in names.named_parameters()] == ["a", "other"]


def test_no_names():
    assert ParameterNames([]).find(torch.ones(3)) is None


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_sparse_gradient_is_found_by_its_dense_copy():
    pairs = [(f"p{i}", torch.nn.Parameter(torch.zeros(4, 2))) for i in range(3)]
    for i, (_, parameter) in enumerate(pairs):
        parameter.grad = torch.sparse_coo_tensor([[i]], [[1.0, 2.0]], (4, 2))
    names = ParameterNames(pairs)
    assert names.find_sparse(pairs[1][1].grad.to_dense(), taken=()) == "p1"
    assert names.find_sparse(pairs[1][1].grad.to_dense(), taken=("p1",)) is None


def test_watched_parameters_do_not_outlive_their_model():
    pairs = with_gradients(2)
    names = ParameterNames(pairs)
    names.watch()
    (pairs[1][1] * 2).sum().backward()
    assert names._accumulated == 1
    gone = weakref.ref(names), weakref.ref(pairs[0][1])
    del pairs, names
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_watching_ends_with_the_first_step_where_no_gradient_is_sparse():
    pairs = with_gradients(2)
    names = ParameterNames(pairs)
    names.watch()
    names.watch_no_more()
    names._accumulated = -1
    (pairs[0][1] + pairs[1][1]).sum().backward()
    assert names._accumulated == -1

    pairs = with_gradients(2)
    names = ParameterNames(pairs)
    names.watch()
    pairs[0][1].grad = torch.sparse_coo_tensor([[1]], [1.0], (3,))
    names.watch_no_more()  # goes on watching
    (pairs[1][1] * 2).sum().backward()
    assert names._accumulated == 1


@pytest.mark.parametrize("pairs", [[torch.zeros(3)], [("a",)], [(1, torch.zeros(3))], [("a", 3)], ["ab"]])
def test_what_is_no_named_parameter_is_refused(pairs):
    with pytest.raises(ValueError, match="pairs of name and parameter"):
        ParameterNames(pairs)


def test_equal_names_are_refused():
    with pytest.raises(ValueError, match=r"unique.*: a"):
        ParameterNames([("a", torch.zeros(3)), ("a", torch.zeros(3))])


# --- arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"bits": 0}, ValueError, "bits must be from 2 to 8"),
        ({"bits": 9}, ValueError, "bits must be from 2 to 8"),
        ({"bits": 4.0}, TypeError, "bits must be an integer"),
        ({"bits": True}, TypeError, "bits must be an integer"),
        ({"norm": "l1"}, ValueError, "norm must be 'max' or 'l2'"),
        ({"bucket_size": 0}, ValueError, "bucket_size must be from 1"),
        ({"bucket_size": -5}, ValueError, "bucket_size must be from 1"),
        ({"min_numel": -1}, ValueError, "min_numel must be from 0"),
        ({"min_numel": 1.5}, TypeError, "min_numel must be an integer"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"exchange": "ring"}, ValueError, "exchange must be 'auto' or 'allgather' or 'scatter_allgather'"),
        ({"exchange": None}, TypeError, "exchange must be"),
        ({"fusion_bytes": -1}, ValueError, "fusion_bytes must be from 0"),
        ({"fusion_bytes": 1e6}, TypeError, "fusion_bytes must be an integer"),
        ({"process_set": [0, 1]}, TypeError, r"ProcessSet of Horovod"),
        ({"named_parameters": [3]}, ValueError, "pairs of name and parameter"),
        ({"bitz": 4}, TypeError, "bitz"),
    ],
)
def test_bad_configuration_fails_at_construction(arguments, error, says):
    with pytest.raises(error, match=says):
        hq.QSGDCompressor(**arguments)


class Own(hq.DQSGDCompressor):
    """As users may have theirs."""

    def compress(self, tensor):
        return super().compress(tensor)


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        (hq.QSGDCompressor, "bits=4"),
        (hq.NUQSGDCompressor, "bits=4"),
        (hq.DQSGDCompressor, "mean_bits=4, total_steps=1000"),
        (hq.QuantizedCompressor, "QSGD(bits=4)"),
    ],
)
def test_a_class_is_no_compressor(kind, example):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
    name = kind.__name__
    says = re.escape(
        f"compression must be a compressor, not the class {name}: make one, as {name}({example})"
    )
    with pytest.raises(TypeError, match=f"^{says}$"):
        hq.DistributedOptimizer(optimizer, compression=kind)
    with pytest.raises(TypeError, match=f"^{says}$"):  # as Horovod's own functions call it
        kind.compress(torch.zeros(3))
    eval(f"hq.{name}({example})", {"hq": hq, "QSGD": QSGD})  # which is good advice


def test_methods_of_a_class_can_be_called_with_a_compressor():
    for call in (Own.compress, hq.QuantizedCompressor.compress, lambda own, x: own.compress(x)):
        with pytest.raises(RuntimeError, match=r"hvd\.init\(\)"):
            call(Own(mean_bits=4, total_steps=9), torch.zeros(3))
    with pytest.raises(TypeError, match="not the class Own"):
        hq.DistributedOptimizer(None, compression=Own)


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("HVD_QUANT_THREADS", "a positive .*"),
        ("HVD_QUANT_BANDWIDTH", "a positive .*"),
        ("HVD_QUANT_GPU_KERNELS", "'auto' or 'off',"),
    ],
)
def test_bad_environment_fails_at_construction(monkeypatch, variable, says):
    monkeypatch.setenv(variable, "fast")
    with pytest.raises(ValueError, match=f"{variable} must be {says} not 'fast'"):
        hq.QSGDCompressor()


def test_names_are_taken_once():
    compressor = hq.QSGDCompressor(named_parameters=with_gradients(2))
    with pytest.raises(ValueError, match="serves one optimizer"):
        compressor.bind(with_gradients(2))


def test_state():
    compressor = hq.QSGDCompressor(seed=3)
    state = compressor.state_dict()
    other = hq.QSGDCompressor()
    other.load_state_dict(state)
    assert other.state_dict() == state
    for bad in (
        {},
        {"seed": 1},
        {"seed": "x", "uses": {}, "least_use": 0},
        None,
        {"seed": 1, "uses": 3, "least_use": 0},
        {"seed": 1, "uses": {"a": -5}, "least_use": 0},
        {"seed": 1, "uses": {"a": 2.0}, "least_use": 0},
        {"seed": 1, "uses": {}, "least_use": -1},
    ):
        with pytest.raises(ValueError, match="not a state"):
            other.load_state_dict(bad)
    assert other.state_dict() == state


def test_residuals_that_fit_no_parameter():
    parameters = with_gradients(2)
    name, parameter = parameters[0]
    right = {name: torch.zeros(parameter.numel())}
    for wrong in ({name: torch.zeros(parameter.numel() + 1)}, {**right, "nonsense": torch.ones(3)}):
        state = {**hq.QSGDCompressor().state_dict(), "residuals": wrong}
        late, early = (hq.QSGDCompressor(error_feedback=True) for _ in range(2))
        late.load_state_dict(state)
        with pytest.raises(ValueError, match="residuals of"):
            late.bind(parameters)
        early.bind(parameters)
        with pytest.raises(ValueError, match="residuals of"):
            early.load_state_dict(state)
    late.load_state_dict({**state, "residuals": right})
    late.bind(parameters)


def test_statistics_before_the_first_step():
    assert hq.QSGDCompressor().stats() == {
        "steps": 0,
        "messages": 0,
        "raw_bytes": 0,
        "wire_bytes": 0,
        "received_bytes": 0,
        "compression_ratio": 1.0,
    }


# --- without Horovod ------------------------------------------------------------------------------------


def test_horovod_not_initialised():
    x = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"hvd\.init\(\)"):
        hq.DistributedOptimizer(torch.optim.SGD([x], lr=1.0), compression=hq.QSGDCompressor())
    with pytest.raises(RuntimeError, match=r"hvd\.init\(\)"):
        hq.QSGDCompressor().compress(torch.zeros(3))


@pytest.mark.parametrize(
    ("missing", "says"), [("horovod", "needs Horovod 0.28 built with PyTorch"), ("torch", "needs PyTorch")]
)
def test_missing_packages_are_named(missing, says):
    done = run(f"import sys; sys.modules[{missing!r}] = None; import hvd_quant.torch")
    assert done.returncode != 0
    assert says in done.stderr


def test_one_rank_trains_alone():
    done = run(
        "import torch, horovod.torch as hvd, hvd_quant.torch as hq\n"
        "hvd.init()\n"
        "x = torch.nn.Parameter(torch.ones(3000))\n"
        "compressor = hq.QSGDCompressor(bits=8)\n"
        "optimizer = hq.DistributedOptimizer(torch.optim.SGD([x], lr=0.5), compression=compressor)\n"
        "x.square().sum().backward(); optimizer.step()\n"
        "assert x.abs().max() == 0\n"
        "y = hvd.allreduce(torch.linspace(0, 1, 3000), compression=hq.QSGDCompressor(bits=8))\n"
        "assert (y - torch.linspace(0, 1, 3000)).abs().max() < 1 / 127\n"
    )
    assert done.returncode == 0, done.stderr


def test_horovods_own_functions_refuse_a_class():
    done = run(
        "import torch, horovod.torch as hvd, hvd_quant.torch as hq\n"
        "hvd.init()\n"
        "hvd.allreduce(torch.zeros(3000), compression=hq.QSGDCompressor)"
    )
    says = (
        "compression must be a compressor, not the class QSGDCompressor: make one, as QSGDCompressor(bits=4)"
    )
    assert f"TypeError: {says}" in done.stderr
