"""Uneven data: ranks that have no more take part in the others' steps."""

import horovod.torch as hvd
import pytest
import torch
from common import mlp, own_randn, same_everywhere
from shared import EXCHANGES, error_of, make

import hvd_quant.torch as hq

STEPS = [[5, 2, 3, 4], [0, 4, 4, 4], [3, 3, 3, 3], [1, 1, 1, 5]]  # of an epoch, by rank
LONGEST = sum(map(max, STEPS))


class Rows(torch.nn.Module):
    """Has a row for every step, whose gradient is the number of ranks in that step; and noise."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.zeros(LONGEST, 512))
        self.noise = torch.nn.Parameter(torch.zeros(3, 1000))
        self.small = torch.nn.Parameter(torch.zeros(7))

    def forward(self, step):
        noise = (self.noise * own_randn(3, 1000, seed=step)).sum()
        return hvd.size() * (self.rows[step].sum() + self.small.sum()) + noise


@pytest.mark.parametrize("kind", ["QSGD", "error feedback", "DQ-SGD"])
@pytest.mark.parametrize("exchange", [*EXCHANGES, "auto"])
@pytest.mark.parametrize("fusion_bytes", [0, 8 << 20])
def check_zeros_are_added_for_ranks_that_have_joined(kind, exchange, fusion_bytes):
    model, compressor = Rows(), make(hq, kind, exchange=exchange, fusion_bytes=fusion_bytes)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = hq.DistributedOptimizer(sgd, model.named_parameters(), compression=compressor)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    expected, before = torch.zeros(LONGEST, 1), 0
    for steps in STEPS:
        steps = [steps[rank % len(steps)] for rank in range(hvd.size())]
        for step in range(before, before + steps[hvd.rank()]):
            optimizer.zero_grad()
            model(step).backward()
            optimizer.step()
            scheduler.step()
        hq.join(optimizer, scheduler.step)
        for step in range(max(steps)):
            expected[before + step] = -sum(own > step for own in steps)
        before += max(steps)
        assert same_everywhere(torch.cat([one.detach().flatten() for one in model.parameters()]))
        assert scheduler.last_epoch == before
    torch.testing.assert_close(model.rows.detach(), expected.expand(-1, 512))
    torch.testing.assert_close(model.small.detach(), expected.sum().expand(7))


@pytest.mark.ranks_differ
def check_without_quantization():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hq.DistributedOptimizer(sgd, model.named_parameters())
    for step in range(2 + hvd.rank()):
        optimizer.zero_grad()
        model(own_randn(16, 32, seed=step)).square().mean().backward()
        optimizer.step()
    hq.join(optimizer)
    for parameter in model.parameters():
        assert same_everywhere(parameter)
        assert same_everywhere(optimizer.state[parameter]["momentum_buffer"])


def check_nothing_quantized_is_an_error():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    compressor = hq.QSGDCompressor(min_numel=10**6)
    optimizer = hq.DistributedOptimizer(sgd, model.named_parameters(), compression=compressor)
    error = error_of(lambda: hq.join(optimizer))
    assert isinstance(error, RuntimeError)
    assert "none was quantized" in str(error)
