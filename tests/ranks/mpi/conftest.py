"""Set-up of the tests that every rank runs together, under mpirun. tests/ranks/test_mpi.py starts them."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _hosts():
    if "TEST_HOSTS" in os.environ:
        from shared import pretend_hosts

        from hvd_quant.mpi import comm

        comm._host_of = lambda ranks: (pretend_hosts(ranks.rank, ranks.size), False)


@pytest.fixture(autouse=True)
def _same_start():
    """Every test begins on all ranks together."""
    from mpi4py import MPI  # not at the top: pytest reads this file wherever it looks for tests

    MPI.COMM_WORLD.Barrier()
