"""Parameters that are quantized otherwise than the rest, or not at all."""

import warnings

import horovod.torch as hvd
import pytest
import torch
from common import (
    backward,
    local_gradients,
    mlp,
    own_randn,
    same_everywhere,
    same_mismatch,
)
from shared import EXCHANGES, error_of

import hvd_quant.torch as hq
from hvd_quant import NUQSGD, QSGD


def optimizer_of(model, compressor):
    return hq.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compressor,
    )


def exact_means(model):
    return [hvd.allreduce(gradient, op=hvd.Average, name="exact") for gradient in local_gradients(model)]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("kind", ["qsgd", "dqsgd"])
def check_each_has_its_own(kind, exchange):
    model = mlp(width=128)
    exact = exact_means(model)
    options = {"overrides": {"*.bias": None, "2.*": NUQSGD(bits=8, norm="max")}, "exchange": exchange}
    if kind == "qsgd":
        compressor = hq.QSGDCompressor(bits=2, min_numel=0, **options)
    else:
        compressor = hq.DQSGDCompressor(k=1e-6, min_numel=0, **options)
    optimizer = optimizer_of(model, compressor)
    for step in range(2):  # DQ-SGD begins with 8 bits, and has 2 from then on
        backward(model)
        optimizer.synchronize()
        wrong = [
            float((p.grad - mean).norm() / mean.norm())
            for p, mean in zip(model.parameters(), exact, strict=True)
        ]
        assert all(same_everywhere(p.grad) for p in model.parameters())
        assert wrong[1] < 1e-6
        assert wrong[3] < 1e-6
        assert 1e-3 < wrong[2] < 0.4
        if kind == "qsgd" or step == 1:
            assert wrong[0] > 0.5
        optimizer.zero_grad()
    raw = 4 * sum(p.numel() for p in model.parameters())
    uncompressed = 4 * (model[0].bias.numel() + model[2].bias.numel())
    stats = compressor.stats()
    assert stats["raw_bytes"] == 2 * raw
    assert stats["wire_bytes"] > 2 * uncompressed


def check_one_that_is_not_compressed_is_exact(tmp_path):
    path = tmp_path / "overrides.yaml"
    path.write_text('"0.weight": none\n')
    model = mlp()
    exact = exact_means(model)
    optimizer = optimizer_of(model, hq.QSGDCompressor(bits=2, overrides=path))
    backward(model)
    optimizer.synchronize()
    torch.testing.assert_close(model[0].weight.grad, exact[0])
    assert (model[2].weight.grad - exact[2]).abs().max() > 1e-4
    optimizer.zero_grad()


def check_patterns_that_match_nothing_are_warned_of():
    model = mlp()
    compressor = hq.QSGDCompressor(overrides={"*.weight": QSGD(bits=8), "0.weight": None, "embed.*": None})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer_of(model, compressor)
    texts = [str(warning.message) for warning in caught if "override" in str(warning.message)]
    assert len(texts) == 2
    assert "'0.weight'" in texts[0]
    assert "'embed.*'" in texts[1]


def check_different_overrides_are_an_error_everywhere():
    model = mlp()
    overrides = {"0.weight": None} if hvd.rank() == 0 else {"0.*": None}
    optimizer = optimizer_of(model, hq.QSGDCompressor(overrides=overrides))
    text = same_mismatch(error_of(lambda: (backward(model), optimizer.step())))
    assert 'overrides is [["0.weight", "None"]] on rank 0' in text


def check_names_are_needed():
    compressor = hq.QSGDCompressor(overrides={"0.*": None})
    error = error_of(lambda: hvd.allreduce(own_randn(5000), compression=compressor))
    assert isinstance(error, ValueError)
    assert "overrides need the parameters' names" in str(error)


def check_horovods_own_optimizer_has_the_names():
    model = mlp()
    compressor = hq.QSGDCompressor(overrides={"*": None})
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=compressor
    )
    model(own_randn(16, 32)).square().mean().backward()
    optimizer.step()
    assert compressor.stats()["messages"] == 0


def check_schemes_that_need_error_feedback():
    with pytest.raises(ValueError, match="biased"):
        hq.QSGDCompressor(overrides={"0.*": QSGD(rounding="nearest")})
    hq.QSGDCompressor(error_feedback=True, overrides={"0.*": QSGD(rounding="nearest")})
