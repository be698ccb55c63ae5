"""Beside Horovod in one process, whose thread calls MPI at the same time."""

import numpy as np
import pytest
from common import EXCHANGES, SCHEME, WORLD, own_values, same_everywhere
from launch import need

import hvd_quant.mpi as hm

hvd = need("torch")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def _horovod():
    hvd.init(comm=WORLD)
    yield
    hvd.shutdown()


@pytest.mark.parametrize("exchange", EXCHANGES)
def check_beside_horovod(exchange):
    x = own_values(20_000)
    mean = torch.from_numpy(x.copy())
    expected = hvd.allreduce(mean, name="expected")
    with hm.QuantizedComm(WORLD, SCHEME, exchange=exchange) as comm:
        for step in range(10):
            out = np.empty_like(x)
            handle = hvd.allreduce_async(mean, name=f"{exchange} {step}")
            request = comm.Iallreduce(x, out, op=hm.AVERAGE)
            if (step + WORLD.rank) % 2:  # other orders on other ranks
                request.Wait()
                reduced = hvd.synchronize(handle)
            else:
                while not hvd.poll(handle):
                    request.Test()
                reduced = hvd.synchronize(handle)
                request.Wait()
            assert torch.allclose(reduced, expected)
            assert same_everywhere(out)
            assert np.linalg.norm(out - expected.numpy()) < 0.5 * np.linalg.norm(expected.numpy())
