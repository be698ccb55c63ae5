"""What the tests under mpirun share."""

import numpy as np
from mpi4py import MPI
from shared import EXCHANGES  # noqa: F401

import hvd_quant

WORLD = MPI.COMM_WORLD
SCHEME = hvd_quant.QSGD(bits=4, bucket_size=64)


def own_values(count, seed=0, dtype=np.float32, comm=WORLD):
    """Random numbers that differ from rank to rank."""
    return np.random.default_rng([seed, comm.rank]).standard_normal(count).astype(dtype)


def mean_of(x, comm=WORLD):
    """The ranks' mean, as exactly as float64 has it."""
    return comm.allreduce(np.asarray(x, np.float64)) / comm.size


def same_everywhere(x, comm=WORLD):
    """Whether all ranks hold the same bits."""
    return len(set(comm.allgather(np.asarray(x).tobytes()))) == 1


def steps_of(x, scheme):
    """The distance of two levels at each value, its bucket's norm over s; scheme of norm "max"."""
    steps = np.empty(x.size)
    for start in range(0, x.size, scheme.bucket_size):
        bucket = slice(start, start + scheme.bucket_size)
        steps[bucket] = np.abs(x[bucket]).max() / scheme.num_levels
    return steps


def rounding_moments(x, scheme):
    """Exact second and fourth moment of the rounding error of each value."""
    steps = steps_of(x, scheme)
    part = np.abs(x) / steps % 1.0
    spread = part * (1.0 - part)
    return steps**2 * spread, steps**4 * spread * (1.0 - 3.0 * spread)
