"""Promises 1, 3, 4 and 5 for every kind of compressor. 2, 6 and 7 are of codec and wire: tests/unit."""

import horovod.torch as hvd
import pytest
import torch
from common import backward, mlp, same_everywhere, same_mismatch
from shared import EXCHANGES, KINDS, error_of, make, other_kind

import hvd_quant.torch as hq
from hvd_quant import QSGD

# Of torch alone, in which the compressor knows the parameters' names.
KINDS["overrides"] = ("QSGDCompressor", {"overrides": {"0.*": QSGD(bits=8), "*.bias": None}})
exchanges = pytest.mark.parametrize("exchange", EXCHANGES)
kinds = pytest.mark.parametrize("kind", KINDS)


def optimizer_of(model, kind, **options):
    """Stock Horovod's optimizer, with our compressor."""
    compressor = make(hq, kind, named_parameters=model.named_parameters(), min_numel=0, **options)
    return hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compressor
    )


def trained(kind, exchange, seed):
    model = mlp()
    optimizer = optimizer_of(model, kind, exchange=exchange, seed=seed)
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.synchronize()
        assert all(same_everywhere(parameter.grad) for parameter in model.parameters())
        with optimizer.skip_synchronize():
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@kinds
@exchanges
def check_same_bits_on_every_rank_and_in_every_run(kind, exchange):
    one, two = trained(kind, exchange, seed=5), trained(kind, exchange, seed=5)
    assert torch.equal(one, two)
    # Error feedback rounds without noise; for the others, one exchange is enough.
    if not kind.startswith("error feedback") and exchange == EXCHANGES[0]:
        assert not torch.equal(one, trained(kind, exchange, seed=6))


@kinds
@exchanges
def check_what_is_not_finite_reaches_every_rank(kind, exchange):
    model = mlp()
    optimizer = optimizer_of(model, kind, exchange=exchange, bucket_size=256)
    place, last = model[2].weight.view(-1)[300], hvd.rank() == hvd.size() - 1
    for value in (0.0, float("nan"), 0.0, float("-inf"), 0.0):
        loss = sum(parameter.square().sum() for parameter in model.parameters())
        (loss + place * (value if last else 0.0)).backward()
        optimizer.synchronize()
        finite = model[2].weight.grad.view(-1).isfinite()
        assert finite[:256].all()
        assert finite[512:].all()
        assert finite.all() if value == 0.0 else not finite[256:512].any()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p is not model[2].weight)
        assert all(same_everywhere(parameter.grad) for parameter in model.parameters())
        optimizer.zero_grad()


@kinds
def check_another_configuration_is_an_error_everywhere(kind):
    """One rank has this kind, and the others have the next one."""
    model = mlp()
    optimizer = optimizer_of(model, kind if hvd.rank() == 0 else other_kind(kind))
    text = same_mismatch(error_of(lambda: (backward(model), optimizer.step())))
    assert "hvd_quant is configured differently on the ranks" in text
    assert "on rank 0" in text
