"""Error feedback through Horovod: what the steps bring and the ranks keep is all there was."""

import warnings

import horovod.torch as hvd
import pytest
import torch
from common import mlp, own_randn, same_everywhere
from shared import EXCHANGES, error_of

import hvd_quant.torch as hq

exchanges = pytest.mark.parametrize("exchange", EXCHANGES)


def optimizer_of(model, compressor, **options):
    return hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compressor,
        **options,
    )


def mean_over_ranks(tensor):
    return hvd.allreduce(tensor.double(), op=hvd.Average, name="exact")


def kept(compressor, like):
    """The mean over the ranks of what they have kept of the weights' gradients."""
    residuals = compressor.state_dict()["residuals"]
    return {
        name: mean_over_ranks(residuals[name]).view_as(p) for name, p in like.items() if name in residuals
    }


def fixed_gradients(model, seed, names):
    """Backward through the parameters of these names, to gradients that differ from rank to rank."""
    loss, gradients = 0.0, {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if name in names:
            gradients[name] = own_randn(*parameter.shape, seed=100 * seed + i)
            loss = loss + (parameter * gradients[name]).sum()
    loss.backward()
    return gradients


def check_another_default_dtype():
    model = mlp()
    optimizer = optimizer_of(model, hq.QSGDCompressor(error_feedback=True, min_numel=0))
    torch.set_default_dtype(torch.float64)
    try:
        fixed_gradients(model, 0, [name for name, _ in model.named_parameters()])
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_everywhere(parameter) for parameter in model.parameters())


@exchanges
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 4, "norm": "l2", "rounding": "independent"}])
def check_nothing_is_lost(exchange, passes, options):
    """With all parameters in some steps, and some in others."""
    model = mlp()
    names = [name for name, _ in model.named_parameters()]
    compressor = hq.QSGDCompressor(error_feedback=True, exchange=exchange, min_numel=0, **options)
    optimizer = optimizer_of(model, compressor, backward_passes_per_step=passes)
    brought = {name: torch.zeros(p.shape, dtype=torch.double) for name, p in model.named_parameters()}
    exact = {name: torch.zeros(p.shape, dtype=torch.double) for name, p in model.named_parameters()}
    for step in range(6):
        for turn in range(passes):
            gradients = fixed_gradients(model, 10 * step + turn, names if step % 3 else names[:2])
            for name, gradient in gradients.items():
                exact[name] += mean_over_ranks(gradient)
        optimizer.step()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert same_everywhere(parameter.grad)
                brought[name] += parameter.grad
        optimizer.zero_grad()
    for name, residual in kept(compressor, dict(model.named_parameters())).items():
        torch.testing.assert_close(brought[name] + residual, exact[name], atol=1e-4, rtol=0)
        assert residual.abs().max() > 1e-4


@exchanges
def check_a_step_that_is_skipped_for_nan(exchange):
    model = mlp()
    compressor = hq.QSGDCompressor(bits=2, error_feedback=True, exchange=exchange)
    optimizer = optimizer_of(model, compressor)
    step = 0
    model[0].weight.register_hook(lambda grad: grad / 0.0 if (step, hvd.rank()) == (2, 1) else grad)
    for step in range(4):
        before = compressor.state_dict()["residuals"].get("0.weight")
        fixed_gradients(model, step, ["0.weight", "2.weight"])
        optimizer.synchronize()
        assert model[0].weight.grad.isfinite().all() == (step != 2)
        assert model[2].weight.grad.isfinite().all()
        optimizer.zero_grad()
        residuals = compressor.state_dict()["residuals"]
        assert set(residuals) == {"0.weight", "2.weight"}
        assert all(residual.isfinite().all() for residual in residuals.values())
        if (step, hvd.rank()) == (2, 1):
            assert torch.equal(residuals["0.weight"], before)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(own_randn(16, 32, seed=step)).square().mean().backward()
        optimizer.step()


def of_two_bits(exchange):
    return hq.QSGDCompressor(bits=2, error_feedback=True, exchange=exchange, min_numel=0)


@exchanges
def check_a_resumed_run_is_the_same_run(exchange):
    whole = mlp()
    train(whole, optimizer_of(whole, of_two_bits(exchange)), range(8))
    begun, first = mlp(), of_two_bits(exchange)
    train(begun, optimizer_of(begun, first), range(5))
    model, second = mlp(), of_two_bits(exchange)
    model.load_state_dict(begun.state_dict())
    second.load_state_dict(first.state_dict())
    train(model, optimizer_of(model, second), range(5, 8))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), whole.parameters(), strict=True))


@exchanges
@pytest.mark.parametrize("how", ["gathered", "own", "rank 0's"])
def check_a_run_resumed_from_one_checkpoint(exchange, how):
    """Gathered states give the same run; rank 0's, on all ranks, another, with a warning."""
    whole, of_whole = mlp(), of_two_bits(exchange)
    its_optimizer = optimizer_of(whole, of_whole)
    train(whole, its_optimizer, range(5))
    model, second = mlp(), of_two_bits(exchange)
    model.load_state_dict(whole.state_dict())
    state = of_whole.gather_state_dict() if how == "gathered" else of_whole.state_dict()
    if how != "own":
        state = hvd.broadcast_object(state, root_rank=0, name="state")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second.load_state_dict(state)
    said = [str(one.message) for one in caught if "with the residuals of rank 0 of" in str(one.message)]
    assert len(said) == (how == "rank 0's" and hvd.rank() > 0)
    assert second.stats() == of_whole.stats() or (how != "own" and hvd.rank() > 0)
    train(whole, its_optimizer, range(5, 8))
    train(model, optimizer_of(model, second), range(5, 8))
    same = all(torch.equal(one, two) for one, two in zip(model.parameters(), whole.parameters(), strict=True))
    assert same == (how != "rank 0's")  # as few values, each rank's residuals count
    assert second.stats()["steps"] == 8
    assert second.stats()["messages"] == of_whole.stats()["messages"]


def check_states_that_do_not_fit():
    model = mlp()
    compressor = hq.QSGDCompressor(error_feedback=True)
    optimizer_of(model, compressor)
    state = {**compressor.state_dict(), "residuals": {"0.weight": torch.ones(2048)}}
    compressor.load_state_dict(state)
    for residuals, says in (
        (
            {"0.weight": torch.full((2048,), float("nan"))},
            "what it has for parameter '0.weight' is not finite",
        ),
        ({"0.weight": torch.ones(5)}, "residuals of 5 values for parameter '0.weight', which has 2048"),
        ({"head": torch.ones(5)}, "residuals of 5 values for parameter 'head', which has 0"),
    ):
        with pytest.raises(ValueError, match=says):
            compressor.load_state_dict({**state, "residuals": residuals})
    with pytest.raises(ValueError, match="of a compressor without error_feedback"):
        compressor.load_state_dict(hq.QSGDCompressor().state_dict())
    assert torch.equal(compressor.state_dict()["residuals"]["0.weight"], torch.ones(2048))


def check_names_are_needed():
    """Horovod's own optimizer has them."""
    model = mlp()
    compressor = hq.QSGDCompressor(bits=2, error_feedback=True)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compressor
    )
    model(own_randn(16, 32)).square().mean().backward()
    optimizer.step()
    large = {name for name, one in model.named_parameters() if one.numel() >= 1024}
    assert compressor.state_dict()["residuals"].keys() == large
    compressor = hq.QSGDCompressor(bits=2, error_feedback=True)
    error = error_of(lambda: hvd.allreduce(own_randn(5000), compression=compressor))
    assert isinstance(error, ValueError)
    assert "named_parameters" in str(error)


@pytest.mark.parametrize("feedback", [1, "yes", None])
def check_what_is_no_choice(feedback):
    with pytest.raises(TypeError, match="error_feedback must be True or False"):
        hq.QSGDCompressor(error_feedback=feedback)


def check_nearest_alone_is_refused():
    with pytest.raises(ValueError, match="biased"):
        hq.QSGDCompressor(rounding="nearest")
    assert hq.NUQSGDCompressor(error_feedback=True).scheme.rounding == "nearest"
    assert hq.DQSGDCompressor(k=1.0, error_feedback=True).scheme.rounding == "nearest"
    assert hq.QSGDCompressor().scheme.rounding == "independent"
