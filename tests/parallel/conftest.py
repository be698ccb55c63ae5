"""Set-up of the tests that every rank runs together, under horovodrun. tests/test_parallel.py starts them."""

import horovod.torch as hvd
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _horovod():
    hvd.init(process_sets="dynamic")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test begins on all ranks together, with the same random numbers."""
    torch.manual_seed(0)
    hvd.barrier()
