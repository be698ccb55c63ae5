"""What the exchanges need from whatever carries bytes between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Buffer = Any  # contiguous, one-dimensional, of bytes: a NumPy array, or a tensor on the transport's device


class Handle(Protocol):
    """A collective on its way."""

    def ready(self) -> bool:
        """Whether `wait` would return at once. Never blocks."""

    def wait(self) -> list[Buffer]:
        """Wait for the collective and return what each rank has sent, in rank order. To be called once.

        Raises:
            Exception: the transport's own, where a rank has died.
        """


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
