"""Set-up of the tests that every rank runs together, under mpirun. tests/test_mpi.py starts them."""

import pytest


@pytest.fixture(autouse=True)
def _same_start():
    """Every test begins on all ranks together."""
    from mpi4py import MPI  # not at the top: pytest reads this file wherever it looks for tests

    MPI.COMM_WORLD.Barrier()
