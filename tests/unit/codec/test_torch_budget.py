"""What the codec in torch operations does, counted on CPU tensors: so that no GPU is needed to see it grow.

On a GPU these operations are as slow as the memory that they read and write, and a launch costs microseconds.
"""

import numpy as np
import pytest
import torch

from benchmarks.traffic import SYNCHRONISING, Traffic, traffic_of
from hvd_quant import NUQSGD, QSGD
from hvd_quant.codec import torch_ops, torch_rounding
from hvd_quant.codec.message import MessageLayout, Segment
from hvd_quant.codec.noise import Noise

COUNT = 2**16

# Bytes a value and operations of encode, and the same of decode; docs/gpu.md has some of them.
BUDGETS = {
    QSGD(2): (30.6, 14, 26.5, 25),
    QSGD(3): (51.5, 22, 50.2, 34),
    QSGD(4): (31.1, 12, 27.7, 23),
    QSGD(4, "l2"): (31.2, 13, 27.7, 23),
    QSGD(6): (96.9, 27, 53.2, 34),
    QSGD(8): (74.1, 16, 28.2, 20),
    NUQSGD(3): (104.6, 33, 58.1, 27),
    NUQSGD(4): (84.2, 23, 35.6, 16),
}


@pytest.mark.parametrize("scheme", BUDGETS, ids=str)
def test_bytes_and_operations(scheme, monkeypatch):
    monkeypatch.setattr(torch_rounding, "_times", torch.mul)  # what it is on a GPU, see below
    values = torch.randn(COUNT)
    payload = torch_ops.encode(values, scheme, 1)
    encode = traffic_of(lambda: torch_ops.encode(values, scheme, 1))
    decode = traffic_of(lambda: torch_ops.decode_mean([payload]))
    most_bytes, most_operations, most_bytes_to_decode, most_operations_to_decode = BUDGETS[scheme]
    assert encode.bytes / COUNT <= most_bytes
    assert len(encode.operations) <= most_operations, encode.operations
    assert decode.bytes / COUNT <= most_bytes_to_decode
    assert len(decode.operations) <= most_operations_to_decode, decode.operations


def test_products_are_one_operation_on_a_gpu_and_the_same_on_a_cpu():
    codes, factors = torch.empty(4, 8, dtype=torch.int8, device="meta"), torch.empty(4, 1, device="meta")
    assert traffic_of(lambda: torch_rounding._times(codes, factors)).operations == ["mul"]
    factors = torch.tensor([0.0, -0.0, 1 / 3, 2.0**-149, 2.0**-126, 3e38, torch.inf, torch.nan])[:, None]
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(len(factors), 1)
    bits = [(codes * factors).view(torch.int32), torch_rounding._times(codes, factors).view(torch.int32)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_read_as_they_are(dtype):
    values = torch.randn(COUNT).to(dtype)
    encode = traffic_of(lambda: torch_ops.encode(values, QSGD(4), 1))
    assert encode.bytes / COUNT <= BUDGETS[QSGD(4)][0] - 4  # 2 bytes less, twice
    assert len(encode.operations) <= BUDGETS[QSGD(4)][1]


def encoding(scheme, error_feedback, device="cpu"):
    """A call that encodes a message of several tensors."""
    counts = (3000, 1, 20_001)
    dtypes = ("float32", "float16", "bfloat16")
    segments = [Segment(i, 0, counts[i], dtypes[i], scheme) for i in range(3)]
    values = [torch.randn(one.count).to(device, getattr(torch, one.dtype)) for one in segments]
    residuals = [torch.zeros(count, device=device) for count in counts] if error_feedback else []
    layout = MessageLayout(segments, bytes(8))
    noise = Noise(np.arange(3, dtype=np.uint64), np.zeros(3, np.uint32))
    message = torch.empty(layout.size, dtype=torch.uint8, device=device)
    return lambda: torch_ops.encode_message(values, layout, noise, message, residuals)


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize(
    "scheme",
    [
        *(kind(bits, norm) for kind in (QSGD, NUQSGD) for bits in range(2, 9) for norm in ("max", "l2")),
        *(kind(4, rounding=how) for kind in (QSGD, NUQSGD) for how in ("nearest", "correlated")),
    ],
    ids=str,
)
def test_encoding_does_not_wait(scheme, error_feedback, monkeypatch):
    call = encoding(scheme, error_feedback)
    encode = traffic_of(call)
    assert not SYNCHRONISING & set(encode.operations)
    with monkeypatch.context() as patch:  # which on a GPU would copy, and wait for that
        patch.setattr(torch, "tensor", forbidden)
        patch.setattr(torch, "as_tensor", forbidden)
        patch.setattr(torch.Tensor, "to", to_another_type)
        call()
    # Of torch's meta tensors, which have no data, nothing can be copied to the host.
    monkeypatch.setattr(torch_rounding, "_generator", lambda *_: None)
    encoding(scheme, error_feedback, "meta")()


def forbidden(*_, device=None, **__):
    assert device is None, "data is copied from the host"
    return torch.zeros(())


def to_another_type(tensor, dtype, to=torch.Tensor.to):
    return to(tensor, dtype)


def test_waiting_is_noticed():
    x = torch.ones(3)
    with Traffic() as traffic:
        x.nonzero().sum().item()
    assert {"nonzero", "_local_scalar_dense"} <= set(traffic.operations)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        torch.ones(3, device="meta").cpu()
