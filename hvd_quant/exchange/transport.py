"""Interface between the exchanges and whatever carries bytes between ranks."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

Buffer = Any  # contiguous, one-dimensional, of bytes: a NumPy array, or a tensor on the transport's device


class Handle(Protocol):
    """Handle of a collective in flight."""

    def ready(self) -> bool:
        """Return whether `wait` would return at once. Never blocks."""

    def wait(self) -> list[Buffer]:
        """Wait for the collective and return what each rank has sent, in rank order. Call it once.

        Raises:
            Exception: one of the transport's ``errors``, where a rank has died.
        """

    def abandon(self) -> None:
        """Abandon it: nobody will wait for it, and it may never complete."""


class Transport(Protocol):
    """Asynchronous collectives over the ranks of a group.

    A collective matches those of the same name on the other ranks. Sizes may differ from what the receiver
    expects, which is no error here: it receives what was sent, or, where the transport cannot separate the
    ranks' parts, empty messages. The sender's buffer must not change until `Handle.wait` has returned.
    """

    @property
    def rank(self) -> int:
        """Own rank in the group."""

    @property
    def size(self) -> int:
        """Ranks in the group."""

    def allgather(self, message: Buffer, sizes: Sequence[int | None], name: str) -> Handle:
        """Send ``message`` to every rank; ``sizes`` are the bytes expected from each.

        A size is None if the message contains its own; see `hvd_quant.codec.message.cut`.
        """

    def alltoall(self, message: Buffer, sizes: Sequence[int], name: str) -> Handle:
        """Send consecutive parts of ``message``, of ``sizes`` bytes, to the ranks in order."""


class CountedTransport(Transport, Protocol):
    """A transport like Horovod, which counts the operations that a process submits.

    It names an unnamed one by that count, so that ranks that have counted differently wait for each other
    indefinitely. So whenever user code may run, all ranks must have submitted equally many.
    """

    errors: tuple[type[Exception], ...]  # raised if a rank has died, or it has been shut down
    ranks: Sequence[int] | None  # the group's ranks, numbered as in the whole job; None for all

    @property
    def unanswered(self) -> MutableMapping[str, Handle]:
        """Questions that not all ranks answered, by name; shared by all transports over the same ranks."""

    def count(self, handle: Handle) -> int:
        """Return how many operations this process had submitted when it submitted this one, included."""

    def level(self, others: int, own: int) -> None:
        """Have this rank's count go up by ``others - own``, if that is positive."""

    def forget_abandoned(self) -> None:
        """Free the buffers of abandoned operations that are complete by now."""
