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


def unevenly(optimizer, model, epochs=3):
    """Train with unequally many steps; returns how many steps there were in all."""
    for epoch in range(epochs):
        for step in range(2 + (hvd.rank() + epoch) % 2):
            optimizer.zero_grad()
            model(own_randn(16, 32, seed=10 * epoch + step)).square().mean().backward()
            optimizer.step()
        hq.join(optimizer)
    return 3 * epochs


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum])
def check_error_feedback_loses_nothing(exchange, op):
    """What was applied, and what the ranks have kept, is all there was."""
    model = Rows()
    options = {"exchange": exchange, "min_numel": 0, "error_feedback": True}
    compressor = hq.QSGDCompressor(bits=2, **options)
    sgd = torch.optim.SGD([model.noise], lr=1.0)
    optimizer = hq.DistributedOptimizer(sgd, [("noise", model.noise)], compression=compressor, op=op)
    gradients = torch.zeros(3, 1000)
    for epoch in range(3):
        for step in range(2 + (hvd.rank() + epoch) % 2):
            optimizer.zero_grad()
            own = own_randn(3, 1000, seed=10 * epoch + step)
            gradients += own
            (model.noise * own).sum().backward()
            optimizer.step()
        hq.join(optimizer)
    kept = compressor.state_dict()["residuals"]["noise"].view(3, 1000)
    reduced = hvd.allreduce(gradients - kept, op=op, name="all there was")
    torch.testing.assert_close(-model.noise.detach(), reduced, atol=1e-3, rtol=1e-4)


def check_the_last_round_is_no_step():
    model = mlp()
    compressor = hq.DQSGDCompressor(mean_bits=4, total_steps=9)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hq.DistributedOptimizer(sgd, model.named_parameters(), compression=compressor)
    steps = unevenly(optimizer, model)
    state, stats = compressor.state_dict(), compressor.stats()
    assert (state["schedule"]["step"], stats["steps"], len(stats["bits"])) == (steps, steps, steps)
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"groups": 2}, {"groups": "lists"}, {"backward_passes_per_step": 2}])
@pytest.mark.parametrize("whose", [hq.DistributedOptimizer, hvd.DistributedOptimizer])
def check_groups_and_passes(options, whose):
    model = mlp()
    parameters = list(model.parameters())
    if options.get("groups") == "lists":
        options = {"groups": [parameters[:3], parameters[3:]]}
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    compressor = hq.QSGDCompressor(bits=8)
    optimizer = whose(sgd, model.named_parameters(), compression=compressor, **options)
    for step in range(2 + hvd.rank()):
        optimizer.zero_grad()
        for part in range(options.get("backward_passes_per_step", 1)):
            model(own_randn(16, 32, seed=2 * step + part)).square().mean().backward()
        optimizer.step()
    hq.join(optimizer)
    assert compressor.stats()["steps"] == 1 + hvd.size()
    assert all(same_everywhere(parameter) for parameter in parameters)


def check_sparse_gradients():
    for as_dense in (True, False):
        embedding = torch.nn.Embedding(100, 50, sparse=True)
        hvd.broadcast_parameters(embedding.state_dict(), root_rank=0)
        optimizer = hq.DistributedOptimizer(
            torch.optim.SGD(embedding.parameters(), lr=0.1),
            embedding.named_parameters(),
            compression=hq.QSGDCompressor(bits=8),
            sparse_as_dense=as_dense,
        )
        for _ in range(2 + as_dense * hvd.rank()):
            optimizer.zero_grad()
            embedding(torch.tensor([3, 7 + hvd.rank()])).sum().backward()
            optimizer.step()
        error = error_of(lambda optimizer=optimizer: hq.join(optimizer))
        assert (error is None) == as_dense
        assert not as_dense or same_everywhere(embedding.weight)
    assert "sparse_as_dense=True" in str(error)


@pytest.mark.ranks_differ
def check_without_quantization():
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = hq.DistributedOptimizer(sgd, model.named_parameters())
    for step in range(2 + hvd.rank()):
        optimizer.zero_grad()
        model(own_randn(16, 32, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
    hq.join(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5 ** (1 + hvd.size())
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
