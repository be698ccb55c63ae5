"""Requests in flight. Waiting for one advances all of the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from mpi4py import MPI

# Ranks may wait for their requests in different orders, so a rank's part in one must not depend on its
# waiting for another.
underway: list[Request] = []
abandoned: list[Any] = []  # buffers that MPI may still read
lock = threading.RLock()
_busy = False  # guarded by the lock, which a signal handler or finalizer that interrupts its holder also gets


def progress() -> None:
    """Advance all requests as far as possible without waiting."""
    global _busy
    with lock:
        if _busy:
            return
        _busy = True
        try:
            underway[:] = [request for request in underway if not request.advance()]
        finally:
            _busy = False


def check_not_within() -> None:
    """Refuse to wait within `progress`, where nothing would advance.

    Raises:
        RuntimeError: this is called from there.
    """
    with lock:
        if _busy:
            raise RuntimeError(
                "a signal's handler or a finalizer cannot wait for an hvd_quant.mpi call, or make one that "
                "waits, while it interrupts another: have it set a flag, and call from the main program"
            )


def barrier(comm: MPI.Intracomm) -> None:
    """Run a barrier in which requests advance, before calls in which they would not."""
    request = comm.Ibarrier()
    while not request.Test():
        progress()


def check_mpi() -> None:
    """Check that MPI can be used; else raise a RuntimeError."""
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise RuntimeError("MPI is not initialised, or no longer: call MPI.Init() first")


class Request:
    """An ``Iallreduce`` in flight; complete it with `Wait`, or with `Test` until that is true.

    Any call here advances all of the process's requests. Between calls they may stand still, and with them
    other ranks that wait for theirs: complete requests before you wait for other ranks by other means, such
    as a barrier.

    A request that is dropped still advances, and writes to its receive buffer when it completes;
    `QuantizedComm.Free` waits for it, and raises its error.
    """

    def __init__(self, generator: Iterator[None]) -> None:
        self._generator: Iterator[None] | None = generator  # yields while it waits for other ranks
        self._error: BaseException | None = None
        self._reported = False  # whether the error has been raised

    @property
    def in_flight(self) -> bool:
        """Whether it is incomplete."""
        return self._generator is not None

    @property
    def over(self) -> bool:
        """Whether it is complete, and its error, if any, has been raised."""
        return self._generator is None and (self._error is None or self._reported)

    def advance(self) -> bool:
        """Advance as far as possible without waiting; returns whether it is complete."""
        try:
            if self._generator is not None:
                next(self._generator)
        except StopIteration:
            self._generator = None
        except BaseException as error:
            self._generator, self._error = None, error
            if not isinstance(error, Exception):  # an interrupt, during a wait for any request
                abandoned.append(error)  # its traceback keeps what MPI may still read
                raise
        return self._generator is None

    def Test(self) -> bool:  # noqa: N802  as in mpi4py
        """Return whether the result is in the receive buffer. Never waits for another rank.

        Raises:
            RankMismatchError: the ranks have called with different arguments.
        """
        if self._generator is not None:
            check_mpi()
            progress()
        if self._generator is None and self._error is not None:
            self._reported = True
            raise self._error
        return self._generator is None

    def Wait(self) -> bool:  # noqa: N802
        """Wait until the result is in the receive buffer.

        Returns:
            True, as in mpi4py.

        Raises:
            RankMismatchError: the ranks have called with different arguments.
            RuntimeError: called by a signal handler that interrupts another call.
        """
        if not self.Test():
            check_not_within()
        while not self.Test():
            pass  # MPI yields the core by itself, if it is configured to
        return True

    def test(self) -> tuple[bool, None]:
        """`Test`, with the result that mpi4py's ``test`` has."""
        return self.Test(), None

    def wait(self) -> None:
        """`Wait`, with the result that mpi4py's ``wait`` has."""
        self.Wait()
