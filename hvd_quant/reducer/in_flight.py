"""Fused buckets in flight: from submitted gradients to their means."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hvd_quant.exchange.algorithms import ALGORITHMS, BucketData
from hvd_quant.exchange.choice import ExchangeChoice
from hvd_quant.exchange.driver import Exchange
from hvd_quant.exchange.fusion import Fusion, FusionGroup
from hvd_quant.exchange.layout import Entry, GroupLayout, digest
from hvd_quant.exchange.transport import CountedTransport
from hvd_quant.reducer import control_tensor, polling
from hvd_quant.reducer.agreement import Agreement
from hvd_quant.reducer.gradient import Gradient, State
from hvd_quant.reducer.rounds import Rounds
from hvd_quant.reducer.state import TrainingState

_GROUPED = State.GROUPED  # looked up for every gradient


@dataclass(slots=True)
class SentBucket:
    """Gradients that were sent in one bucket."""

    exchange: Exchange
    gradients: list[Gradient]
    state: State = State.SENT
    factor: float | None = None  # that the results have been multiplied by, once they are there


class BucketsInFlight:
    """Sends the gradients of a rank, as soon as their fused buckets are complete and there is a slot.

    Args:
        state: state of the training.
        agreement: agreement between the ranks.
        rounds: rounds of this rank.
        fusion_bytes: size of a fused bucket.
    """

    def __init__(
        self,
        state: TrainingState,
        agreement: Agreement,
        rounds: Rounds,
        fusion_bytes: int,
    ) -> None:
        self._state, self._agreement, self._rounds = state, agreement, rounds
        self._transport: CountedTransport | None = None
        self._choice: ExchangeChoice | None = None
        self._fusion: Fusion[Gradient] = Fusion(fusion_bytes)
        self._ready: deque[tuple[FusionGroup[Gradient], list[Gradient]]] = deque()  # for the next slots
        self._underway: list[Exchange] = []  # not yet at their last collective
        # A round is what this rank sends until it requests a result. Rounds must be the same on all ranks.
        self._sent: list[SentBucket] = []  # in this round
        self.in_round = False  # whether gradients have come since the last round
        self.announced: list[SentBucket] = []  # in the round of which the results are waited for

    def begin(
        self, transport: CountedTransport, choice: ExchangeChoice, expected: Sequence[Sequence[Entry]]
    ) -> None:
        """Begin a generation.

        Args:
            transport: transport between the ranks.
            choice: chooses the exchange algorithm.
            expected: gradients that will come, in lists that are fused separately.
        """
        self._transport, self._choice = transport, choice
        for entries in expected:
            self._fusion.plan(entries)

    def add(self, gradient: Gradient) -> None:
        """Add a gradient, to be sent in the next slot after its fused bucket is complete."""
        gradient.use = self._state.use(gradient.entry.key)
        gradient.waits_as, self.in_round = _GROUPED, True
        if (ready := self._fusion.add(gradient)) is not None:
            self._ready.append(ready)
            self._rounds.slots.completed.append(self._rounds.slots.gradients)

    def send_next(self) -> bool:
        """Send a fused bucket, if one is ready; returns whether there was one."""
        if self._ready:
            self._send(*self._ready.popleft())
            return True
        return False

    def end_round(self) -> None:
        """Send and announce everything submitted: nothing more will be before a result is used.

        If the ranks have not sent the same, some of it will never arrive, and those who wait must learn it.
        """
        self._ready.extend(self._fusion.flush())
        while self.send_next():
            pass
        self.announced, self._sent, self.in_round = self._sent, [], False
        exchanges = [sent.exchange for sent in self.announced]
        # Sorted, because gradients, and with them fused buckets, may come in another order on other ranks.
        rows = sorted((one.name, one.algorithm.name, one.data.bucket.digest.hex()) for one in exchanges)
        self._rounds.announce(digest(rows))
        for sent in self.announced:
            sent.state = State.ANNOUNCED

    def _send(self, group: FusionGroup[Gradient], gradients: list[Gradient]) -> None:
        """Encode a fused bucket and start its exchange."""
        bucket = self._bucket(group)
        first = gradients[0]
        first.before_reading(gradients)
        values = [gradient.values() for gradient in gradients]
        residuals = []
        if (kept := self._state.residuals) is not None:
            pairs = zip(bucket.entries, values, strict=True)
            residuals = [kept.of(entry.key, entry.count, like) for entry, like in pairs]
        uses = np.array([gradient.use for gradient in gradients], np.uint64)
        data = BucketData(bucket, values, uses, first.codec, residuals, bucket.buffers)
        algorithm = ALGORITHMS[self._choice.algorithm(bucket.whole.size, bucket.whole.count)]
        # Horovod remembers collectives by their names, and then does not notice that a rank has called
        # hvd.join(): it crashes. Numbered ones are new to it, and it refuses them.
        name = self._agreement.name(f"{group.name}.{group.times_sent}")
        sent = SentBucket(Exchange(data, algorithm, self._transport, name), gradients)
        statistics = self._state.statistics
        statistics.messages += 1
        statistics.raw_bytes += group.nbytes
        statistics.wire_bytes += control_tensor.NBYTES * len(gradients)
        for gradient in gradients:
            gradient.sent = sent
        self._underway.append(sent.exchange)
        self._sent.append(sent)

    def _bucket(self, group: FusionGroup[Gradient]) -> GroupLayout:
        # Process sets side by side must not share their noise.
        seed = (self._state.seed, self._transport.ranks)
        return group.bucket(self._transport.size, self._transport.rank, seed, self._choice.topology)

    # --- what is in flight ------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Advance exchanges without waiting; returns whether all are at their last collective.

        All of them side by side: they may have started in another order on every rank, and one's second
        collective may wait for a rank that waits for another's. Not in hooks of backward, where the number of
        operations that this rank submits would depend on the others' progress. And on a GPU, the work between
        an exchange's collectives waits for backward.
        """
        self._underway = [exchange for exchange in self._underway if not exchange.advance(wait=False)]
        return not self._underway

    def receive_round(self, factor: float) -> None:
        """Write the means of everything that the round has sent, as it arrives.

        No result is used before the ranks are known to have sent the same: a rank that found nothing wrong
        would continue, and wait for others that have stopped.

        Args:
            factor: factor of the first gradient whose result was requested; nearly always that of all.

        Raises:
            RoundMismatch, ValueError: they have not sent the same.
        """
        # Advance to their last collectives first, in the order in which Horovod executes them.
        self._wait(self.advance)
        statistics = self._state.statistics
        for sent in self.announced:
            exchange = sent.exchange
            self._wait(exchange.ready)
            pairs = zip(sent.gradients, exchange.data.values, strict=True)
            exchange.finish([gradient.out(values) for gradient, values in pairs], factor)
            statistics.received_bytes += exchange.received_bytes
            statistics.wire_bytes += exchange.data.encoded_bytes
            sent.factor = factor
            sent.state = State.RECEIVED
        # All results are there, but some rank may wait for more. Or it has not come so far, and waits for us
        # elsewhere: then what it says is looked at in the next round.
        polling.wait_for(self._rounds.all_announced)
        self.announced = []

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._rounds.all_announced()
            polling.pause()

    @staticmethod
    def decode_again(gradient: Gradient, factor: float) -> None:
        """Decode the mean of a gradient again whose factor differs from that of its bucket."""
        sent = gradient.sent
        results = [one.scratch() for one in sent.gradients]
        out = [one.buffer_of(result) for one, result in zip(sent.gradients, results, strict=True)]
        sent.exchange.finish(out, factor)
        gradient.replace_result(results[sent.gradients.index(gradient)])

    def clear(self) -> None:
        """Drop what is in flight."""
        for sent in (*self._sent, *self.announced):
            sent.exchange.abandon()
        self._ready.clear()
        self._underway.clear()
        self._sent.clear()
        self.announced, self.in_round = [], False
        self._fusion = Fusion(self._fusion.fusion_bytes)
