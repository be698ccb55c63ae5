"""Drive an exchange over a transport, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_quant.codec.message import Messages, in_rank_order
from hvd_quant.exchange.algorithms import Algorithm, BucketData, Encoded
from hvd_quant.exchange.transport import Buffer, Handle, Transport


class Exchange:
    """An exchange in flight; the constructor starts its first collective.

    Whatever arrives, it runs all of its stages, or another rank would wait forever.

    Args:
        data: gradients to exchange.
        algorithm: exchange algorithm.
        transport: transport between the ranks.
        name: the same on all ranks, and not in use by another exchange in flight.
    """

    def __init__(self, data: BucketData, algorithm: Algorithm, transport: Transport, name: str) -> None:
        self.data, self.algorithm, self.name = data, algorithm, name
        self.received_bytes = 0  # from other ranks
        self._transport = transport
        self._failure: ValueError | None = None
        self._encoded: Encoded = []
        self._stage = 0
        self._handle: Handle | None = self._start(*self.algorithm.stages[0].prepare(data, Messages(())))

    @property
    def stages_left(self) -> int:
        """Collectives still to be started."""
        return 0 if self._handle is None else len(self.algorithm.stages) - self._stage - 1

    def _start(self, message: Buffer, sizes: Sequence[int | None]) -> Handle:
        stage = self.algorithm.stages[self._stage]
        name = self.name if len(self.algorithm.stages) == 1 else f"{self.name}.{stage.name}"
        return getattr(self._transport, stage.collective)(message, sizes, name)

    def _next_stage(self) -> None:
        parts, rank = self._receive(), self.data.bucket.rank
        self._stage += 1
        try:
            message, sizes = self.algorithm.stages[self._stage].prepare(self.data, parts)
        except ValueError as error:
            self._failure = self._failure or error
            message, sizes = parts[rank][:0], [0] * len(parts)  # an empty message never passes for a mean
        try:
            self._handle = self._start(message, sizes)
        except ValueError as error:  # raised by the transport
            self._failure = self._failure or error

    def advance(self, *, wait: bool) -> bool:
        """Advance the exchange to its last collective, as far as possible without waiting, or with.

        Returns:
            Whether it is there.
        """
        while self.stages_left and (wait or self._handle.ready()):
            self._next_stage()
        return not self.stages_left

    def _receive(self) -> Messages:
        received = in_rank_order(self._handle.wait())
        self._handle = None
        self.received_bytes += sum(
            len(part) for rank, part in enumerate(received) if rank != self.data.bucket.rank
        )
        return received

    def finish(self, out: Sequence[Buffer], factor: float = 1.0) -> None:
        """Wait for the end, and write ``factor`` times the mean over the ranks. Can be called again.

        Args:
            out: output buffers, in the order of the bucket's entries.
            factor: multiplies the mean.

        Raises:
            ValueError: some rank has sent something unexpected.
        """
        self.advance(wait=True)
        if self._handle is not None:
            self._encoded = self.algorithm.encoded(self.data.bucket, self._receive())
        if self._failure is not None:
            raise self._failure
        for layout, messages in self._encoded:
            self.data.codec.decode_messages(messages, layout, out, factor)

    def ready(self) -> bool:
        """Return whether `finish` would not wait for another rank."""
        return self.advance(wait=False) and (self._handle is None or self._handle.ready())

    def abandon(self) -> None:
        """Abandon the exchange in its current stage."""
        if self._handle is not None:
            self._handle.abandon()
