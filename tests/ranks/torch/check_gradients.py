"""What comes out of the exchange: the mean of the ranks' gradients, the same bits on every rank."""

import copy
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from common import backward, gathered, local_gradients, mlp, own_randn, recover, same_everywhere
from horovod.torch import mpi_ops

import hvd_quant.torch as hq
from hvd_quant import NUQSGD, QSGD


def optimizer_of(model, compression, **options):
    return hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
        **options,
    )


def assert_mean(result, gradients, scheme, factor=1.0):
    """``result`` is ``factor`` times the mean of the gradients, but for each rank's largest gap of levels."""
    exact = torch.stack([gradient.double() for gradient in gradients]).mean(0)
    kind = float("inf") if scheme.norm == "max" else 2.0
    norm = sum(gradient.double().norm(kind).item() for gradient in gradients) / len(gradients)
    step = norm * np.diff(scheme.levels()).max()
    tolerance = factor * step + 2.0**-7 * exact.abs().max().item() * (result.dtype.itemsize == 2)
    assert (result.double() - factor * exact).abs().max().item() <= factor * step * 1e-5 + tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "scheme",
    [QSGD(bits=2), QSGD(bits=4, norm="l2", bucket_size=100), QSGD(bits=8), NUQSGD(bits=4, bucket_size=100)],
)
def check_all_ranks_get_the_mean(scheme, dtype):
    model = mlp(dtype=dtype)
    make = {QSGD: hq.QSGDCompressor, NUQSGD: hq.NUQSGDCompressor}[type(scheme)]
    compressor = make(scheme.bits, scheme.norm, scheme.bucket_size, min_numel=0)
    assert compressor.scheme == scheme
    optimizer = optimizer_of(model, compressor)
    for step in range(3):
        local = gathered(local_gradients(model, step))
        optimizer.zero_grad()
        backward(model, step)
        optimizer.synchronize()
        for i, parameter in enumerate(model.parameters()):
            assert parameter.grad.dtype == dtype
            assert parameter.grad.shape == parameter.shape
            assert same_everywhere(parameter.grad)
            assert_mean(parameter.grad, [gradients[i] for gradients in local], scheme)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"op": hvd.Average}, 1),
        ({"op": hvd.Sum}, None),
        ({"gradient_predivide_factor": 3.0}, 1),
        ({"groups": 2}, 1),
        ({"groups": 2, "op": hvd.Sum}, None),
    ],
)
@pytest.mark.parametrize("min_numel", [0, 1024])
def check_reduction_is_the_one_asked_for(options, factor, min_numel):
    factor = hvd.size() if factor is None else factor
    model = mlp()
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=8, min_numel=min_numel), **options)
    for step in range(2):
        local = gathered(local_gradients(model, step))
        optimizer.zero_grad()
        backward(model, step)
        optimizer.synchronize()
        for i, parameter in enumerate(model.parameters()):
            assert_mean(parameter.grad, [gradients[i] for gradients in local], QSGD(bits=8), factor)


def check_sum_is_size_times_average():
    x = own_randn(5000)
    average, total = (
        hvd.allreduce(x, compression=hq.QSGDCompressor(), op=op, name=f"op{op}")
        for op in (hvd.Average, hvd.Sum)
    )
    torch.testing.assert_close(total, average * hvd.size(), rtol=1e-6, atol=0)
    assert torch.equal(x, own_randn(5000))  # the input is the caller's


def check_groups_given_as_lists():
    model = mlp()
    first, second = model[0], model[2]
    groups = [list(first.parameters()), list(second.parameters())]
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=8), groups=groups)
    local = gathered(local_gradients(model))
    backward(model)
    optimizer.synchronize()
    for i, parameter in enumerate(model.parameters()):
        assert_mean(parameter.grad, [gradients[i] for gradients in local], QSGD(bits=8))


def check_backward_passes_per_step():
    model = mlp()
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=8), backward_passes_per_step=2)
    local = [
        [a + b for a, b in zip(one, two, strict=True)]
        for one, two in zip(
            gathered(local_gradients(model, 0)), gathered(local_gradients(model, 1)), strict=True
        )
    ]
    backward(model, 0)
    backward(model, 1)
    optimizer.synchronize()
    for i, parameter in enumerate(model.parameters()):
        assert_mean(parameter.grad, [gradients[i] for gradients in local], QSGD(bits=8))


def check_clipping_between_synchronize_and_step():
    model = mlp()
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=4))
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with optimizer.skip_synchronize():
            optimizer.step()
        norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
        assert norm <= 1e-3 * (1 + 1e-5)
        assert all(same_everywhere(parameter) for parameter in model.parameters())


def check_small_tensors_travel_as_horovod_sends_them():
    ours, stock = mlp(), mlp()
    ours_optimizer = optimizer_of(ours, hq.QSGDCompressor(bits=2, min_numel=1000))
    stock_optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(stock.parameters(), lr=0.1), [(f"stock.{n}", p) for n, p in stock.named_parameters()]
    )
    for step in range(3):
        for model, optimizer in ((ours, ours_optimizer), (stock, stock_optimizer)):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.synchronize()
        for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
            # Not bit by bit: with three ranks, the order of summation depends on what Horovod fused.
            assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-7) == (one.numel() < 1000)


class Branches(torch.nn.Module):
    """Equal layers, of which each forward pass uses the given ones, in the given order."""

    def __init__(self, count=6):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(40, 40, bias=False) for _ in range(count))

    def forward(self, x, order):
        return sum((i + 1) * self.layers[i](x).square().mean() for i in order)


@pytest.mark.parametrize("min_numel", [0, 10_000])
def check_changing_set_of_gradients(min_numel):
    """Ranks use other layers in every step; what a rank has not computed counts as zero."""
    model = Branches()
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=8, min_numel=min_numel))
    for step in range(8):
        used = [i for i in range(6) if (i * 7 + step * 3 + hvd.rank() * 5) % 4]
        order = used if step % 3 else used[::-1]
        x = own_randn(8, 40, seed=step)
        # On a copy: Horovod reduces small gradients in place as soon as they are there.
        clone = copy.deepcopy(model)
        own = torch.autograd.grad(
            clone(x, order), list(clone.parameters()), allow_unused=True, materialize_grads=True
        )
        local = gathered(own)
        optimizer.zero_grad()
        model(x, order).backward()
        optimizer.synchronize()
        for i, layer in enumerate(model.layers):
            assert same_everywhere(layer.weight.grad)
            assert_mean(layer.weight.grad, [gradients[i] for gradients in local], QSGD(bits=8))
        with optimizer.skip_synchronize():
            optimizer.step()


def check_order_of_arrival_suffices_for_a_static_model():
    model = mlp()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=hq.QSGDCompressor()
    )
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())


def check_unnamed_optimizer():
    model = mlp()
    optimizer = hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), compression=hq.QSGDCompressor()
    )
    backward(model)
    optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("sparse_as_dense", [True, False])
def check_sparse_gradients(sparse_as_dense):
    torch.manual_seed(1)
    model = torch.nn.ModuleList(torch.nn.Embedding(50, 40, sparse=True) for _ in range(2))
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=8), sparse_as_dense=sparse_as_dense)
    for step in range(3):
        optimizer.zero_grad()
        rows = torch.tensor([hvd.rank(), 7 + step, 7 + step])
        sum((layer(rows) * (i + 1)).square().sum() for i, layer in enumerate(model)).backward()
        optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())


def check_channels_last_gradients():
    torch.manual_seed(2)
    model = torch.nn.Conv2d(8, 32, 3).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=8, min_numel=0))
    x = own_randn(4, 8, 9, 9).to(memory_format=torch.channels_last)
    (local,) = torch.autograd.grad(model(x).square().mean(), [model.weight])
    local = gathered(local.contiguous())
    model(x).square().mean().backward()
    optimizer.synchronize()
    assert_mean(model.weight.grad, local, QSGD(bits=8))


def check_small_channels_last_gradients():
    torch.manual_seed(2)
    model = torch.nn.Conv2d(3, 16, 3).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(model, hq.QSGDCompressor())
    for step in range(3):
        optimizer.zero_grad()
        x = own_randn(4, 3, 9, 9, seed=step).to(memory_format=torch.channels_last)
        model(x).square().mean().backward()
        optimizer.step()
    assert same_everywhere(model.weight)


def check_misaligned_gradient():
    """NumPy would copy it, and the mean must not end in the copy."""
    parameter = torch.nn.Parameter(torch.zeros(5000))
    optimizer = optimizer_of(torch.nn.ParameterList([parameter]), hq.QSGDCompressor(bits=8))
    parameter.grad = torch.frombuffer(bytearray(20_001), dtype=torch.float32, offset=1, count=5000)
    parameter.grad.copy_(own_randn(5000))
    (parameter * 0).sum().backward()
    optimizer.synchronize()
    assert_mean(parameter.grad, gathered(own_randn(5000)), QSGD(bits=8))


def embeddings():
    model = torch.nn.ModuleList(torch.nn.Embedding(50, 40, sparse=True) for _ in range(2))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    return model


def check_sparse_nan_reaches_every_rank():
    model = embeddings()
    optimizer = optimizer_of(model, hq.QSGDCompressor(), sparse_as_dense=True)
    rows = torch.tensor([1, 2 + hvd.rank()])
    loss = sum(layer(rows).square().sum() for layer in model)
    (loss * float("nan") if hvd.rank() == 0 else loss).backward()
    optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())
    assert all(parameter.isnan().any() for parameter in model.parameters())


def check_equal_sparse_gradients_are_told_apart():
    model = embeddings()
    optimizer = optimizer_of(model, hq.QSGDCompressor(), sparse_as_dense=True, backward_passes_per_step=2)
    for step in range(2):
        rows = torch.tensor([1, 2 + step])
        sum((i + 1) * hvd.rank() * layer(rows).square().sum() for i, layer in enumerate(model)).backward()
    optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", ["max", "l2"])
def check_non_finite_values_reach_every_rank_and_no_other_bucket(bad, norm):
    x = own_randn(2000)
    if hvd.rank() == hvd.size() - 1:
        x[700] = bad
    result = hvd.allreduce(x, compression=hq.QSGDCompressor(norm=norm, bucket_size=500), name="non-finite")
    finite = result.isfinite()
    assert not finite[500:1000].any()
    assert finite[:500].all()
    assert finite[1000:].all()
    assert same_everywhere(result)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (513,)])
def check_odd_shapes(shape):
    x = own_randn(*shape)
    result = hvd.allreduce(x, compression=hq.QSGDCompressor(bits=8, min_numel=0), name="shape")
    assert result.shape == x.shape
    if x.numel():
        assert_mean(result, gathered(x), QSGD(bits=8))


def check_integers_pass_untouched():
    x = torch.arange(5000) * (hvd.rank() + 1)
    total = hvd.allreduce(x, compression=hq.QSGDCompressor(), op=hvd.Sum, name="integers")
    assert torch.equal(total, torch.arange(5000) * sum(range(1, hvd.size() + 1)))


def train(seed, steps=4, state=None, model=None, first=0):
    model = model or mlp()
    # All of them quantized: with three ranks, Horovod's own sums depend on what it happens to fuse.
    compressor = hq.QSGDCompressor(bits=2, seed=seed, min_numel=0)
    if state:
        compressor.load_state_dict(state)
    optimizer = optimizer_of(model, compressor)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return model, compressor


def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def check_same_seed_same_run():
    one, two, other = (parameters(train(seed)[0]) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def check_resumed_run_continues_with_the_same_noise():
    whole, _ = train(5, steps=4)
    half, compressor = train(5, steps=2)
    # A copy, because the first optimizer's hooks stay on the parameters that it was made for.
    resumed, _ = train(0, steps=2, state=compressor.state_dict(), model=copy.deepcopy(half), first=2)
    assert torch.equal(parameters(whole), parameters(resumed))


@pytest.mark.parametrize("exchange", ["allgather", "scatter_allgather"])
def check_stats_count_what_is_sent(exchange):
    model = mlp()  # weights of 2048, biases of 64 and 32 values
    compressor = hq.QSGDCompressor(bits=4, bucket_size=512, exchange=exchange)
    optimizer = optimizer_of(model, compressor)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    stats = compressor.stats()
    assert stats["steps"] == 3
    assert stats["raw_bytes"] == 3 * 4 * (2 * 2048 + 64 + 32)
    payload = 32 + 4 * 4 + 2048 // 2  # header, norms, codes
    control = 40
    preamble = 8  # of the one message in which both weights travel
    assert stats["messages"] == 3
    wire_bytes = 3 * (2 * (payload + control) + preamble + 4 * (64 + 32))
    # Every further chunk has a preamble, and a header more where it begins inside a gradient.
    chunks = 3 * (hvd.size() - 1) if exchange == "scatter_allgather" else 0
    assert wire_bytes + chunks * preamble <= stats["wire_bytes"] <= wire_bytes + chunks * (preamble + 32 + 8)
    if exchange == "allgather":
        assert stats["received_bytes"] == 3 * (hvd.size() - 1) * (2 * payload + preamble)
    else:  # 2 (n - 1) / n, but for headers of gradients that were cut, and chunks that differ in length
        share = 2 * (hvd.size() - 1) / hvd.size()
        assert abs(stats["received_bytes"] / (3 * share * 2 * payload) - 1) < 0.25
    assert stats["compression_ratio"] == stats["raw_bytes"] / stats["wire_bytes"]


def check_steps_are_counted_where_all_gradients_are_small():
    model = torch.nn.Linear(32, 8)
    compressor = hq.QSGDCompressor()
    optimizer = optimizer_of(model, compressor)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert compressor.stats()["steps"] == 5


def check_nothing_piles_up():
    model = mlp()
    compressor = hq.QSGDCompressor()
    optimizer = optimizer_of(model, compressor)
    sizes = []
    for step in range(20):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        in_flight = compressor._reducer.in_flight
        sizes.append((len(mpi_ops._handle_map), len(in_flight), len(compressor._state.uses)))
    assert sizes[2:] == sizes[2:3] * 18


def check_reset_after_an_abandoned_step():
    """As after an exception between backward and step, on all ranks."""
    for named in (True, False):
        model = mlp()
        compressor = hq.QSGDCompressor()
        if named:
            optimizer = optimizer_of(model, compressor)
        else:
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), compression=compressor)
        for step in range(4):
            model.zero_grad()
            backward(model, step)
            if step in (1, 2):
                recover(compressor, optimizer)
            else:
                optimizer.step()
        assert not compressor._reducer.in_flight
        assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("exchange", ["allgather", "scatter_allgather"])
def check_resets_pile_up_nothing(exchange):
    model = mlp()
    compressor = hq.QSGDCompressor(exchange=exchange, fusion_bytes=0)
    optimizer = optimizer_of(model, compressor)
    steps = 12
    before = len(mpi_ops._handle_map)
    for step in range(steps):
        backward(model, step)
        recover(compressor, optimizer)
    dropped = steps * len(list(model.parameters()))
    messages = compressor.stats()["messages"] / steps
    # Horovod's optimizer drops its handles for good. What is not over yet is forgotten later: of two steps at
    # most, where ranks are slow.
    assert len(mpi_ops._handle_map) - before - dropped <= 2 * (messages + 1)


@pytest.mark.parametrize("exchange", ["allgather", "scatter_allgather"])
def check_hooks_from_several_threads(exchange):
    """As autograd's are where a model is on several devices."""
    count = 24
    parameters = [torch.nn.Parameter(torch.zeros(3000 + i)) for i in range(count)]
    compressor = hq.QSGDCompressor(
        exchange=exchange,
        named_parameters=[(f"p{i}", parameter) for i, parameter in enumerate(parameters)],
        fusion_bytes=0,
    )
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as threads:
            for _ in range(10):
                for i, parameter in enumerate(parameters):
                    parameter.grad = torch.full_like(parameter, float(hvd.rank() + i))

                def submit(i):
                    control, context = compressor.compress(parameters[i].grad)
                    return hvd.allreduce_async_(control, name=f"threads {i}"), context

                def submit_all(which):
                    return [submit(i) for i in which]

                halves = threads.map(submit_all, (range(0, count, 2), range(1, count, 2)))
                sent = [one for pair in zip(*halves, strict=True) for one in pair]
                for i, (handle, context) in enumerate(sent):
                    mean = compressor.decompress(hvd.synchronize(handle), context)
                    expected = torch.full_like(mean, i + (hvd.size() - 1) / 2)
                    step = 2 * (hvd.size() + i) / 2**4
                    assert torch.allclose(mean, expected, atol=step)
    finally:
        sys.setswitchinterval(interval)


def check_two_optimizers_in_one_process():
    """As in a GAN: the same parameter names, stepped in turn, with backward passes of both in flight."""
    models = [mlp(), mlp()]
    optimizers = [
        hq.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            named_parameters=[(f"{i}.{name}", p) for name, p in model.named_parameters()],
            compression=hq.QSGDCompressor(bits=4 + i),
        )
        for i, model in enumerate(models)
    ]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for model in models:
            backward(model, step)
        for optimizer in reversed(optimizers):
            optimizer.step()
    assert all(same_everywhere(parameter) for model in models for parameter in model.parameters())


@pytest.mark.ranks_differ
def check_process_set():
    if hvd.size() < 3:
        pytest.skip("needs 3 ranks")
    process_set = hvd.add_process_set([0, 2])
    model = mlp()
    local = gathered(local_gradients(model))[:3:2]
    if process_set.included():  # the others need not make a compressor
        compressor = hq.QSGDCompressor(bits=8, process_set=process_set)
        optimizer = optimizer_of(model, compressor, process_set=process_set)
        backward(model)
        optimizer.synchronize()
        for i, parameter in enumerate(model.parameters()):
            assert_mean(parameter.grad, [gradients[i] for gradients in local], QSGD(bits=8))
    hvd.barrier()
    hvd.remove_process_set(process_set)
    model = mlp()  # and a compressor for all ranks still works
    optimizer = optimizer_of(model, hq.QSGDCompressor())
    backward(model)
    optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("how", ["clip", "scale", "synchronize", "none"])
def check_a_change_that_would_be_lost(how, monkeypatch):
    """Of gradients that have been submitted; the right order of things says nothing."""
    monkeypatch.setattr("hvd_quant.torch.gradient._lost_change", False)
    model = mlp()
    optimizer = optimizer_of(model, hq.QSGDCompressor())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            if how == "clip":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            if how == "scale":
                model[0].weight.grad.mul_(0.5)
            if how == "synchronize":
                optimizer.synchronize()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
    texts = [str(one.message) for one in caught if "overwrites that" in str(one.message)]
    assert len(texts) == (how in ("clip", "scale"))  # once
    if texts:
        assert re.search(r"the gradient of '[02].weight' was changed between backward and step", texts[0])
