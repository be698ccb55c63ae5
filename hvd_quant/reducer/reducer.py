"""The sequence that every gradient goes through: submitted, sent, announced, received.

A front end calls `begin` before the first gradient of a generation, then `submit` for each, and `finish` for
each result. The ranks agree on their configuration before anything is sent, and on what they have sent before
any result is used.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from hvd_quant.exchange.choice import ExchangeChoice
from hvd_quant.exchange.layout import Entry
from hvd_quant.exchange.transport import CountedTransport
from hvd_quant.reducer import control_tensor
from hvd_quant.reducer.agreement import Agreement
from hvd_quant.reducer.errors import (
    Description,
    RankMismatchError,
    UnsupportedReductionError,
    explain_mismatch,
)
from hvd_quant.reducer.gradient import DTYPES, Gradient, Parameter, State
from hvd_quant.reducer.in_flight import BucketsInFlight
from hvd_quant.reducer.options import Options
from hvd_quant.reducer.polling import pause, wait_for
from hvd_quant.reducer.rounds import RoundLeft, Rounds
from hvd_quant.reducer.stall import enumeration
from hvd_quant.reducer.state import TrainingState

_IDLE, _ABANDONED = State.IDLE, State.ABANDONED  # looked up for every gradient


class Reducer:
    """Exchanges a compressor's gradients. Callers hold `lock`.

    Args:
        options: the user's options.
        state: state of the training.
        number: number of the compressor in its process.
    """

    def __init__(self, options: Options, state: TrainingState, number: int) -> None:
        self.lock = threading.RLock()  # autograd calls hooks from one thread per device
        self.state = state
        self.agreement = Agreement(number)
        self.known: dict[str, Gradient] = {}  # in this generation
        self.in_flight: dict[str, Gradient] = {}
        self._options = options
        self._rounds = Rounds(self.agreement)
        self._sending = BucketsInFlight(state, self.agreement, self._rounds, options.fusion_bytes)
        self._transport: CountedTransport | None = None  # set by the first gradient, and again after a reset
        self._choice: ExchangeChoice | None = None
        self._parameters: dict[str, list[Any]] = {}
        # Hooks of backward must not submit more operations on some ranks than on others. So they submit
        # nothing until the first result is requested, when all ranks are known to agree.
        self._held: list[Gradient] | None = None

    # --- called by front ends ---------------------------------------------------------------------------

    @property
    def has_begun(self) -> bool:
        """Whether the present generation has begun."""
        return self._transport is not None

    @property
    def rank(self) -> int:
        """Own rank in the present generation."""
        return self._transport.rank

    def begin(
        self,
        transport: CountedTransport,
        choice: ExchangeChoice,
        host: int,
        parameters: Mapping[str, Parameter] | None,
    ) -> None:
        """Begin a generation: lay out the parameters, and send a proposal to the other ranks.

        Args:
            transport: transport between the ranks.
            choice: chooses the exchange algorithm.
            host: a number that ranks of the same host have in common.
            parameters: parameters by name, in order; None if names are unknown.

        Raises:
            RankMismatchError: the ranks are configured differently.
            ValueError: the options need names, or do not fit the ranks' hosts.
        """
        if parameters is None and self._options.needs_names:
            raise ValueError(
                "error_feedback and overrides need the parameters' names: pass the compressor "
                "named_parameters=model.named_parameters(), or use hvd_quant.torch.DistributedOptimizer, "
                "which does so"
            )
        parameters = parameters or {}
        self._choice = choice
        self._parameters = {name: parameter.describe() for name, parameter in parameters.items()}
        # Their order is part of it, because it is that of the fused buckets.
        own = control_tensor.fingerprint({**self.config(), "parameters": list(self._parameters.items())})
        self.agreement.propose(transport, own, host, self.state.position())
        self._rounds.begin(transport)
        # Frozen ones in buckets of their own: they may be trained later.
        expected = [self._entries(parameters, trained=trained) for trained in (True, False)]
        self._sending.begin(transport, choice, expected)
        self._transport, self._held = transport, []
        # If some rank does not run this code, or comes late, nobody answers. Then Horovod still reduces the
        # control tensors, which show whether that rank is configured differently, too.
        wait_for(lambda: self._agreed(ask=True))

    def _entries(self, parameters: Mapping[str, Parameter], *, trained: bool) -> list[Entry]:
        """Return the entries that will be exchanged, in about the order in which backward computes them."""
        entries = []
        for name, one in reversed(parameters.items()):
            if one.trained == trained and one.dtype in DTYPES:
                scheme = self.scheme_of(name, one.count)
                if scheme is not None:
                    entries.append(Entry(name, one.count, one.dtype, scheme, one.device))
        return entries

    def scheme_of(self, name: str | None, count: int) -> Any:
        """Return the scheme of a gradient in this step; None if it is not quantized."""
        return self._options.scheme_of(name, count, self.state.present_scheme)

    def count(self) -> None:
        """Count a gradient, or several that are reduced by one operation."""
        slots = self._rounds.slots
        slots.gradients += 1
        if slots.gradients == 1 and not self._rounds.settled:
            # With other slots than the others, this rank would submit more operations than they, or fewer.
            # An exception here is raised again when a result is requested.
            with contextlib.suppress(ValueError, *self.agreement.transport.errors):
                self._wait_for_announcements()

    def _wait_for_announcements(self) -> None:
        """Wait until all ranks have announced the last round: they do so before all else, however late."""
        while not self._rounds.all_announced():
            pause()

    @contextlib.contextmanager
    def joined(self) -> Iterator[Callable[[], bool]]:
        """Have this rank announce that it has no more data.

        Yields:
            Returns whether all ranks have done so in the last round. Raises RuntimeError if there was none.
        """

        def all_have() -> bool:
            if not self.has_begun or self._rounds.number == 0:
                raise RuntimeError(
                    "ranks tell each other that they have joined when they exchange quantized gradients, and "
                    "none was quantized: lower min_numel, or give every rank equally many steps"
                )
            self._wait_for_announcements()
            return self._rounds.all_joined

        self._rounds.joined = True
        try:
            yield all_have
        finally:
            self._rounds.joined = False

    def submit(self, gradient: Gradient, tensor: Any) -> None:
        """Submit a gradient to the exchange.

        Args:
            gradient: the gradient.
            tensor: its values, of the front end's type.

        Raises:
            RuntimeError: it is already in flight.
        """
        key = gradient.entry.key
        if key in self.in_flight:
            raise RuntimeError(
                f"gradient {key!r} was submitted again while it is in flight. If a step was left between "
                "backward and step, call the compressor's reset() first, on every rank."
            )
        self.in_flight[key] = gradient
        gradient.hold(tensor)
        if self._held is not None:
            gradient.waits_as = State.SUBMITTED
            self._held.append(gradient)
        else:
            self._sending.add(gradient)

    def fill_slots(self) -> None:
        """Submit as many messages as all ranks do after this many gradients.

        If none is ready, because this rank has other gradients than others, or in another order, it submits
        an operation that only counts.
        """
        slots = self._rounds.slots
        while slots.take():
            if not self._sending.send_next():
                slots.skipped += 1
                self._transport.level(1, 0)

    def finish(self, gradient: Gradient, reduced: list[float]) -> None:
        """Wait for a gradient's result.

        Args:
            gradient: a gradient that was submitted.
            reduced: its reduced control tensor.

        Raises:
            RankMismatchError: the ranks are configured differently, disagree about what they sent, or some
                have called `reset`.
            UnsupportedReductionError: Horovod was asked for Adasum, Min, Max or Product.
            RuntimeError: `reset` was called since the gradient was submitted.
        """
        if gradient.waits_as is _ABANDONED:
            raise RuntimeError(
                f"reset() was called while gradient {gradient.key!r} was in flight: clear the optimizer's "
                "state too, by optimizer.load_state_dict(optimizer.state_dict())"
            )
        sending = self._sending
        try:
            if self._held is not None:
                self._send_held(gradient, reduced)
            if sending.in_round:
                sending.end_round()
            factor = gradient.control.factor(reduced, self._transport.size)
            if sending.announced:
                sending.receive_round(factor)
        except control_tensor.FingerprintMismatch:
            raise self._mismatch([gradient]) from None
        except RoundLeft as error:
            self.clear()
            raise RankMismatchError(str(error)) from None
        except ValueError as error:
            announced = [one for sent in sending.announced for one in sent.gradients]
            raise self._mismatch(announced) from error
        except UnsupportedReductionError:
            self._go_on_for_others()
            self.clear()
            raise
        if factor != gradient.sent.factor:
            sending.decode_again(gradient, factor)
        del self.in_flight[gradient.entry.key]
        gradient.waits_as, gradient.sent = _IDLE, None
        if self.state.schedule is not None:
            self.state.note_square(reduced[control_tensor.SQUARE] / factor)
            if not self.in_flight:
                self.state.end_step()

    def reset(self) -> None:
        """Drop what is in flight, and announce that to the others, who may wait for it."""
        self.agreement.drop_proposal()  # if all have answered it, there is a round to leave
        if self._sending.announced:
            self._go_on_for_others()
        elif (self._rounds.slots.gradients or self.in_flight) and not self.agreement.proposed:
            with contextlib.suppress(ValueError, *self.agreement.transport.errors):
                self._rounds.leave()
        self.clear()

    def start_again(self, number: int) -> None:
        """Begin anew among other ranks: nothing that is in flight will arrive.

        Args:
            number: number of the compressor among them.
        """
        self.agreement.start_again(number)
        self.clear()

    def clear(self) -> None:
        """Drop what is in flight. The next gradient begins a new generation."""
        for gradient in self.in_flight.values():
            gradient.waits_as, gradient.sent = _ABANDONED, None
            gradient.release()
        self.in_flight.clear()
        self.known.clear()
        self._held = None
        self.state.forget_step()
        self._sending.clear()
        self._rounds.drop()
        self._transport = None

    # --- agreement --------------------------------------------------------------------------------------

    def config(self) -> Description:
        """Describe what must be the same on all ranks."""
        return {
            **self._options.describe(self._choice.link),
            "compressor": self.agreement.number,
        }

    def fingerprint(self, description: Description) -> int:
        """Return the fingerprint of a gradient's control tensor."""
        return control_tensor.fingerprint({**self.config(), "resets": self.agreement.resets, **description})

    def _state(self) -> Description:
        """Describe the configuration, and what may come to differ later."""
        return {
            **self.config(),
            "schedule": self.state.schedule_state(),
            "resets": self.agreement.resets,
        }

    def _agreed(self, *, ask: bool = False) -> bool:
        """Return whether all ranks have proposed the same.

        Args:
            ask: ask what the difference is, if there is one. Otherwise, for example if this rank has
                continued because another was late, all find out by what they reduce.
        """
        if not self.agreement.proposed:
            return True
        try:
            same = self.agreement.agree()
            if same is None:
                return False
            if not same and ask:
                message = self._explain(self.agreement.name("disagreement"), [], self._state())
                if message is not None:
                    raise RankMismatchError(message)
            self._choice.locate(self.agreement.topology)
        except Exception:
            self.clear()
            raise
        if same:
            self.state.catch_up(self.agreement.positions)
            for gradient in self._held or ():  # their scheme may have changed
                scheme = self.scheme_of(gradient.key if gradient.named else None, gradient.entry.count)
                gradient.entry = replace(gradient.entry, scheme=scheme)
        return True

    def _send_held(self, gradient: Gradient, reduced: list[float]) -> None:
        """Send what has been held: all ranks have submitted this gradient, and their proposals before it."""

        def agreed() -> bool:
            if self._agreed():
                return True
            with contextlib.suppress(UnsupportedReductionError):
                gradient.control.factor(reduced, self._transport.size)  # ranks that differ need not agree
            return False

        if not wait_for(agreed):
            raise ValueError("not all ranks have reported their configuration")
        held, self._held = self._held, None
        for one in held:
            self._sending.add(one)
        self._rounds.slots.completed.clear()  # not in hooks

    def _mismatch(self, gradients: list[Gradient]) -> RankMismatchError:
        """Return the error for a difference that all ranks have noticed at these gradients."""
        descriptions = [one.description for one in gradients]
        state = self._state()
        self.agreement.drop_proposal()
        message = self._explain("hvd_quant.mismatch", descriptions, state)
        if message is None:
            self._go_on_for_others()
            message = (
                "the ranks are configured differently, or have sent different gradients, and did not all "
                f"answer when asked for theirs. This one has {state}, and noticed it at {descriptions}."
            )
        self.clear()
        return RankMismatchError(message)

    def _explain(self, question: str, gradients: list[Description], state: Description) -> str | None:
        """Ask all ranks for their state: None if not all answer, for example because one has died."""
        answers = self.agreement.ask(question, [state, self._parameters, gradients], self._sending.advance)
        return explain_mismatch(*zip(*answers, strict=True)) if answers else None

    def _go_on_for_others(self) -> None:
        """Advance exchanges to their last collectives, if the other ranks do: they may wait for these.

        And wait for all announcements, by which ranks level their counts of operations.
        """

        def there() -> bool:
            announced = self._rounds.all_announced()  # raises an exception if ranks have not sent the same
            return self._sending.advance() and announced

        with contextlib.suppress(ValueError, *self.agreement.transport.errors):
            wait_for(there)

    # --- for the stall check ----------------------------------------------------------------------------

    def describe_in_flight(self) -> str | None:
        """Describe the gradients in flight in a sentence; None if there are none.

        The stall check calls it from another thread while this one waits, so it takes no lock.
        """
        first = "Not all ranks have submitted their first gradient. " if self.agreement.proposed else ""
        if not (keys := list(self.in_flight)):
            return first or None
        state = (
            "results have been requested" if self._sending.announced else "no result has been requested yet"
        )
        return f"{first}Gradients in flight: {enumeration(keys)}; {state}."
