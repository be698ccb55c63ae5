"""Launch and communication of a job's ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hvd_quant.cli.facts import describe

if TYPE_CHECKING:
    import numpy as np

# Variables of horovodrun with Gloo, and of Open MPI's mpirun, which horovodrun with MPI calls.
_LAUNCHERS = (
    ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
)


@dataclass(frozen=True)
class Launch:
    """Rank and size of a process in its job."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return what the launcher says, or None if none has started this process."""
    for names in _LAUNCHERS:
        if all(environment.get(name, "").isdecimal() for name in names):
            return Launch(*(int(environment[name]) for name in names))
    return None


@dataclass(frozen=True)
class Meeting:
    """Ranks that have met.

    Args:
        by: name of the library that they have met by.
        rank, size: own rank, and the number of ranks.
        gather: allgather of one object per rank.
        collectives: collectives by name. Each exchanges an array of bytes, of the same size on all ranks and
            a multiple of 4 times the number of ranks. Every rank receives as much; for "allgather" each
            sends a share of its array.
    """

    by: str
    rank: int
    size: int
    gather: Callable[[Any], list[Any]]
    collectives: Mapping[str, Callable[[np.ndarray], Any]]


def meet() -> Meeting:
    """Meet the other ranks with the first library that works. Waits for them.

    Raises:
        RuntimeError: none works.
    """
    failures = []
    for means in (_horovod_torch, _horovod_tensorflow, _mpi4py):
        try:
            return means()
        except ImportError as error:  # noqa: PERF203
            failures.append(describe(error))
    raise RuntimeError("Horovod works with no framework, and there is no mpi4py: " + "; ".join(failures))


def _share(array: np.ndarray, size: int) -> np.ndarray:
    return array[: array.size // size]


def _by_horovod(hvd: ModuleType, collectives: Mapping[str, Callable[[np.ndarray], Any]]) -> Meeting:
    """Make a meeting from one of Horovod's modules, which has been initialised."""
    return Meeting(
        hvd.__name__,
        hvd.rank(),
        hvd.size(),
        lambda thing: hvd.allgather_object(thing, name="doctor.objects"),
        collectives,
    )


def _horovod_torch() -> Meeting:
    import horovod.torch as hvd
    import torch

    hvd.init()
    size = hvd.size()
    return _by_horovod(
        hvd,
        {
            "allreduce": lambda array: hvd.allreduce_(
                torch.from_numpy(array.view("float32")), name="doctor.sum"
            ),
            "allgather": lambda array: hvd.allgather(
                torch.from_numpy(_share(array, size)), name="doctor.all"
            ),
            "alltoall": lambda array: hvd.alltoall(
                torch.from_numpy(array),
                torch.full((size,), array.size // size, dtype=torch.int32),
                name="doctor.each",
            ),
        },
    )


def _horovod_tensorflow() -> Meeting:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    size = hvd.size()
    return _by_horovod(
        hvd,
        {
            "allreduce": lambda array: hvd.allreduce(tf.constant(array.view("float32")), name="doctor.sum"),
            "allgather": lambda array: hvd.allgather(tf.constant(_share(array, size)), name="doctor.all"),
            "alltoall": lambda array: hvd.alltoall(
                tf.constant(array), tf.fill([size], array.size // size), name="doctor.each"
            ),
        },
    )


def _mpi4py() -> Meeting:
    import numpy as np
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    size = world.Get_size()
    return Meeting(
        f"mpi4py, {MPI.Get_library_version().split(',')[0]}",
        world.Get_rank(),
        size,
        world.allgather,
        {
            "allreduce": lambda array: world.Allreduce(MPI.IN_PLACE, array.view("float32")),
            "allgather": lambda array: world.Allgather(_share(array, size), np.empty_like(array)),
            "alltoall": lambda array: world.Alltoall(array, np.empty_like(array)),
        },
    )
