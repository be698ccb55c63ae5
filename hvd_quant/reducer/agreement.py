"""Agreement of the ranks before they exchange gradients, and questions when they differ."""

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


def agree(received: Sequence[tuple[Description, Hashable]]) -> Topology:
    """Compare what all ranks have sent in one collective: their configurations and their hosts.

    Raises:
        RankMismatchError: their configurations differ.
    """
    configs, hosts = zip(*received, strict=True)
    if differences(configs):
        raise RankMismatchError(explain_mismatch(configs, [{}], [[]]))
    return Topology(hosts)


class Agreement:
    """The ranks that exchange a compressor's gradients.

    With their first gradient, and with the first one after every reset, they begin a *generation*. Each sends
    a fingerprint of its configuration, the number of generations that it knows, so that all continue from the
    same number, and its position, which may differ.

    Args:
        number: number of the compressor in its process.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.transport: CountedTransport | None = None  # transport of the last generation
        self._generations = 0
        self._proposal: Handle | None = None  # until all ranks have proposed
        self.positions: list[list[int]] = []  # by rank, at the beginning of the generation
        self.topology: Topology | None = None  # known from the first generation on

    def name(self, purpose: str) -> str:
        """Return the name of a collective.

        It contains the generation, because abandoned ones may still be in flight.
        """
        return f"hvd_quant.{self.number}.{self._generations}.{purpose}"

    def start_again(self, number: int) -> None:
        """Drop a proposal that was made to other ranks than those that there are now."""
        self.number = number
        self._proposal = self.topology = None

    # --- generations ------------------------------------------------------------------------------------

    @property
    def proposed(self) -> bool:
        """Whether this rank has proposed a generation, and does not know yet what the others propose."""
        return self._proposal is not None

    @property
    def resets(self) -> int:
        """Number of generations before the present one."""
        return self._generations - (not self.proposed)

    def propose(
        self, transport: CountedTransport, fingerprint: int, host: int, position: Sequence[int]
    ) -> None:
        """Propose a generation to the others, or join it, if they have not begun one yet.

        Args:
            transport: transport between the ranks, in this generation.
            fingerprint: hash of what must be the same.
            host: a number that ranks of the same host have in common.
            position: training position, equally many int64 on every rank.
        """
        self.transport = transport
        if not self.proposed:
            proposal = np.array([fingerprint, self._generations, host, *position], np.int64).view(np.uint8)
            name = f"hvd_quant.{self.number}.agreement"
            self._proposal = transport.allgather(proposal, [proposal.size] * transport.size, name)
        else:
            transport.level(1, 0)  # the others, whose last ones have been answered, submit one

    def agree(self) -> bool | None:
        """Begin the generation, if all have proposed.

        Returns:
            Whether all have the same fingerprint; None if some have not proposed yet.

        Raises:
            Exception: one of the transport's ``errors``, for example if a rank has died.
            RankMismatchError: the ranks use different formats.
        """
        if not self._proposal.ready():
            return None
        proposal, self._proposal = self._proposal, None
        received = [part.view(np.int64) for part in proposal.wait()]
        if not all(map(len, received)):
            raise RankMismatchError("the ranks run different versions of hvd_quant: install the same on all")
        self._generations = max(int(one[1]) for one in received) + 1
        self.topology = Topology([int(one[2]) for one in received])
        self.positions = [one[3:].tolist() for one in received]
        # Questions that were unanswered, and have been answered since, belong to the last generation. No rank
        # has asked one of the new generation yet: that needs something from this rank that it has not sent.
        unanswered = self.transport.unanswered
        for question, asked in list(unanswered.items()):
            if asked.ready():
                unanswered.pop(question).abandon()
        self.transport.forget_abandoned()
        return all(one[0] == received[0][0] for one in received)

    def drop_proposal(self) -> None:
        """Drop a proposal that all have answered by now: it was for the last generation.

        An unanswered one is for the new generation. Call this before any rank can propose that.
        """
        if not self.proposed:
            return
        try:
            self.agree()
        except (*self.transport.errors, RankMismatchError):
            self._proposal = None

    # --- questions --------------------------------------------------------------------------------------

    def ask(self, question: str, own: Any, meanwhile: Callable[[], object]) -> list[Any] | None:
        """Ask all ranks a question that they all ask each other, and return their answers.

        Args:
            question: name of the collective.
            own: this rank's answer, a JSON value.
            meanwhile: called repeatedly; the others may need it to get to the question.

        Returns:
            The answers in rank order; None if not all answer, for example because one has died. Ranks that
            have them continue with the same number of submitted operations, though they may have differed
            before.
        """
        try:
            answers, _ = self._ask(question, own, meanwhile)
            # An unanswered question of an absent rank counts as an answer, but that rank is not here to
            # confirm it.
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
        """Return all answers, and how many operations this rank had submitted, 0 if that is unknown.

        Raises:
            TimeoutError: they do not all answer.
        """

        def answered() -> bool:
            meanwhile()
            return asked.ready()

        # An unanswered question still has the name: asking again means waiting for it.
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
