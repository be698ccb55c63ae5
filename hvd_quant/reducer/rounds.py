"""Rounds: what the ranks send until they request a result must be the same on all of them.

And slots: the number of operations that a rank submits in a hook of backward must not depend on what has
arrived, nor on which gradients it has. So hooks submit a message after as many gradients as the slowest rank
needed in the last round, or one that only counts.
"""

from __future__ import annotations

import numpy as np

from hvd_quant.codec.message import framed, unframed
from hvd_quant.exchange.transport import CountedTransport, Handle
from hvd_quant.reducer.agreement import Agreement

NOTHING = bytes(8)  # announced in place of a round that is left; not a digest


class RoundMismatch(ValueError):  # noqa: N818  it is caught and turned into a RankMismatchError
    """The ranks had not sent the same when results were requested."""


class RoundLeft(RoundMismatch):
    """Some ranks have left the round."""


class Slots:
    """The numbers of gradients after which a hook submits a message."""

    def __init__(self) -> None:
        self.agreed: list[int] = []  # numbers of gradients, in ascending order
        self.gradients = 0  # arrived in this round, including those that are not exchanged
        self.used = 0
        self.skipped = 0  # slots in which no message was ready
        self.completed: list[int] = []  # numbers of gradients after which fused buckets were complete

    def take(self) -> bool:
        """Take a slot, if a message is to be submitted after this many gradients."""
        if self.used >= len(self.agreed) or self.agreed[self.used] > self.gradients:
            return False
        self.used += 1
        return True

    def end_round(self) -> None:
        """Start another round with the next gradient."""
        self.gradients = self.used = self.skipped = 0
        self.completed = []


class Rounds:
    """A rank's rounds in the present generation.

    Args:
        agreement: agreement between the ranks.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.slots = Slots()
        self.joined = False  # whether this rank has no more data, and takes part with zeros
        self.all_joined = False  # whether that was so for all ranks in the last round
        self._agreement = agreement
        self._transport: CountedTransport | None = None
        self._number = 0  # rounds since the generation began
        self._announcements: list[Handle] = []  # rounds whose agreement is not known yet
        self._failure: RoundMismatch | None = None  # found in them

    def begin(self, transport: CountedTransport) -> None:
        """Begin a generation, with no announcements."""
        self._transport = transport
        self._number, self.slots.agreed = 0, []

    def announce(self, sent: bytes) -> None:
        """Announce a round to the others, and end it.

        Args:
            sent: digest of what this rank has sent in it, 8 bytes.
        """
        row = np.array([self.joined, self.slots.skipped, *self.slots.completed], np.int64)
        message = framed(row.tobytes(), sent)
        name = self._agreement.name(f"round.{self._number}")
        self._announcements.append(
            self._transport.allgather(message, [None] * self._transport.size, name),
        )
        self._number += 1
        self.slots.end_round()

    def leave(self) -> None:
        """Announce that this rank has left the round."""
        self.slots.end_round()
        self.announce(NOTHING)

    @property
    def number(self) -> int:
        """Number of rounds that this rank has announced in this generation."""
        return self._number

    @property
    def settled(self) -> bool:
        """Whether all rounds of this rank are known to be the same on all ranks."""
        return not self._announcements and self._failure is None

    def all_announced(self) -> bool:
        """Return whether all ranks have announced all rounds that this one has.

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
        """Return what is wrong with a round, from all announcements; else set the slots of the next one."""
        rows, sent = zip(*map(unframed, messages), strict=True)
        if left := [rank for rank, one in enumerate(sent) if one == NOTHING]:
            return RoundLeft(
                f"rank{'s' if len(left) > 1 else ''} {', '.join(map(str, left))} left this step by the "
                "compressor's reset(), before asking for its result. Clear the optimizer on every rank, "
                "as reset() describes, and go on together."
            )
        if sent.count(sent[0]) != len(sent):
            return RoundMismatch("the ranks have not sent the same")
        received = [np.frombuffer(row, np.int64).tolist() for row in rows]
        self.all_joined = all(one[0] for one in received)
        skipped, completed = [one[1] for one in received], [one[2:] for one in received]
        self.slots.agreed = [max(one) for one in zip(*completed, strict=False)]  # equally many on every rank
        self._transport.level(max(skipped), skipped[self._transport.rank])
        return None

    def drop(self) -> None:
        """Abandon all announcements; some may never be answered."""
        for announcement in self._announcements:
            announcement.abandon()
        self._announcements.clear()
        self._failure = None
        self.slots.end_round()
