"""torch tensors on the CPU."""

import numpy as np
import pytest
from common import EXCHANGES, SCHEME, WORLD, mean_of, own_values, same_everywhere
from mpi4py import MPI

import hvd_quant.mpi as hm

torch = pytest.importorskip("torch")


def numbers(tensor):
    return tensor.detach().to(torch.float64).numpy()


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def check_tensors(exchange, dtype, in_place):
    x = torch.from_numpy(own_values(3000)).to(dtype).reshape(30, 100)
    out = x.clone() if in_place else torch.full_like(x, torch.nan)
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        comm.Allreduce(MPI.IN_PLACE if in_place else x, out, op=hm.AVERAGE)
    assert same_everywhere(numbers(out))
    # Steps are norm / 7, and norms are below 5: off by less than a step in each rounding.
    assert np.abs(numbers(out) - mean_of(numbers(x))).max() < 2 * 5 / 7 + 0.02
    assert np.abs(numbers(out) - mean_of(numbers(x))).mean() < 0.3


def check_an_array_and_a_tensor_meet():
    x = own_values(1000)
    out = torch.empty(1000) if WORLD.rank == 0 else np.empty(1000, np.float32)
    with hm.QuantizedComm(WORLD, SCHEME) as comm:
        comm.Allreduce(torch.from_numpy(x) if WORLD.rank else x, out)
    assert same_everywhere(np.asarray(out))


def check_parameters_are_averaged_in_place():
    parameter = torch.nn.Parameter(torch.from_numpy(own_values(1000)))
    with hm.QuantizedComm(WORLD, SCHEME) as comm:
        comm.Allreduce(MPI.IN_PLACE, parameter, op=hm.AVERAGE)
    assert same_everywhere(numbers(parameter))


GOOD = torch.zeros(8)


@pytest.mark.parametrize(
    ("send", "error", "text"),
    [
        (torch.zeros(16)[::2], ValueError, "contiguous"),
        (torch.zeros(8, dtype=torch.int64), TypeError, "not int64"),
        (torch.zeros(8, dtype=torch.complex64), TypeError, "not complex64"),
        (torch.zeros(8, device="meta"), TypeError, "on the CPU, not torch.strided on meta"),
        (torch.zeros(8).to_sparse(), TypeError, "not torch.sparse_coo"),
        (torch.zeros(8, requires_grad=True) * 2, ValueError, "autograd graph"),
        (torch.zeros(8, dtype=torch.bfloat16), TypeError, "sendbuf is of bfloat16 and recvbuf of float32"),
        (torch.zeros(8, dtype=torch.complex64).conj().imag, ValueError, "contiguous"),
    ],
)
def check_tensors_that_are_refused(send, error, text):
    with hm.QuantizedComm(WORLD, SCHEME) as comm, pytest.raises(error, match=text):
        comm.Allreduce(send, GOOD)
