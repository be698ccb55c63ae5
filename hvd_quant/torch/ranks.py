"""What the ranks tell each other about their gradients, by small allgathers of Horovod."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import torch

from hvd_quant.exchange.topology import Topology
from hvd_quant.torch.transport import (
    POLL_SECONDS,
    Collective,
    abandon,
    forget_abandoned,
    submit_as_many,
)

NOTHING = bytes(8)  # announced in place of a round that is left; no digest
# How long to wait for the other ranks to tell what they have: one of them may not run this code, or have
# died.
PATIENCE_SECONDS = 60.0

# Questions that were asked in vain, by process set and name. They are not a compressor's own: its number may
# be what differs.
_unanswered: dict[tuple[int | None, str], Collective] = {}


def wait_for(condition: Callable[[], object]) -> bool:
    """Wait until something is so, or the other ranks have had their time for it; returns whether it is so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


class RoundMismatch(ValueError):  # noqa: N818  it is caught and turned into a RankMismatchError
    """By the time that results were asked for, the ranks had not sent the same."""


class RoundLeft(RoundMismatch):
    """Some ranks have left the round."""


class Ranks:
    """The ranks that exchange a compressor's gradients.

    With their first gradient, and with the first one after every reset, they make a *beginning*: each tells a
    fingerprint of what it has, how many beginnings it knows of, so that all go on from the same number, and
    how far it has come, in which they may differ.

    Args:
        process_set: the ranks.
        number: the compressor's, in its process.
    """

    def __init__(self, process_set: hvd.ProcessSet, number: int) -> None:
        self._process_set = process_set
        self._number = number
        self._beginnings = 0
        self._proposal: Collective | None = None  # until all ranks have made theirs
        self.progress: list[list[int]] = []  # of every rank, when they began
        self.topology: Topology | None = None  # until they have
        self._rounds = 0  # since the beginning
        # After how many gradients hooks submit a message in this round: by then, every rank had completed as
        # many fused buckets in the last one.
        self.slots: list[int] = []
        self._announcements: list[Collective] = []  # of rounds not yet known to have been the same
        self._failure: RoundMismatch | None = None  # found in them

    def name(self, purpose: str) -> str:
        """The name of a collective.

        Beginnings are in it, because what was abandoned may still be on its way.
        """
        return f"hvd_quant.{self._number}.{self._beginnings}.{purpose}"

    def _allgather(self, values: torch.Tensor, name: str) -> Collective:
        return Collective(hvd.allgather_async(values, name=name, process_set=self._process_set))

    # --- beginnings -------------------------------------------------------------------------------------

    @property
    def proposed(self) -> bool:
        """Whether this rank has proposed a beginning, and does not know yet what the others have."""
        return self._proposal is not None

    @property
    def resets(self) -> int:
        """Beginnings before the present one."""
        return self._beginnings - (not self.proposed)

    def propose(self, fingerprint: int, host: int, progress: Sequence[int]) -> None:
        """Tell the others what this rank has, or wait on, if they have not yet come to a new beginning.

        Args:
            fingerprint: of what must be the same.
            host: a number that ranks of the same host have in common.
            progress: how far it has come, as many int64 on every rank.
        """
        self._rounds, self.slots = 0, []
        if not self.proposed:
            told = torch.tensor([[fingerprint, self._beginnings, host, *progress]])
            self._proposal = self._allgather(told, f"hvd_quant.{self._number}.agreement")
        else:
            submit_as_many(1, 0)  # the others, whose former ones have been answered, submit one

    def agree(self) -> bool | None:
        """Begin, if all have made their proposals.

        Returns:
            Whether all have the same; None while some have not told.

        Raises:
            HorovodInternalError: a rank has died, or shut Horovod down.
        """
        if not self._proposal.poll():
            return None
        proposal, self._proposal = self._proposal, None
        told = proposal.fetch()
        self._beginnings = int(told[:, 1].max()) + 1
        self.topology = Topology(told[:, 2].tolist())
        self.progress = told[:, 3:].tolist()
        # Questions that have been answered since they were asked in vain were not for the new beginning. No
        # rank has asked one of these yet: that takes something from this rank that is not sent before.
        for key, asked in list(_unanswered.items()):
            if key[0] == self._process_set.process_set_id and asked.poll():
                abandon(_unanswered.pop(key))
        forget_abandoned()
        return bool((told[:, 0] == told[0, 0]).all())

    def drop_proposal(self) -> None:
        """Forget a proposal that all have answered by now: that was for the former beginning.

        One that they have still to answer is for the new one. To be called before any of them can propose
        that.
        """
        try:
            if self.proposed:
                self.agree()
        except (hvd.HorovodInternalError, ValueError):  # ValueError after hvd.shutdown
            self._proposal = None

    # --- rounds -----------------------------------------------------------------------------------------

    def announce(self, sent: bytes, completed: Sequence[int] = (), skipped: int = 0) -> None:
        """Tell the others about a round.

        Args:
            sent: a digest of what this rank has sent in it, 8 bytes.
            completed: after how many gradients a fused bucket was complete, in ascending order.
            skipped: slots in which none was.
        """
        row = [int.from_bytes(sent, "little", signed=True), skipped, len(completed), *completed]
        self._announcements.append(self._allgather(torch.tensor(row), self.name(f"round.{self._rounds}")))
        self._rounds += 1

    @property
    def settled(self) -> bool:
        """Whether all rounds of this rank are known to have been the same on all ranks."""
        return not self._announcements and self._failure is None

    def all_announced(self) -> bool:
        """Whether all ranks have announced all rounds that this one has.

        Raises:
            RoundLeft: some have announced NOTHING.
            RoundMismatch: they have not sent the same.
        """
        while self._failure is None and self._announcements and self._announcements[0].poll():
            self._failure = self._compare(self._announcements.pop(0).fetch().tolist())
        if self._failure is not None:
            raise self._failure
        return not self._announcements

    def _compare(self, told: list[int]) -> RoundMismatch | None:
        """What is wrong with a round, by what all ranks have announced; else, have the next one follow it."""
        sent, skipped, completed = [], [], []
        while told:
            end = 3 + told[2]
            sent.append(told[0])
            skipped.append(told[1])
            completed.append(told[3:end])
            told = told[end:]
        if left := [rank for rank, one in enumerate(sent) if one == int.from_bytes(NOTHING, "little")]:
            return RoundLeft(
                f"rank{'s' if len(left) > 1 else ''} {', '.join(map(str, left))} left this step by the "
                "compressor's reset(), before asking for its result. Clear the optimizer on every rank, "
                "as reset() describes, and go on together."
            )
        if sent.count(sent[0]) != len(sent):
            return RoundMismatch("the ranks have not sent the same")
        self.slots = [max(one) for one in zip(*completed, strict=False)]  # as many as on every rank
        submit_as_many(max(skipped), skipped[self._process_set.rank()])
        return None

    def drop_announcements(self) -> None:
        """Let go of them; some may never be answered."""
        for announcement in self._announcements:
            abandon(announcement)
        self._announcements.clear()
        self._failure = None

    # --- questions --------------------------------------------------------------------------------------

    def ask(self, question: str, own: Any, meanwhile: Callable[[], object]) -> list[Any] | None:
        """What each rank answers to a question that they all ask each other.

        Args:
            question: a collective's name.
            own: this rank's answer, in terms of JSON.
            meanwhile: called again and again; the others may need it to come to the question.

        Returns:
            The answers in rank order; None if not all answer, because one has died, say. Ranks that have them
            go on with the same number of operations submitted, as what led to the question need not.
        """
        data = torch.frombuffer(bytearray(json.dumps(own).encode() + b"\n"), dtype=torch.uint8)
        try:
            answers, _ = self._ask(question, data, meanwhile)
            # What a rank has asked in vain before is an answer, too, but that rank is not here to confirm it.
            _, submitted = self._ask(f"{question}.confirm", data[:1])
            counts, _ = self._ask(f"{question}.count", torch.tensor([submitted]))
        except (hvd.HorovodInternalError, ValueError, TimeoutError):  # ValueError after hvd.shutdown
            return None
        if counts.min() > 0:
            submit_as_many(int(counts.max()), submitted)
        return [json.loads(line) for line in bytes(answers.numpy()).decode().splitlines()]

    def _ask(
        self, question: str, data: torch.Tensor, meanwhile: Callable[[], object] = lambda: None
    ) -> tuple[torch.Tensor, int]:
        """What all ranks answer; and how many operations this one had submitted then, 0 if it is unknown."""

        def answered() -> bool:
            meanwhile()
            return asked.poll()

        # One that was asked in vain still has the name: who asks now answers that.
        key = (self._process_set.process_set_id, question)
        asked, submitted = _unanswered.get(key), 0
        if asked is None or asked.lost:
            asked = _unanswered[key] = self._allgather(data, question)
            submitted = asked.handle or 0
        if not wait_for(answered):
            raise TimeoutError
        _unanswered.pop(key, None)
        return asked.fetch(), submitted
