"""Calls in flight. Whoever waits for one takes all of the process forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from mpi4py import MPI

# Ranks may wait for their calls in different orders, and a rank's part in one must not depend on its waiting
# for another.
underway: list[Request] = []
abandoned: list[Any] = []  # what MPI may still read
lock = threading.RLock()
_busy = False  # under the lock, which a signal's handler or a finalizer has, too, if it interrupts its holder


def progress() -> None:
    """Take all calls as far as they get without waiting."""
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
    """Refuse to wait within `progress`, where nothing would go on.

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
    """A barrier in which requests go on, before calls in which they would not."""
    request = comm.Ibarrier()
    while not request.Test():
        progress()


def check_mpi() -> None:
    """Raises a RuntimeError if MPI is not there to be used."""
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise RuntimeError("MPI is not initialised, or no longer: call MPI.Init() first")


class Request:
    """An ``Iallreduce`` on its way; complete it with `Wait`, or with `Test` until that is true.

    Any call here takes all of the process's requests forward. While none is made they may stand still, and
    with them other ranks that wait for theirs: complete requests before you wait for other ranks by other
    means, such as a barrier.

    One that is dropped is taken forward none the less, and writes to its receive buffer when it gets there;
    `QuantizedComm.Free` waits for it, and raises its error.
    """

    def __init__(self, generator: Iterator[None]) -> None:
        self._generator: Iterator[None] | None = generator  # which yields while it waits for other ranks
        self._error: BaseException | None = None
        self._reported = False  # the error

    @property
    def in_flight(self) -> bool:
        """Whether there is something left to wait for."""
        return self._generator is not None

    @property
    def over(self) -> bool:
        """Whether nothing is left to wait for, and nothing to tell."""
        return self._generator is None and (self._error is None or self._reported)

    def advance(self) -> bool:
        """As far as it gets without waiting; whether that is the end."""
        try:
            if self._generator is not None:
                next(self._generator)
        except StopIteration:
            self._generator = None
        except BaseException as error:
            self._generator, self._error = None, error
            if not isinstance(error, Exception):  # an interrupt, of whatever this request is waited with
                abandoned.append(error)  # whose traceback keeps what MPI may still read
                raise
        return self._generator is None

    def Test(self) -> bool:  # noqa: N802  as in mpi4py
        """Whether the result is in the receive buffer. Never waits for another rank.

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
            True, as mpi4py.

        Raises:
            RankMismatchError: the ranks have called with different arguments.
            RuntimeError: called by a signal's handler that interrupts another call.
        """
        if not self.Test():
            check_not_within()
        while not self.Test():
            pass  # MPI yields the core by itself, where it is told to
        return True

    def test(self) -> tuple[bool, None]:
        """`Test`, with the result that mpi4py's ``test`` has."""
        return self.Test(), None

    def wait(self) -> None:
        """`Wait`, with the result that mpi4py's ``wait`` has."""
        self.Wait()
