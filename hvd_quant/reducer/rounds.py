"""Rounds: what the ranks send until they ask for a result must be the same on all of them.

And slots: how many operations a rank submits in a hook of backward must not depend on what has arrived, nor
on which gradients it has. So hooks submit a message after as many gradients as the slowest rank needed in the
last round, or one that counts and does nothing.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from hvd_quant.codec.message import framed, unframed
from hvd_quant.exchange.transport import CountedTransport, Handle
from hvd_quant.reducer.agreement import Agreement

NOTHING = bytes(8)  # announced in place of a round that is left; no digest


class RoundMismatch(ValueError):  # noqa: N818  it is caught and turned into a RankMismatchError
    """By the time that results were asked for, the ranks had not sent the same."""


class RoundLeft(RoundMismatch):
    """Some ranks have left the round."""


class Slots:
    """After which gradients a hook submits a message."""

    def __init__(self) -> None:
        self.agreed: list[int] = []  # after how many gradients, in ascending order
        self.gradients = 0  # that have come in this round, those that are not exchanged included
        self.used = 0
        self.skipped = 0  # in which no message was ready
        self.completed: list[int] = []  # after how many gradients fused buckets of this round were complete

    def due(self) -> int:
        """How many messages are to be submitted now; takes the slots."""
        due = bisect_right(self.agreed, self.gradients) - self.used
        self.used += due
        return due

    def end_round(self) -> None:
        """The next gradient is another round's first."""
        self.gradients = self.used = self.skipped = 0
        self.completed = []


class Rounds:
    """A rank's rounds in the present generation.

    Args:
        agreement: between the ranks.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.slots = Slots()
        self._agreement = agreement
        self._transport: CountedTransport | None = None
        self._number = 0  # since the generation began
        self._announcements: list[Handle] = []  # of rounds not yet known to have been the same
        self._failure: RoundMismatch | None = None  # found in them

    def begin(self, transport: CountedTransport) -> None:
        """Begin a generation, in which no rank knows anything of the others' rounds."""
        self._transport = transport
        self._number, self.slots.agreed = 0, []

    def announce(self, sent: bytes) -> None:
        """Tell the others about a round, and end it.

        Args:
            sent: a digest of what this rank has sent in it, 8 bytes.
        """
        row = np.array([self.slots.skipped, *self.slots.completed], np.int64)
        message = framed(row.tobytes(), sent)
        name = self._agreement.name(f"round.{self._number}")
        self._announcements.append(
            self._transport.allgather(message, [None] * self._transport.size, name),
        )
        self._number += 1
        self.slots.end_round()

    def leave(self) -> None:
        """Tell the others that this rank has left the round."""
        self.slots.end_round()
        self.announce(NOTHING)

    @property
    def settled(self) -> bool:
        """Whether all rounds of this rank are known to have been the same on all ranks."""
        return not self._announcements and self._failure is None

    def all_announced(self) -> bool:
        """Whether all ranks have announced all rounds that this one has.

        Raises:
            RoundLeft: some have left one.
            RoundMismatch: they have not sent the same.
        """
        while self._failure is None and self._announcements and self._announcements[0].ready():
            self._failure = self._compare(self._announcements.pop(0).wait())
        if self._failure is not None:
            raise self._failure
        return not self._announcements

    def _compare(self, messages: list[np.ndarray]) -> RoundMismatch | None:
        """What is wrong with a round, by what all ranks have announced; else, have the next one follow it."""
        rows, sent = zip(*map(unframed, messages), strict=True)
        if left := [rank for rank, one in enumerate(sent) if one == NOTHING]:
            return RoundLeft(
                f"rank{'s' if len(left) > 1 else ''} {', '.join(map(str, left))} left this step by the "
                "compressor's reset(), before asking for its result. Clear the optimizer on every rank, "
                "as reset() describes, and go on together."
            )
        if sent.count(sent[0]) != len(sent):
            return RoundMismatch("the ranks have not sent the same")
        told = [np.frombuffer(row, np.int64).tolist() for row in rows]
        skipped, completed = [one[0] for one in told], [one[1:] for one in told]
        self.slots.agreed = [max(one) for one in zip(*completed, strict=False)]  # as many as on every rank
        self._transport.level(max(skipped), skipped[self._transport.rank])
        return None

    def drop(self) -> None:
        """Let go of all announcements; some may never be answered."""
        for announcement in self._announcements:
            announcement.abandon()
        self._announcements.clear()
        self._failure = None
        self.slots.end_round()
