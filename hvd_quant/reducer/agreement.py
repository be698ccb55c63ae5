"""What the ranks tell each other before they exchange gradients, and when they differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from hvd_quant.codec.message import framed, unframed
from hvd_quant.exchange.topology import Topology
from hvd_quant.exchange.transport import CountedTransport, Handle
from hvd_quant.reducer.errors import Description, RankMismatchError, differences, explain_mismatch
from hvd_quant.reducer.polling import wait_for


def agree(told: Sequence[tuple[Description, Hashable]]) -> Topology:
    """Compare what all ranks have told at once: their configurations and their hosts.

    Raises:
        RankMismatchError: their configurations differ.
    """
    configs, hosts = zip(*told, strict=True)
    if differences(configs):
        raise RankMismatchError(explain_mismatch(configs, [{}], [[]]))
    return Topology(hosts)


class Agreement:
    """The ranks that exchange a compressor's gradients.

    With their first gradient, and with the first one after every reset, they begin a *generation*: each tells
    a fingerprint of what it has, how many generations it knows of, so that all go on from the same number,
    and how far it has come, in which they may differ.

    Args:
        number: the compressor's, in its process.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.transport: CountedTransport | None = None  # of the last generation
        self._generations = 0
        self._proposal: Handle | None = None  # until all ranks have made theirs
        self.positions: list[list[int]] = []  # of every rank, when they began
        self.topology: Topology | None = None  # until they have

    def name(self, purpose: str) -> str:
        """The name of a collective.

        Generations are in it, because what was abandoned may still be in flight.
        """
        return f"hvd_quant.{self.number}.{self._generations}.{purpose}"

    # --- generations ------------------------------------------------------------------------------------

    @property
    def proposed(self) -> bool:
        """Whether this rank has proposed a generation, and does not know yet what the others have."""
        return self._proposal is not None

    @property
    def resets(self) -> int:
        """Generations before the present one."""
        return self._generations - (not self.proposed)

    def propose(
        self, transport: CountedTransport, fingerprint: int, host: int, position: Sequence[int]
    ) -> None:
        """Tell the others what this rank has, or wait on, if they have not yet come to a new generation.

        Args:
            transport: between the ranks, in this generation.
            fingerprint: of what must be the same.
            host: a number that ranks of the same host have in common.
            position: how far it has come, as many int64 on every rank.
        """
        self.transport = transport
        if not self.proposed:
            told = np.array([fingerprint, self._generations, host, *position], np.int64).view(np.uint8)
            name = f"hvd_quant.{self.number}.agreement"
            self._proposal = transport.allgather(told, [told.size] * transport.size, name)
        else:
            transport.level(1, 0)  # the others, whose former ones have been answered, submit one

    def agree(self) -> bool | None:
        """Begin, if all have made their proposals.

        Returns:
            Whether all have the same; None while some have not told.

        Raises:
            Exception: one of the transport's ``errors``, where a rank has died, say.
            RankMismatchError: the ranks have told in different formats.
        """
        if not self._proposal.ready():
            return None
        proposal, self._proposal = self._proposal, None
        told = [part.view(np.int64) for part in proposal.wait()]
        if not all(map(len, told)):
            raise RankMismatchError("the ranks run different versions of hvd_quant: install the same on all")
        self._generations = max(int(one[1]) for one in told) + 1
        self.topology = Topology([int(one[2]) for one in told])
        self.positions = [one[3:].tolist() for one in told]
        # Questions that have been answered since they were asked in vain were not for the new generation. No
        # rank has asked one of these yet: that takes something from this rank that is not sent before.
        unanswered = self.transport.unanswered
        for question, asked in list(unanswered.items()):
            if asked.ready():
                unanswered.pop(question).abandon()
        self.transport.forget_abandoned()
        return all(one[0] == told[0][0] for one in told)

    def drop_proposal(self) -> None:
        """Forget a proposal that all have answered by now: that was for the former generation.

        One that they have still to answer is for the new one. To be called before any of them can propose
        that.
        """
        if not self.proposed:
            return
        try:
            self.agree()
        except (*self.transport.errors, RankMismatchError):
            self._proposal = None

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
        try:
            answers, _ = self._ask(question, own, meanwhile)
            # What a rank has asked in vain before is an answer, too, but that rank is not here to confirm it.
            _, submitted = self._ask(f"{question}.confirm", None)
            counts, _ = self._ask(f"{question}.count", submitted)
        except (*self.transport.errors, ValueError, TimeoutError):
            return None
        if min(counts) > 0:
            self.transport.level(max(counts), submitted)
        return answers

    def _ask(
        self, question: str, own: Any, meanwhile: Callable[[], object] = lambda: None
    ) -> tuple[list[Any], int]:
        """What all ranks answer; and how many operations this one had submitted then, 0 if it is unknown.

        Raises:
            TimeoutError: they do not all answer.
        """

        def answered() -> bool:
            meanwhile()
            return asked.ready()

        # One that was asked in vain still has the name: who asks now answers that.
        asked, submitted = self.transport.unanswered.get(question), 0
        if asked is None:
            message = framed(json.dumps(own).encode())
            asked = self.transport.allgather(message, [None] * self.transport.size, question)
            self.transport.unanswered[question] = asked
            submitted = self.transport.count(asked)
        if not wait_for(answered):
            raise TimeoutError
        self.transport.unanswered.pop(question, None)
        return [json.loads(unframed(part)[0]) for part in asked.wait()], submitted
