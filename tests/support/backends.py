"""The codec's backends, as tests are run over them."""

import inspect

import emulate
import pytest
import torch

from hvd_quant.codec import _native, cuda, torch_ops

_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
_ON_GPU = [pytest.param(name, marks=_NO_GPU) for name in ("torch-cuda", "torch-cuda-off")]
# Each instruction set; torch's operations; the GPU's kernels, emulated; and on a GPU these, and operations.
ALL = [*(f"native-{isa}" for isa in _native.available_isas()), "torch", "torch-emulated", *_ON_GPU]
# For what is slow: the other ones give the same payloads as these (test_codec.py, test_cuda_kernels.py).
EACH = ["native", "torch", *_ON_GPU]

# Which arguments a function of torch_ops writes to.
_WRITTEN = {
    "encode": ["residual", "out"],
    "decode_mean": ["out"],
    "encode_message": ["message", "residuals"],
    "decode_messages": ["out"],
}


def choose(name, monkeypatch):
    """Make a backend the one that ``backend=`` chooses by what is returned."""
    kind, _, how = name.partition("-")
    if kind == "native" and how:
        _native.choose_isa(how)
    if how == "emulated":
        emulated = emulate.kernels()
        monkeypatch.setattr(cuda, "kernels", lambda device: emulated)
    if how == "cuda-off":
        monkeypatch.setattr(cuda, "kernels", lambda device: None)
    if how in ("cuda", "cuda-off"):
        for function, written in _WRITTEN.items():
            monkeypatch.setattr(torch_ops, function, on_device("cuda", getattr(torch_ops, function), written))
    return kind


def on_device(device, function, written):
    """The same on a device: tensors go there, and what is written or returned comes back."""
    signature = inspect.signature(function)

    def call(*args, **options):
        bound = signature.bind(*args, **options)
        here = dict(bound.arguments)
        bound.arguments.update({name: _moved(argument, device) for name, argument in here.items()})
        result = function(*bound.args, **bound.kwargs)
        for name in written:
            _copy_back(here.get(name), bound.arguments.get(name))
        return _moved(result, "cpu")

    return call


def _moved(argument, device):
    if isinstance(argument, torch.Tensor):
        return _one_nan(argument.detach().to(device))
    return [_moved(one, device) for one in argument] if isinstance(argument, list | tuple) else argument


def _one_nan(tensor):
    """The same with the NaN that the other backends have: an NVIDIA GPU's operations give another one."""
    return torch.where(tensor.isnan(), torch.nan, tensor) if tensor.is_floating_point() else tensor


def _copy_back(here, there):
    if isinstance(here, torch.Tensor):
        here.copy_(_one_nan(there))
    elif here is not None:
        for one, other in zip(here, there, strict=True):
            _copy_back(one, other)
