"""Quantized gradients for mpi4py, with or without Horovod.

Example:
    >>> from mpi4py import MPI
    >>> import hvd_quant
    >>> import hvd_quant.mpi
    >>> with hvd_quant.mpi.QuantizedComm(MPI.COMM_WORLD, hvd_quant.QSGD(bits=4)) as comm:
    ...     comm.Allreduce(gradient, mean, op=hvd_quant.mpi.AVERAGE)  # as comm.Allreduce of mpi4py
    ...     comm.Allreduce(MPI.IN_PLACE, gradient)  # their sum, by default
    ...
    ...     request = comm.Iallreduce(gradient, mean, op=hvd_quant.mpi.AVERAGE)
    ...     compute_something_else()
    ...     request.Wait()
"""

try:
    from mpi4py import MPI  # noqa: F401
except (ImportError, RuntimeError) as error:  # mpi4py is missing, or finds no MPI library
    raise ImportError(
        "hvd_quant.mpi needs mpi4py 4 and an MPI library, such as Open MPI: pip install mpi4py. "
        f"Importing mpi4py.MPI said: {error}"
    ) from error

from hvd_quant.mpi.comm import AVERAGE, QuantizedComm, Request
from hvd_quant.reducer.errors import RankMismatchError

__all__ = ["AVERAGE", "QuantizedComm", "RankMismatchError", "Request"]
