"""What users combine: each trains as without quantization, at 8 bits; docs/works-with.md lists them."""

import horovod.torch as hvd
import pytest
import torch
from common import mlp, own_randn, same_everywhere
from torch.utils.checkpoint import checkpoint

import hvd_quant.torch as hq

OURS = {"ours": hq.DistributedOptimizer, "Horovod's": hvd.DistributedOptimizer}
whose = pytest.mark.parametrize("whose", OURS)


def trained(compression, step, model_of=lambda model: model, whose="ours", **options):
    """The parameters after some steps, in one vector."""
    torch.manual_seed(0)
    model = mlp()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = OURS[whose](adam, model.named_parameters(), compression=compression, **options)
    run = model_of(model)
    for number in range(6):
        optimizer.zero_grad()
        step(run, optimizer, number)
    parameters = torch.cat([one.detach().flatten() for one in model.parameters()])
    assert same_everywhere(parameters)
    return parameters


def loss_of(model, number):
    return model(own_randn(16, 32, seed=number)).square().mean()


def plain(model, optimizer, number):
    loss_of(model, number).backward()
    optimizer.step()


def near_float32(step, **options):
    """Quantized training ends near that in float32: within a quarter of what the steps have moved."""
    exact = trained(hvd.Compression.none, step, **options)
    close = trained(hq.QSGDCompressor(bits=8), step, **options)
    torch.manual_seed(0)
    start = mlp()
    hvd.broadcast_parameters(start.state_dict(), root_rank=0)
    moved = (torch.cat([one.detach().flatten() for one in start.parameters()]) - exact).norm()
    assert 0.0 < (close - exact).norm() < 0.25 * moved


@whose
def check_a_compiled_model(whose):
    near_float32(plain, model_of=lambda model: torch.compile(model, backend="aot_eager"), whose=whose)


@whose
@pytest.mark.parametrize("reentrant", [False, True])
def check_activation_checkpointing(whose, reentrant):
    def wrap(model):
        return lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    near_float32(plain, model_of=wrap, whose=whose)


@whose
@pytest.mark.parametrize("clips", [False, True])
def check_a_loss_scaler(whose, clips):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    def step(model, optimizer, number):
        scaler.scale(loss_of(model, number)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        if clips:
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 0.01)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()

    near_float32(step, whose=whose)


@whose
def check_accumulation_and_schedulers(whose):
    def step(model, optimizer, number):
        for part in range(2):
            (loss_of(model, 2 * number + part) / 2).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    near_float32(step, whose=whose, backward_passes_per_step=2)


@whose
def check_autocast(whose):
    def step(model, optimizer, number):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, number)
        loss.backward()
        optimizer.step()

    near_float32(step, whose=whose)


def check_a_frozen_part_that_is_trained_later():
    def step(model, optimizer, number):
        first = next(model.parameters())
        first.requires_grad_(number >= 3)
        plain(model, optimizer, number)

    near_float32(step)


def check_closures():
    def step(model, optimizer, number):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            optimizer.synchronize()
            return loss

        with optimizer.skip_synchronize():
            optimizer.step(closure)

    near_float32(step)
