"""DQ-SGD: all ranks take the same number of bits in the same step, from norms that none knows alone."""

import math
import time

import horovod.torch as hvd
import pytest
import torch
from common import (
    backward,
    gathered,
    local_gradients,
    mlp,
    own_randn,
    recover,
    same_everywhere,
)

import hvd_quant.torch as hq


def optimizer_of(model, compressor, **options):
    return hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compressor,
        **options,
    )


def train(model, optimizer, steps, scale=lambda step: 1.0):
    """Steps whose gradients are multiplied by ``scale(step)`` before they are exchanged."""
    for step in steps:
        optimizer.zero_grad()
        x = own_randn(16, 32, seed=step)
        (scale(step) * model(x).square().mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("exchange", ["allgather", "scatter_allgather"])
@pytest.mark.parametrize("fusion_bytes", [0, 1 << 20])
def check_all_ranks_take_the_same_bits(exchange, fusion_bytes):
    model = mlp()
    compressor = hq.DQSGDCompressor(
        mean_bits=4.5, total_steps=20, exchange=exchange, fusion_bytes=fusion_bytes, min_numel=0
    )
    train(model, optimizer_of(model, compressor), range(20), lambda step: 3.0 ** (step % 4))
    bits = compressor.stats()["bits"]
    assert gathered(bits) == [bits] * hvd.size()
    assert sum(bits) == 90
    assert len(set(bits)) > 1
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("options", [{}, {"op": hvd.Sum}, {"gradient_predivide_factor": 3.0}])
def check_bits_follow_the_mean_squared_norm(options):
    model = mlp()
    compressor = hq.DQSGDCompressor(k=100.0, min_numel=0)
    optimizer = optimizer_of(model, compressor, **options)
    expected = [8]
    for step in range(4):
        local = gathered(local_gradients(model, step))
        square = sum(float(one.double().square().sum()) for of_rank in local for one in of_rank) / hvd.size()
        expected.append(min(max(math.ceil(math.log2(100 * math.sqrt(square) + 1)) + 1, 2), 8))
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert compressor.stats()["bits"] == expected[:-1]
    assert expected[1] < 8


def check_a_resumed_run_is_the_same_run():
    def compressor_of():
        return hq.DQSGDCompressor(mean_bits=4, total_steps=10, min_numel=0)

    whole, compressor = mlp(), compressor_of()
    train(whole, optimizer_of(whole, compressor), range(10), lambda step: 2.0**step)
    bits = compressor.stats()["bits"]

    begun, first = mlp(), compressor_of()
    train(begun, optimizer_of(begun, first), range(4), lambda step: 2.0**step)
    model, second = mlp(), compressor_of()
    model.load_state_dict(begun.state_dict())
    second.load_state_dict(first.state_dict())
    train(model, optimizer_of(model, second), range(4, 10), lambda step: 2.0**step)
    assert second.stats()["bits"] == bits
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), whole.parameters(), strict=True))


def check_ranks_at_different_places_of_the_schedule():
    """They go on from where the one is that has come furthest."""
    states = []
    for steps in (2, 3):
        model, compressor = mlp(), hq.DQSGDCompressor(k=10.0)
        train(model, optimizer_of(model, compressor), range(steps))
        states.append(compressor.state_dict())
    model, compressor = mlp(), hq.DQSGDCompressor(k=10.0)
    compressor.load_state_dict(states[hvd.rank() > 0])
    optimizer = optimizer_of(model, compressor)
    for step in (4, 5):
        optimizer.zero_grad()
        train(model, optimizer, [step])
        assert all(same_everywhere(parameter) for parameter in model.parameters())
        assert set(gathered(compressor.state_dict()["schedule"]["step"])) == {step}


@pytest.mark.ranks_differ
def check_a_step_that_some_ranks_have_finished():
    """The last rank is interrupted in the middle of ``step()``; after a reset all go on together."""
    model, compressor = mlp(), hq.DQSGDCompressor(k=10.0, min_numel=0)
    optimizer = optimizer_of(model, compressor)
    train(model, optimizer, range(1))
    decompress, last, calls = compressor.decompress, hvd.rank() == hvd.size() - 1, []

    def interrupted(tensor, ctx):
        calls.append(ctx)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decompress(tensor, ctx)

    if last:
        compressor.decompress = interrupted
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, [1])
        compressor.decompress = decompress
    else:
        train(model, optimizer, [1])
    assert gathered(compressor.state_dict()["schedule"]["step"]) == [2] * (hvd.size() - 1) + [1]
    recover(compressor, optimizer)
    for step in (2, 3):
        optimizer.zero_grad()
        train(model, optimizer, [step])
        assert all(same_everywhere(parameter.grad) for parameter in model.parameters())
        assert set(gathered(compressor.state_dict()["schedule"]["step"])) == {step + 1}


def check_a_state_that_one_rank_loads_in_mid_training():
    model, compressor = mlp(), hq.DQSGDCompressor(k=10.0)
    optimizer = optimizer_of(model, compressor)
    train(model, optimizer, range(2))
    state = compressor.state_dict()
    if hvd.rank() == 0:
        state["schedule"] |= {"step": 9, "bits": 5}
    compressor.load_state_dict(state)
    train(model, optimizer, [2])
    assert set(gathered(compressor.state_dict()["schedule"]["step"])) == {10}
    assert set(gathered(compressor.stats()["bits"][-1])) == {5}


def ahead(compressor):
    """One rank's state, of a run that has come further."""
    state = compressor.state_dict()
    state["uses"] = {"0.weight": 5}
    state["schedule"] |= {"step": 5, "bits": 4}
    compressor.load_state_dict(state)


def check_a_rank_that_is_late_and_ahead(monkeypatch):
    """The others have gone on without its answer, and wait for it in Horovod."""
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)
    model, compressor = mlp(), hq.DQSGDCompressor(k=10.0)
    optimizer = optimizer_of(model, compressor)
    if hvd.rank() == hvd.size() - 1:
        ahead(compressor)
        time.sleep(2.0)
    train(model, optimizer, range(2))
    assert set(gathered(compressor.state_dict()["schedule"]["step"])) == {7}
    assert set(gathered(compressor.stats()["bits"][0])) == {4}
    assert all(same_everywhere(parameter) for parameter in model.parameters())


def check_a_late_rank_changes_nothing(monkeypatch):
    """Nor where parameters have come equally often on all ranks, but not all of them as often as others."""
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)

    def trained(late):
        model, compressor = mlp(), hq.QSGDCompressor(bits=2)
        state = compressor.state_dict()
        compressor.load_state_dict(state | {"uses": {"2.weight": 3}})  # 0.weight has been frozen until now
        optimizer = optimizer_of(model, compressor)
        if late and hvd.rank() == hvd.size() - 1:
            time.sleep(2.0)
        train(model, optimizer, range(2))
        assert compressor.state_dict()["uses"]["0.weight"] == 2
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(trained(late=False), trained(late=True))


def check_a_rank_that_is_ahead_and_comes_between_two_gradients(monkeypatch):
    monkeypatch.setattr("hvd_quant.reducer.polling.PATIENCE_SECONDS", 1.0)
    model, compressor = mlp(), hq.DQSGDCompressor(k=10.0, min_numel=0)
    optimizer = optimizer_of(model, compressor)
    compress, calls = compressor.compress, []

    def slow(tensor):
        calls.append(tensor.shape)
        if len(calls) == 2:
            time.sleep(1.5)
        return compress(tensor)

    if hvd.rank() == hvd.size() - 1:
        ahead(compressor)
        time.sleep(2.0)
    else:
        compressor.compress = slow
    train(model, optimizer, [0])
    compressor.compress = compress
    train(model, optimizer, [1])
    assert set(gathered(compressor.stats()["bits"][0])) == {4}
    assert all(same_everywhere(parameter) for parameter in model.parameters())


def check_norms_whose_sum_is_too_large():
    model, compressor = mlp(dtype=torch.float64), hq.DQSGDCompressor(k=10.0, min_numel=0)
    optimizer = optimizer_of(model, compressor)
    for size in (1.0, 1e154):  # whose square is finite
        optimizer.zero_grad()
        sum((size * p.flatten()[0] for p in model.parameters()), start=0.0).backward()
        optimizer.step()
    schedule = compressor.state_dict()["schedule"]
    assert (schedule["step"], schedule["norms"]) == (2, 1)
    assert [*compressor.stats()["bits"], schedule["bits"]] == [8, 6, 6]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def check_a_step_that_is_not_finite_keeps_the_bits(value):
    model, compressor = mlp(), hq.DQSGDCompressor(k=10.0, min_numel=0)
    optimizer = optimizer_of(model, compressor)
    train(model, optimizer, range(2))
    bits = compressor.state_dict()["schedule"]["bits"]
    optimizer.zero_grad()
    (model(own_randn(16, 32)).square().mean() * (value if hvd.rank() == hvd.size() - 1 else 1.0)).backward()
    optimizer.synchronize()
    assert not torch.isfinite(next(model.parameters()).grad).all()
    assert compressor.state_dict()["schedule"]["bits"] == bits


def check_states_that_do_not_fit():
    compressor = hq.DQSGDCompressor(k=1.0)
    state = compressor.state_dict()
    for other in (
        {"seed": 0, "uses": {}},
        {**state, "schedule": {**state["schedule"], "bits": 9}},
        {**state, "schedule": {**state["schedule"], "log_norm": math.nan}},
        {**state, "schedule": {**state["schedule"], "log_norms": math.inf}},
    ):
        with pytest.raises(ValueError, match="not a state of this hvd_quant compressor"):
            compressor.load_state_dict(other)
    assert compressor.state_dict() == state
