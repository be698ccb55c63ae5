"""The promises for every exchange, with few and many ranks; what the exchanges do is in tests/unit."""

import gc
import os
import weakref

import horovod.torch as hvd
import pytest
import torch
from check_gradients import Branches, assert_mean, optimizer_of
from common import (
    backward,
    gathered,
    local_gradients,
    mlp,
    own_randn,
    same_everywhere,
    same_mismatch,
)
from shared import EXCHANGES, error_of

import hvd_quant.torch as hq
from hvd_quant import QSGD
from hvd_quant.exchange.driver import Exchange

SCHEME = QSGD(bits=8)


def roundings(exchange):
    """In units of one rank's: the second rounding, of the mean, is no coarser than the first."""
    return 2.5 if exchange == "scatter_allgather" else 1.0


def assert_means(model, local, exchange, factor=1.0):
    """The gradients are the mean of the ranks' own, within a level's step for each rounding."""
    for i, parameter in enumerate(model.parameters()):
        assert same_everywhere(parameter.grad)
        gradients = [gradients[i] for gradients in local]
        exact = torch.stack(gradients).double().mean(0)
        step = max(gradient.abs().max().item() for gradient in gradients) / SCHEME.num_levels
        error = (parameter.grad.double() - factor * exact).abs().max().item()
        assert error <= factor * step * roundings(exchange)


def step_to_means(model, optimizer, step, local, exchange):
    """A step of training, the gradients of which are the mean of ``local``."""
    backward(model, step)
    optimizer.synchronize()
    assert_means(model, local, exchange)
    with optimizer.skip_synchronize():
        optimizer.step()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    ("fusion_bytes", "coding"),
    [(0, "packed"), (3000, "packed"), (3000, "huffman"), (8 << 20, "packed"), (8 << 20, "elias")],
)
@pytest.mark.parametrize("named", [True, False])
def check_mean_on_every_rank(exchange, fusion_bytes, coding, named):
    model = mlp()
    compressor = hq.QSGDCompressor(
        bits=8, coding=coding, exchange=exchange, fusion_bytes=fusion_bytes, min_numel=0
    )
    make = optimizer_of if named else stock_optimizer_of
    optimizer = make(model, compressor)
    for step in range(3):
        local = gathered(local_gradients(model, step))
        optimizer.zero_grad()
        step_to_means(model, optimizer, step, local, exchange)
    buckets = {0: 4, 3000: 2, 8 << 20: 1}[fusion_bytes] if named else None
    assert buckets is None or compressor.stats()["messages"] == 3 * buckets


def stock_optimizer_of(model, compression, **options):
    return hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
        **options,
    )


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "options",
    [{"op": hvd.Sum}, {"gradient_predivide_factor": 2.0}, {"groups": 2}, {"backward_passes_per_step": 2}],
)
def check_options_of_the_optimizer(exchange, options):
    model = mlp()
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=8, exchange=exchange), **options)
    passes = options.get("backward_passes_per_step", 1)
    for step in range(2):
        local = gathered([passes * gradient for gradient in local_gradients(model, step)])
        optimizer.zero_grad()
        for _ in range(passes):
            backward(model, step)
        optimizer.synchronize()
        assert_means(model, local, exchange, factor=hvd.size() if "op" in options else 1)


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_non_finite_values_reach_every_rank(exchange):
    x = own_randn(4000)
    if hvd.rank() == hvd.size() - 1:
        x[700] = float("nan")
    compressor = hq.QSGDCompressor(bucket_size=500, exchange=exchange)
    result = hvd.allreduce(x, compression=compressor, name="non-finite")
    assert not result[500:1000].isfinite().any()
    assert result[:500].isfinite().all()
    assert result[1000:].isfinite().all()
    assert same_everywhere(result)


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_same_seed_same_run(exchange):
    def train(seed):
        model = mlp()
        compressor = hq.QSGDCompressor(bits=2, seed=seed, min_numel=0, exchange=exchange)
        optimizer = optimizer_of(model, compressor)
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        assert all(same_everywhere(parameter) for parameter in model.parameters())
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    one, two, other = train(5), train(5), train(6)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("fusion_bytes", [0, 8 << 20])
def check_parameters_that_come_and_go(exchange, fusion_bytes):
    """Unused ones are submitted by Horovod in an order of each rank's own."""
    model = Branches(4)
    compressor = hq.QSGDCompressor(bits=8, min_numel=0, exchange=exchange, fusion_bytes=fusion_bytes)
    optimizer = optimizer_of(model, compressor)
    for step in range(6):
        optimizer.zero_grad()
        used = [(hvd.rank() + step) % 4, step % 4]
        model(own_randn(8, 40, seed=step), sorted(set(used), reverse=hvd.rank() % 2 == 0)).backward()
        optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_gradients_reduced_one_by_one(exchange):
    """By hand, without an optimizer: every result is asked for before the next gradient comes."""
    model = mlp()
    compressor = hq.QSGDCompressor(
        bits=8, min_numel=0, exchange=exchange, named_parameters=model.named_parameters()
    )
    for step in range(3):
        local = gathered(local_gradients(model, step))
        model.zero_grad()
        backward(model, step)
        for name, parameter in model.named_parameters():
            parameter.grad = hvd.allreduce(parameter.grad, compression=compressor, name=name)
        assert_means(model, local, exchange)
    assert compressor.stats()["messages"] == 3 * 4


def check_grouped_allreduce_and_mixed_ops():
    compressor = hq.QSGDCompressor(bits=8)
    tensors = [own_randn(2000, seed=i) for i in range(3)]
    means = hvd.grouped_allreduce(tensors, compression=compressor, name="group")
    for i, mean in enumerate(means):
        assert_mean(mean, gathered(tensors[i]), SCHEME)
    # Of two gradients that travel together, one is to be averaged and one to be summed.
    one, two = compressor.compress(tensors[0]), compressor.compress(tensors[1])
    handles = [
        hvd.allreduce_async(one[0], name="one", op=hvd.Average),
        hvd.allreduce_async(two[0], name="two", op=hvd.Sum),
    ]
    mean, total = (
        compressor.decompress(hvd.synchronize(handle), context)
        for handle, (_, context) in zip(handles, (one, two), strict=True)
    )
    assert_mean(mean, gathered(tensors[0]), SCHEME)
    assert_mean(total, gathered(tensors[1]), SCHEME, factor=hvd.size())
    assert same_everywhere(mean)
    assert same_everywhere(total)


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_every_call_has_its_own_op_and_noise(exchange):
    x = own_randn(5000)
    compressor = hq.QSGDCompressor(bits=4, exchange=exchange)
    results = []
    for op in (hvd.Average, hvd.Sum, hvd.Average):
        result = hvd.allreduce(x, compression=compressor, name="x", op=op)
        results.append(result / (hvd.size() if op == hvd.Sum else 1))
    for i, result in enumerate(results):
        exact = torch.stack(gathered(x)).mean(0)
        assert (result - exact).abs().max() <= 3 * x.abs().max() / 7 * roundings(exchange)
        assert not torch.equal(result, results[i - 1])


def check_gradients_of_several_dtypes_travel_together():
    torch.manual_seed(1)
    model = torch.nn.ModuleList(
        torch.nn.Linear(40, 40).to(dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    )
    compressor = hq.QSGDCompressor(bits=8, min_numel=0)
    optimizer = optimizer_of(model, compressor)
    for step in range(2):
        optimizer.zero_grad()
        x = own_randn(4, 40, seed=step)
        sum(layer(x.to(layer.weight.dtype)).double().square().mean() for layer in model).backward()
        optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())
    assert compressor.stats()["messages"] == 2


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("field", "first", "rest"), [("bits", 4, 8), ("fusion_bytes", 1000, 2000)])
def check_different_configuration_is_an_error_everywhere(exchange, field, first, rest):
    model = mlp()
    value = first if hvd.rank() == 0 else rest
    optimizer = optimizer_of(model, hq.QSGDCompressor(**{"exchange": exchange, field: value}))
    backward_error = error_of(lambda: (backward(model), optimizer.step()))
    assert isinstance(backward_error, hq.RankMismatchError)
    assert f"{field} is {first} on rank 0" in str(backward_error)
    assert len(set(gathered(str(backward_error)))) == 1


def check_different_exchange_is_an_error_everywhere():
    x = own_randn(5000)
    compressor = hq.QSGDCompressor(exchange=EXCHANGES[hvd.rank() == 0])
    error = error_of(lambda: hvd.allreduce(x, compression=compressor, name="exchange"))
    assert isinstance(error, hq.RankMismatchError)
    assert 'exchange is "scatter_allgather" on rank 0' in str(error)


@pytest.mark.skipif("TEST_HOSTS" in os.environ, reason="there are several hosts")
def check_an_exchange_by_hosts_needs_several():
    compressor = hq.QSGDCompressor(exchange="hierarchical")
    error = error_of(lambda: hvd.allreduce(own_randn(5000), compression=compressor, name="by hosts"))
    assert isinstance(error, ValueError)
    assert all('use exchange="auto"' in text for text in gathered(str(error)))
    result = hvd.allreduce(own_randn(5000), compression=hq.QSGDCompressor(), name="auto")
    assert same_everywhere(result)


def check_different_models_are_an_error_everywhere():
    torch.manual_seed(1)
    layers = [torch.nn.Linear(40, 40) for _ in range(2 + (hvd.rank() == 0))]
    model = torch.nn.Sequential(*layers)
    optimizer = optimizer_of(model, hq.QSGDCompressor())
    error = error_of(lambda: (model(own_randn(4, 40)).sum().backward(), optimizer.step()))
    assert '2.weight is [[40, 40], "float32"] on rank 0, null on rank' in same_mismatch(error)


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_different_gradients_travel_together(exchange):
    """Ranks that ask for results at different times disagree about what a message holds."""
    if hvd.size() == 1:
        pytest.skip("needs 2 ranks")
    compressor = hq.QSGDCompressor(exchange=exchange)
    tensors = [own_randn(2000, seed=i) for i in range(2)]

    def reduce():
        sent = [compressor.compress(tensors[0])]
        if hvd.rank() == 0:
            sent.append(compressor.compress(tensors[1]))
        handle = hvd.allreduce_async(sent[0][0], name="first")
        compressor.decompress(hvd.synchronize(handle), sent[0][1])

    error = error_of(reduce)
    same_mismatch(error)


def check_ranks_that_have_different_gradients_when_a_result_is_asked_for():
    """Under named parameters, too: they meet, and find out, instead of waiting for each other."""
    model = Branches(3)
    compressor = hq.QSGDCompressor(min_numel=0, named_parameters=model.named_parameters())
    model(own_randn(8, 40), [0, 1, 2]).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.dim() > 1]
    mine = gradients[:2] if hvd.rank() == 0 else gradients[:1] + gradients[2:]

    def reduce():
        sent = [compressor.compress(gradient) for gradient in mine]
        handle = hvd.allreduce_async(sent[0][0], name="common")
        compressor.decompress(hvd.synchronize(handle), sent[0][1])

    error = error_of(reduce)
    assert "what others lack is" in same_mismatch(error)


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_a_model_that_changes_its_dtype(exchange):
    """After that, Horovod's hooks are gone, and it submits all gradients in an order of each rank's own."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(7)))
    optimizer = optimizer_of(model, hq.QSGDCompressor(exchange=exchange, fusion_bytes=20_000))
    for dtype in (torch.float32, torch.float64, torch.float16):
        model.to(dtype)
        for step in range(2):
            optimizer.zero_grad()
            model(own_randn(8, 40, seed=step).to(dtype)).square().mean().backward()
            optimizer.step()
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_a_step_that_is_left_and_finished_later(exchange):
    """The way that the documentation recommends after an exception between backward and step."""
    model = mlp()
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=8, exchange=exchange, min_numel=0))
    for step in range(4):
        optimizer.zero_grad()
        local = gathered(local_gradients(model, step))
        if step == 2:
            model[2](own_randn(4, 64)).sum().backward()  # of half of the parameters, and then something fails
            optimizer.synchronize()
            optimizer.zero_grad()
        step_to_means(model, optimizer, step, local, exchange)


def check_synchronize_without_backward_and_step_twice():
    model = mlp()
    optimizer = optimizer_of(model, hq.QSGDCompressor(min_numel=0))
    optimizer.synchronize()  # Horovod submits zeros
    with optimizer.skip_synchronize():
        optimizer.step()
    backward(model)
    optimizer.step()
    optimizer.step()  # reduces what is there again
    assert all(same_everywhere(parameter) for parameter in model.parameters())


def check_a_gradient_that_is_submitted_twice():
    model = mlp()
    compressor = hq.QSGDCompressor(named_parameters=model.named_parameters())
    backward(model)
    compressor.compress(model[0].weight.grad)
    with pytest.raises(RuntimeError, match=r"submitted again .* reset\(\)"):
        compressor.compress(model[0].weight.grad)
    compressor.reset()
    hvd.barrier()


def check_sub_groups_side_by_side():
    """Two halves of the ranks train a model each, at the same time, and all ranks another."""
    if hvd.size() < 4:
        pytest.skip("needs 4 ranks")
    halves = [hvd.add_process_set(list(range(start, hvd.size(), 2))) for start in (0, 1)]
    mine = halves[hvd.rank() % 2]
    models = [mlp(), mlp()]
    for exchange in EXCHANGES:
        optimizers = [
            optimizer_of(
                model, hq.QSGDCompressor(bits=8, exchange=exchange, process_set=ranks), process_set=ranks
            )
            for model, ranks in zip(models, (mine, hvd.global_process_set), strict=True)
        ]
        local = gathered([local_gradients(model) for model in models])
        for optimizer in optimizers:
            optimizer.zero_grad()
        for model in models:
            backward(model)
        for optimizer in reversed(optimizers):
            optimizer.synchronize()
        for i, parameter in enumerate(models[0].parameters()):
            own_half = [one[0][i] for one in local[hvd.rank() % 2 :: 2]]
            exact = torch.stack(own_half).mean(0)
            step = max(gradient.abs().max().item() for gradient in own_half) / SCHEME.num_levels
            assert (parameter.grad - exact).abs().max().item() <= step * roundings(exchange)
        assert_means(models[1], [one[1] for one in local], exchange)
        models = [mlp(), mlp()]
    hvd.barrier()
    for half in halves:
        hvd.remove_process_set(half)


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_no_gradient_is_kept(exchange):
    """Not even until the garbage collector comes: it does not know how large tensors are."""
    model = torch.nn.Sequential(*(torch.nn.Linear(60, 60) for _ in range(3)))
    optimizer = optimizer_of(model, hq.QSGDCompressor(exchange=exchange))
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            model(own_randn(4, 60)).square().sum().backward()
            gradients = [weakref.ref(parameter.grad) for parameter in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            assert [gradient() for gradient in gradients] == [None] * 6
            # These know their memory, and that of messages.
            assert not [one for one in gc.get_objects() if type(one) is Exchange]
    finally:
        gc.enable()
