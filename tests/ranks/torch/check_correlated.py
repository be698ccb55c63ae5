"""Correlated rounding: the ranks' noise goes together, whatever they have been through."""

import horovod.torch as hvd
import pytest
import torch
from common import gathered, recover, same_mismatch
from shared import error_of

import hvd_quant.torch as hq

COUNT = 5000
LEVEL = 1 / 7  # of 4 bits, for a norm of 1


def same_gradient():
    values = torch.randn(COUNT, generator=torch.Generator().manual_seed(5)).clamp_(-1.0, 1.0)
    values[::512] = 1.0  # the norm of every bucket
    return values


def trained(compressor):
    parameter = torch.nn.Parameter(torch.zeros(COUNT))
    return parameter, hq.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.1), [("weight", parameter)], compression=compressor
    )


def exchanged(parameter, optimizer):
    """The mean of gradients that are the same on all ranks."""
    (parameter * same_gradient()).sum().backward()
    optimizer.synchronize()
    mean = parameter.grad.clone()
    optimizer.zero_grad()
    return mean


def correlated(mean):
    """Whether the mean is as near as noise at distances of 1/n brings it."""
    return bool(((mean - same_gradient()).abs() <= 1.01 * LEVEL / hvd.size()).all())


@pytest.mark.parametrize("kind", [hq.QSGDCompressor, hq.DQSGDCompressor])
def check_errors_cancel(kind):
    options = {"mean_bits": 4, "total_steps": 10, "min_bits": 4, "max_bits": 4}
    options = options if kind is hq.DQSGDCompressor else {"bits": 4}
    parameter, optimizer = trained(kind(rounding="correlated", exchange="allgather", **options))
    one, two = exchanged(parameter, optimizer), exchanged(parameter, optimizer)
    assert correlated(one)
    assert correlated(two)
    assert not torch.equal(one, two)
    parameter, optimizer = trained(hq.QSGDCompressor(bits=4, exchange="allgather"))
    assert not correlated(exchanged(parameter, optimizer))


def check_seeds_must_be_the_same():
    parameter, optimizer = trained(hq.QSGDCompressor(rounding="correlated", seed=hvd.rank()))
    text = same_mismatch(error_of(lambda: exchanged(parameter, optimizer)))
    assert "seed is 0 on rank 0, 1 on rank 1" in text


def check_a_state_that_one_rank_alone_has_loaded():
    compressor = hq.QSGDCompressor(rounding="correlated", exchange="allgather")
    if hvd.rank() == 0:
        compressor.load_state_dict({"seed": 0, "uses": {"weight": 41}, "least_use": 0})
    parameter, optimizer = trained(compressor)
    assert correlated(exchanged(parameter, optimizer))
    assert set(gathered(compressor.state_dict()["uses"]["weight"])) == {42}
    recover(compressor, optimizer)
    assert correlated(exchanged(parameter, optimizer))


def check_gradients_that_did_not_come_since_the_ranks_caught_up():
    """How often they count as having come is in the state."""
    one, two = (torch.nn.Parameter(torch.zeros(COUNT)) for _ in range(2))
    compressor = hq.QSGDCompressor(rounding="correlated", exchange="allgather", fusion_bytes=0)
    if hvd.rank() == 0:
        compressor.load_state_dict({"seed": 0, "uses": {"one": 5, "two": 1}, "least_use": 0})
    compressor.bind([("one", one), ("two", two)])

    def exchange(parameter):
        parameter.grad = same_gradient()
        return hvd.allreduce(parameter.grad, compression=compressor, name="gradient")

    assert correlated(exchange(one))
    compressor.reset()
    if hvd.rank() != 0:
        compressor.load_state_dict(compressor.state_dict())
    hvd.barrier()
    assert correlated(exchange(two))
