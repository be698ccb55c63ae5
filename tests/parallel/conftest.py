"""Set-up of the tests that every rank runs together, under horovodrun. tests/test_parallel.py starts them."""

import os

import horovod.torch as hvd
import pytest
import torch
from shared import pretend_hosts


@pytest.fixture(scope="session", autouse=True)
def _horovod():
    hvd.init(process_sets="dynamic")
    if "TEST_HOSTS" in os.environ:
        hosts = int(os.environ["TEST_HOSTS"])
        hvd.cross_rank = lambda: pretend_hosts(hvd.rank(), hvd.size())
        hvd.cross_size, hvd.local_size = lambda: hosts, lambda: hvd.size() // hosts
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test begins on all ranks together, with the same random numbers."""
    torch.manual_seed(0)
    hvd.barrier()
