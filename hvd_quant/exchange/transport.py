"""What the exchanges, and the ranks' agreement, need from whatever carries bytes between ranks."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

Buffer = Any  # contiguous, one-dimensional, of bytes: a NumPy array, or a tensor on the transport's device


class Handle(Protocol):
    """A collective in flight."""

    def ready(self) -> bool:
        """Whether `wait` would return at once. Never blocks."""

    def wait(self) -> list[Buffer]:
        """Wait for the collective and return what each rank has sent, in rank order. To be called once.

        Raises:
            Exception: one of the transport's ``errors``, where a rank has died.
        """

    def abandon(self) -> None:
        """Let go of it: nobody will wait for it, and it may never be over."""


class Transport(Protocol):
    """Asynchronous collectives over the ranks of a group.

    A collective matches those of the same name on the other ranks. Sizes may differ from what the receiver
    expects, which is no error here: it gets what was sent, or, where the transport cannot tell whose that is,
    nothing from anyone. The sender's buffer must stay as it is until `Handle.wait` has returned.
    """

    @property
    def rank(self) -> int:
        """The own rank in the group."""

    @property
    def size(self) -> int:
        """Ranks in the group."""

    def allgather(self, message: Buffer, sizes: Sequence[int | None], name: str) -> Handle:
        """Send ``message`` to every rank, which expects ``sizes`` bytes of the ranks.

        A size is None where the message says its own; see `hvd_quant.codec.message.cut`.
        """

    def alltoall(self, message: Buffer, sizes: Sequence[int], name: str) -> Handle:
        """Send consecutive parts of ``message``, of ``sizes`` bytes, to the ranks in their order."""


class CountedTransport(Transport, Protocol):
    """A transport like Horovod, which counts the operations that a process submits.

    It calls one without a name by that count, so that ranks that have counted differently wait for each other
    for ever. So whenever user code may run, all ranks must have submitted as many.
    """

    errors: tuple[type[Exception], ...]  # what it raises where a rank has died, or it has been shut down

    @property
    def unanswered(self) -> MutableMapping[str, Handle]:
        """Questions that were asked in vain, by name; of all transports over the same ranks together."""

    def count(self, handle: Handle) -> int:
        """Operations that this process had submitted with this one."""

    def level(self, others: int, own: int) -> None:
        """Have this rank's count go up by ``others - own``, if that is positive."""

    def forget_abandoned(self) -> None:
        """Free the memory of what has been abandoned, and is over by now."""
