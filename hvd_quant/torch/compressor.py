"""Compressors for ``hvd.DistributedOptimizer(compression=...)``.

Horovod calls ``compress``, allreduces what that returns, and calls ``decompress`` on the result. Quantized
codes cannot be allreduced, so ``compress`` hands the gradient to an exchange of its own and gives Horovod a
control tensor to reduce (see `hvd_quant.exchange.control`); ``decompress`` checks that tensor, waits for the
exchange, and returns the decoded mean.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.torch import mpi_ops
from horovod.torch.compression import Compressor

from hvd_quant.codec import cuda, native, torch_ops
from hvd_quant.exchange import control, cost
from hvd_quant.exchange.algorithms import Exchange, Work
from hvd_quant.exchange.fused import Entry, FusedBucket, Fusion, Group, digest
from hvd_quant.overrides import Overrides
from hvd_quant.plug import (
    FUSION_BYTES,
    CompressorMethod,
    DQSGDArguments,
    NUQSGDArguments,
    Options,
    QSGDArguments,
)
from hvd_quant.schedule import BitSchedule
from hvd_quant.schemes import DQSGD, Scheme, check_integer
from hvd_quant.stall import enumeration
from hvd_quant.torch import stall
from hvd_quant.torch.gradient import (
    DTYPES,
    Known,
    Pending,
    Shipment,
    is_plain,
    values_of,
    wait_for_streams,
)
from hvd_quant.torch.identity import ParameterNames
from hvd_quant.torch.ranks import NOTHING, Ranks, RoundLeft, wait_for
from hvd_quant.torch.transport import POLL_SECONDS, HorovodTransport, submit_as_many


class QuantizedCompressor(Options, Compressor):
    """The exchange of quantized gradients; use a subclass that names a scheme, such as `QSGDCompressor`.

    Args:
        scheme: how gradients are quantized.
        named_parameters: ``model.named_parameters()``. Without it a gradient is known by its place in the
            order of arrival, which all ranks must share; a disagreement is detected and is an error.
            `hvd_quant.torch.DistributedOptimizer` passes it by itself.
        min_numel: gradients of fewer values are left to Horovod, uncompressed.
        exchange: ``"allgather"``, every rank gets all payloads; ``"scatter_allgather"``, every rank averages
            a part and sends that to all, which is less to receive from three ranks on, for a second
            rounding; ``"hierarchical"``, the ranks of a host average their gradients as they are, and the
            hosts exchange these means; ``"auto"``, what `hvd_quant.exchange.cost` takes for the quickest.
        error_feedback: whether each rank keeps, for every parameter, what quantization has lost of its
            gradients, and adds it to the next one (Karimireddy et al., ICML 2019). It takes a float32 a value
            of memory, and needs the parameters' names. Schemes in ``overrides`` keep the rounding that they
            have; in a file, they have the compressor's unless they name another.
        fusion_bytes: gradients travel together in fused buckets of about so many bytes (before they are
            encoded). A bucket is sent when its last gradient is there. 0 sends every gradient alone.
        overrides: which parameters are quantized otherwise, or not at all: a mapping of shell patterns on
            their names to schemes or None, such as ``{"*.bias": None, "embed.*": QSGD(bits=8)}``, or the path
            of a YAML or TOML file with one; see `hvd_quant.overrides.Overrides`. The first pattern that
            matches holds. ``min_numel`` holds for all. It needs the parameters' names.
        process_set: the ranks that take part; give the optimizer the same.
        seed: of the rounding noise, 0 to 2^64 - 1. Each rank draws its own noise from it. For
            ``rounding="correlated"`` all ranks need the same one.

    Raises:
        TypeError, ValueError: an argument is not of its type, or not in its range.
    """

    def __init__(
        self,
        scheme: Scheme | DQSGD,
        *,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        min_numel: int = 1024,
        exchange: str = "auto",
        error_feedback: bool = False,
        fusion_bytes: int = FUSION_BYTES,
        overrides: Mapping[str, Scheme | None] | str | os.PathLike | None = None,
        process_set: hvd.ProcessSet = hvd.global_process_set,
        seed: int = 0,
    ) -> None:
        cuda.check_switch()
        self._overrides = Overrides(overrides, scheme.rounding)
        super().__init__(
            scheme,
            [other for _, other in self._overrides if other is not None],
            min_numel=min_numel,
            exchange=exchange,
            error_feedback=error_feedback,
            fusion_bytes=fusion_bytes,
            process_set=process_set,
            seed=seed,
        )
        self._lock = threading.RLock()  # autograd calls hooks from a thread for every device
        self._names: ParameterNames | None = None
        self._ranks = Ranks(process_set, self._number)
        self._transport: HorovodTransport | None = None  # until there is a gradient, and again after reset
        self._fusion = Fusion(self.fusion_bytes)
        self._known: dict[str, Known] = {}
        self._watching = False  # autograd's order, for sparse gradients
        self._uses: Counter[str] = Counter()  # how often each key came; part of the noise's key
        self._least_use = 0  # what every key has come, at least
        # Of error feedback: by parameter, what has not been sent of its gradients, flat.
        self._residuals: dict[str, torch.Tensor] = {}
        self._places = 0  # taken since nothing was on its way
        # Hooks of backward must not submit more operations on some ranks than on others. So until a first
        # result is asked for, when all ranks are known to agree, they submit nothing. Later, how many they
        # have submitted is a function of how many gradients have come, whatever these are: slots, which the
        # ranks agree on from round to round, and in each of which there is one message, or none.
        self._holding = False
        self._unsent: list[Pending] = []
        self._pending: dict[str, Pending] = {}
        self._underway: list[Exchange] = []  # not yet at their last collective
        self._gradients = 0  # that have come in this round, those that Horovod reduces itself included
        self._ready: deque[Group] = deque()  # complete fused buckets, to be sent in the next slot
        self._completed: list[int] = []  # of fused buckets of this round: after how many gradients
        self._slots_used = self._slots_skipped = 0
        # What this rank sends until it asks for a result is a round. All ranks' rounds must be the same.
        self._sent: list[Shipment] = []  # in this round
        self._announced: list[Shipment] = []  # in the round of which the results are waited for
        # DQ-SGD: a step ends when nothing is on its way.
        self._schedule = BitSchedule(scheme) if isinstance(scheme, DQSGD) else None
        self._present_scheme = scheme.at(self._schedule.bits) if self._schedule is not None else scheme
        self._squares: list[float] = []  # squared norms of the gradients that have come back in this step
        self._bits: list[int] = []  # of each step
        self._raw_bytes = 0
        self._wire_bytes = 0
        self._received_bytes = 0
        self._messages = 0
        if named_parameters is not None:
            self.bind(named_parameters)
        stall.watch(self)

    def bind(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Tell the compressor the parameters' names, once.

        Raises:
            ValueError: it knows others already, these are no unique names and parameters, or residuals of a
                loaded state do not fit them.
        """
        names = ParameterNames(named_parameters)
        if self._names is not None and self._names != names:
            raise ValueError(
                "this compressor has been given other named_parameters before. A compressor serves one "
                "optimizer: make another one for another optimizer."
            )
        if self._names is None:
            for pattern in self._overrides.unused(name for name, _ in names.named_parameters()):
                warnings.warn(
                    f"the override of {pattern!r} holds for no parameter: no name matches it, or all that do "
                    "match an earlier pattern",
                    stacklevel=3,
                )
            self._check_residuals(self._residuals, names)  # of a state that was loaded before
            self._names = names
            names.watch()
            self._watching = True

    @property
    def bound(self) -> bool:
        """Whether the compressor knows the parameters' names."""
        return self._names is not None

    # --- what Horovod calls -----------------------------------------------------------------------------

    @CompressorMethod
    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Take a gradient for the exchange, and start that if its fused bucket is complete.

        Args:
            tensor: of any shape. Other dtypes than float32, float64, float16 and bfloat16 pass untouched.

        Returns:
            What Horovod is to reduce, and the context for `decompress`.

        Raises:
            RankMismatchError: the ranks are configured differently.
            RuntimeError: Horovod is not initialised, or the gradient was submitted before and is still on
                its way.
            ValueError: the tensor is part of an autograd graph, through which no gradient would flow.
        """
        if tensor.dtype in DTYPES:
            self._check_tensor(tensor)
        with self._lock:
            if self._transport is None:
                self._begin()  # whatever the dtype is, which may differ
            self._gradients += 1
            if self._gradients == 1 and not self._ranks.settled:
                with contextlib.suppress(ValueError, hvd.HorovodInternalError):  # raised in decompress
                    wait_for(self._ranks.all_announced)  # which says when hooks submit
            taken = self._submit(tensor) if tensor.dtype in DTYPES else (tensor, None)
            self._fill_slots()
            return taken

    @staticmethod
    def _check_tensor(tensor: torch.Tensor) -> None:
        if tensor.layout != torch.strided:
            raise ValueError(
                f"a gradient of layout {tensor.layout} cannot be quantized: Horovod hands over sparse ones "
                "with groups, where neither it nor we support them"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "the quantized exchange is not differentiable: pass tensor.detach() to hvd.allreduce, "
                "or leave out compression= there"
            )

    def _submit(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Pending | None]:
        name = self._name(tensor)
        raw_bytes = tensor.nbytes
        self._raw_bytes += raw_bytes
        scheme = self._present_scheme if name is None else self._scheme_of(name)
        if scheme is None or tensor.numel() < self.min_numel:
            self._wire_bytes += raw_bytes
            if name is not None:
                self._uses[name] += 1
            return tensor.contiguous(), None

        if self.error_feedback and name is None:
            raise ValueError(
                "error_feedback=True keeps something for every parameter, and this gradient is of none that "
                "the compressor knows"
            )
        key = name if name is not None else f"#{self._place()}"
        if key in self._pending:
            raise RuntimeError(
                f"gradient {key!r} was submitted again while it is on its way. If a step was left between "
                "backward and step, call the compressor's reset() first, on every rank."
            )
        known = self._known.get(key)
        if known is None or not known.fits(tensor):
            known = self._meet(key, name is not None, tensor, scheme)
        elif known.entry.scheme is not scheme:
            known.entry = replace(known.entry, scheme=scheme)
        stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        self._pending[key] = pending = Pending(known, tensor, stream)
        if self._holding:
            self._unsent.append(pending)
        else:
            self._take(pending)
        self._wire_bytes += control.NBYTES
        return known.fresh_control(tensor if self._schedule is not None else None), pending

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Finish the exchange of a gradient.

        Args:
            tensor: the reduced control tensor.
            ctx: what `compress` returned beside it; None for a tensor that passed untouched.

        Returns:
            The mean over the ranks, or the sum if that was asked for, in the gradient's shape and dtype.

        Raises:
            RankMismatchError: the ranks are configured differently, disagree about what they sent, or some
                have called `reset`.
            UnsupportedReductionError: Horovod was asked for Adasum, Min, Max or Product.
            RuntimeError: `reset` was called since the gradient's `compress`.
        """
        if ctx is None:
            return tensor
        with self._lock:
            return self._finish(tensor, ctx)

    def _finish(self, tensor: torch.Tensor, ctx: Pending) -> torch.Tensor:
        if ctx.abandoned:
            raise RuntimeError(
                f"reset() was called while gradient {ctx.known.key!r} was on its way: clear the optimizer's "
                "state too, by optimizer.load_state_dict(optimizer.state_dict())"
            )
        reduced = tensor.tolist()
        try:
            if self._holding:
                self._send_held(ctx, reduced)
            if self._fusion.waiting or self._ready or self._sent:
                self._end_round()
            factor = self._factor(ctx.known, reduced)
            if self._announced:
                self._receive_round(factor)
        except control.FingerprintMismatch:
            raise self._mismatch([ctx]) from None
        except RoundLeft as error:
            self._clear()
            raise control.RankMismatchError(str(error)) from None
        except ValueError as error:
            raise self._mismatch([member for one in self._announced for member in one.members]) from error
        except control.UnsupportedReductionError:
            self._go_on_for_others()
            self._clear()
            raise
        del self._pending[ctx.known.key]
        if self._schedule is not None:
            self._squares.append(reduced[control.SQUARE] / factor)
            if not self._pending:
                self._end_step()
        if factor != ctx.shipment.factor:
            self._decode_again(ctx, factor)
        if self._watching and not self._pending:  # the first step is complete
            self._names.watch_no_more()
            self._watching = False
        return ctx.release()

    # --- what users call --------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What this rank has contributed so far.

        Returns:
            ``steps``, how often the gradient that came most often has come (small ones count where names are
            known), those before a loaded state included; ``messages``, how many fused buckets were sent;
            ``raw_bytes``, the gradients as they were; ``wire_bytes``, what they were encoded into (messages,
            control tensors, uncompressed small gradients); ``received_bytes``, what came from other ranks by
            our own exchanges; ``compression_ratio``, raw over wire bytes. With a schedule of bits also
            ``bits``, a list of those of each step since the compressor was made.
        """
        with self._lock:
            schedule = {} if self._schedule is None else {"bits": list(self._bits)}
            return {
                **schedule,
                "steps": self._most_uses(),
                "messages": self._messages,
                "raw_bytes": self._raw_bytes,
                "wire_bytes": self._wire_bytes,
                "received_bytes": self._received_bytes,
                "compression_ratio": self._raw_bytes / self._wire_bytes if self._wire_bytes else 1.0,
            }

    def describe_in_flight(self) -> str | None:
        """What gradients are in flight, in a sentence; None if there are none.

        For the stall check, from another thread while this one waits, so that it takes no lock.
        """
        first = "Not all ranks have submitted their first gradient. " if self._ranks.proposed else ""
        if not (keys := list(self._pending)):
            return first or None
        state = "results have been asked for" if self._announced else "no result has been asked for yet"
        return f"{first}Gradients in flight: {enumeration(keys)}; {state}."

    def reset(self) -> None:
        """Forget what is on its way, but not the noise and the statistics.

        Error feedback counts what has been encoded as sent.

        For a training loop that goes on after it left a step between ``backward`` and ``step``, and cannot
        finish that by ``optimizer.synchronize()``. All ranks must call it, clear Horovod's optimizer as
        well, and wait for what Horovod has under way:

            >>> compressor.reset()
            >>> optimizer.load_state_dict(optimizer.state_dict())
            >>> optimizer.zero_grad()
            >>> hvd.barrier()

        That is enough where all ranks have submitted the same gradients before they left. Otherwise Horovod
        still waits for the others' of some names: call ``optimizer.synchronize()`` first, whatever it raises.
        """
        with self._lock:
            self._ranks.drop_proposal()  # if all have answered it, there is a round to leave
            if self._announced:
                self._go_on_for_others()
            elif (self._gradients or self._pending) and not self._ranks.proposed:
                # They may wait for what this rank will not send.
                with contextlib.suppress(
                    hvd.HorovodInternalError, ValueError
                ):  # ValueError after hvd.shutdown
                    self._ranks.announce(NOTHING)
            self._clear()

    def _clear(self) -> None:
        for pending in self._pending.values():
            pending.abandoned = True
            pending.release()
        self._pending.clear()
        self._holding = False
        self._unsent.clear()
        self._ready.clear()
        self._forget_slots()
        self._squares.clear()
        self._underway.clear()
        self._sent.clear()
        self._announced.clear()
        self._known.clear()
        self._fusion = Fusion(self.fusion_bytes)
        self._ranks.drop_announcements()
        if self._transport is not None:
            self._transport.abandon()
        self._transport = None  # the next gradient makes a new beginning

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue with the same noise, schedule of bits, and residuals.

        With ``error_feedback`` every rank has a state of its own, because it has residuals of its own. To be
        taken between steps: between ``backward`` and ``step`` the gradients count as sent, in part.
        """
        with self._lock:
            state: dict[str, Any] = {
                "seed": self.seed,
                "uses": dict(self._uses),
                "least_use": self._least_use,
            }
            if self._schedule is not None:
                state["schedule"] = self._schedule.state_dict()
            if self.error_feedback:
                state["residuals"] = {key: residual.clone() for key, residual in self._residuals.items()}
            return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. To be called on every rank, before the same step.

        Raises:
            ValueError: this is no such state, or it has residuals that are not finite or do not fit the
                parameters.
            RuntimeError: gradients are on their way.
        """
        with self._lock:
            if self._pending:
                raise RuntimeError("load a compressor's state between steps, not between backward and step")
            try:
                seed, uses, least_use = state["seed"], Counter(state["uses"]), state["least_use"]
                check_integer("seed", seed, 0, 2**64 - 1)
                for key, count in {**uses, "any gradient": least_use}.items():
                    check_integer(f"uses of {key}", count, 0, 2**63 - 1)
                residuals = self._residuals_of(state) if self.error_feedback else {}
                if self._schedule is not None:
                    self._schedule.load_state_dict(state["schedule"])
                    self._present_scheme = self.scheme.at(self._schedule.bits)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"not a state of this hvd_quant compressor: {error}") from error
            self.seed, self._uses, self._least_use = int(seed), uses, int(least_use)
            self._residuals = residuals
            self._clear()  # the ranks compare what they have anew, and fused buckets know the seed

    def _residuals_of(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        if "residuals" not in state:
            raise ValueError("it is of a compressor without error_feedback, and has no residuals")
        residuals = {
            name: torch.as_tensor(residual, dtype=torch.float32).detach().flatten().clone()
            for name, residual in state["residuals"].items()
        }
        for name, residual in residuals.items():
            if not residual.isfinite().all():
                raise ValueError(f"what it has for parameter {name!r} is not finite")
        if self._names is not None:
            self._check_residuals(residuals, self._names)
        return residuals

    @staticmethod
    def _check_residuals(residuals: Mapping[str, torch.Tensor], names: ParameterNames) -> None:
        sizes = {name: parameter.numel() for name, parameter in names.named_parameters()}
        for name, residual in residuals.items():
            if sizes.get(name) != residual.numel():
                raise ValueError(
                    f"the state has residuals of {residual.numel()} values for parameter {name!r}, which has "
                    f"{sizes.get(name, 0)}"
                )

    # --- identity ---------------------------------------------------------------------------------------

    def _name(self, tensor: torch.Tensor) -> str | None:
        if self._names is None:
            return None
        return self._names.find(tensor) or self._names.find_sparse(tensor, self._pending)

    def _scheme_of(self, name: str) -> Scheme | None:
        """A parameter's scheme in this step; None if it stays uncompressed."""
        return self._overrides.scheme(name, self._present_scheme) if self._overrides else self._present_scheme

    def _place(self) -> int:
        """The next place in the order of arrival, since nothing was on its way."""
        if not self._pending:
            self._places = 0
        self._places += 1
        return self._places - 1

    def _meet(self, key: str, named: bool, tensor: torch.Tensor, scheme: Scheme) -> Known:
        """Note a gradient that is new, or has changed."""
        description = {
            "name": key,
            "named": named,
            "shape": list(tensor.shape),
            "dtype": DTYPES[tensor.dtype],
        }
        fingerprint = control.fingerprint({**self._config(), "resets": self._ranks.resets, **description})
        values = np.array(control.values(fingerprint, self._transport.rank))
        memory = values.copy()
        known = Known(
            key,
            named,
            tensor.shape,
            tensor.dtype,
            tensor.device,
            Entry(key, tensor.numel(), DTYPES[tensor.dtype], scheme, str(tensor.device)),
            description,
            fingerprint,
            torch.from_numpy(memory).to(tensor.device, non_blocking=True),
            values,
            memory if tensor.device.type == "cpu" else None,
        )
        self._known[key] = known
        return known

    # --- agreement between ranks ------------------------------------------------------------------------

    def _begin(self) -> None:
        """Lay out the parameters, and compare notes with the other ranks, once."""
        if not hvd.is_initialized():
            raise RuntimeError("Horovod is not initialised: call hvd.init() before training")
        if self._names is None and (self.error_feedback or self._overrides):
            raise ValueError(
                "error_feedback and overrides need the parameters' names: pass the compressor "
                "named_parameters=model.named_parameters(), or use hvd_quant.torch.DistributedOptimizer, "
                "which does so"
            )
        host = self._host(hvd, mpi_ops.is_homogeneous())
        self._link = cost.link_from_environment(hvd.local_size() == hvd.size(), cost.HOROVOD_LATENCY)
        named = self._names.named_parameters() if self._names is not None else []
        self._parameters = {
            name: [
                list(p.shape),
                str(p.dtype).removeprefix("torch."),
                *([] if p.requires_grad else ["frozen"]),
            ]
            for name, p in named
        }
        # Their order is in it, too: it is that of the fused buckets.
        self._ranks.propose(
            control.fingerprint({**self._config(), "parameters": list(self._parameters.items())}),
            host,
            self._progress(),
        )
        quantized = [
            (name, p, scheme)
            for name, p in named
            if p.numel() >= self.min_numel
            and p.dtype in DTYPES
            and (scheme := self._scheme_of(name)) is not None
        ]
        for trained in (True, False):  # frozen ones apart: they may be trained later
            self._fusion.plan(
                [
                    Entry(name, p.numel(), DTYPES[p.dtype], scheme, str(p.device))
                    for name, p, scheme in reversed(quantized)
                    if p.requires_grad == trained
                ]
            )
        self._transport = HorovodTransport(self.process_set, self._ranks.all_announced)
        self._holding = True
        # In vain, if some rank does not run this code, or comes late. Then Horovod gets its control tensors
        # all the same: if that rank is configured differently, too, these show it.
        wait_for(lambda: self._agreed(ask=True))

    def _agreed(self, *, ask: bool = False) -> bool:
        """Whether all ranks have told what they have.

        Args:
            ask: what the difference is, if there is one. Otherwise, as when this rank has gone on because
                some other was late, all will find out by what they reduce.
        """
        if not self._ranks.proposed:
            return True
        try:
            same = self._ranks.agree()
        except hvd.HorovodInternalError:
            self._clear()
            raise
        if same is None:
            return False
        if not same and ask:
            message = self._explain_mismatch(self._ranks.name("disagreement"), [], self._state())
            if message is not None:
                self._clear()
                raise control.RankMismatchError(message)
        try:
            self._locate(self._ranks.topology)
        except ValueError:
            self._clear()
            raise
        # What they told decides, alike on every rank. What this one has may have changed since.
        if same and any(told != self._ranks.progress[0] for told in self._ranks.progress):
            self._catch_up()
            for known in {id(pending.known): pending.known for pending in self._unsent}.values():
                scheme = self._scheme_of(known.key) if known.named else self._present_scheme
                known.entry = replace(known.entry, scheme=scheme)
        return True

    def _progress(self) -> list[int]:
        """How far this rank has come, as many int64 with every configuration."""
        uses = digest(sorted(self._uses.items()), self._least_use)
        schedule = self._schedule.to_integers() if self._schedule is not None else [0] * BitSchedule.INTEGERS
        return [int.from_bytes(uses, "little", signed=True), self._most_uses(), *schedule]

    def _most_uses(self) -> int:
        """How often the gradient that came most often has come."""
        return max([self._least_use, *self._uses.values()])

    def _catch_up(self) -> None:
        """Go on from where the rank is that has come furthest.

        After a step that was left, or a state that some have loaded, they need not have come equally far.
        What all have told decides, not what this rank has: it may have loaded a state since it told.
        """
        self._least_use = max(most_uses for _, most_uses, *_ in self._ranks.progress)
        self._uses.clear()
        if self._schedule is not None:
            self._schedule.load_integers(max(schedule for _, _, *schedule in self._ranks.progress))
            self._present_scheme = self.scheme.at(self._schedule.bits)

    def _send_held(self, ctx: Pending, reduced: list[float]) -> None:
        """Send what has come: all ranks have submitted this gradient, and before that told what they have."""

        def agreed() -> bool:
            if self._agreed():
                return True
            with contextlib.suppress(control.UnsupportedReductionError):
                self._factor(ctx.known, reduced)  # ranks that differ need not agree
            return False

        if not wait_for(agreed):
            raise ValueError("not all ranks have told their configuration")
        self._holding = False
        unsent, self._unsent = self._unsent, []
        for pending in unsent:
            self._take(pending)
        self._completed.clear()  # not in hooks

    def _config(self) -> control.Description:
        return {
            **super()._config(),
            "overrides": [[pattern, str(scheme)] for pattern, scheme in self._overrides],
        }

    def _state(self) -> control.Description:
        """The configuration, and what may come to differ later."""
        return {**self._config(), "schedule": self._schedule_state(), "resets": self._ranks.resets}

    def _schedule_state(self) -> dict[str, Any] | None:
        return self._schedule.state_dict() if self._schedule is not None else None

    def _factor(self, known: Known, reduced: list[float]) -> float:
        """What the reduced control tensor says; nearly always what it said in the step before."""
        reduced = reduced[: control.SQUARE]
        if reduced != known.reduced:
            known.factor = control.check(reduced, known.fingerprint, self._transport.size)
            known.reduced = reduced
        return known.factor

    def _end_step(self) -> None:
        """All gradients of a step have come back: the next one may have another number of bits."""
        self._bits.append(self._schedule.bits)
        self._schedule.advance(*self._squares)
        self._squares.clear()
        if self._schedule.bits != self._present_scheme.bits:
            self._present_scheme = self.scheme.at(self._schedule.bits)

    def _mismatch(self, pending: list[Pending]) -> control.RankMismatchError:
        """What to raise on a difference that was noticed at these gradients, by all ranks."""
        gradients = [one.known.description for one in pending]
        state = self._state()
        self._ranks.drop_proposal()
        message = self._explain_mismatch("hvd_quant.mismatch", gradients, state)
        if message is None:
            self._go_on_for_others()
            message = (
                "the ranks are configured differently, or have sent different gradients, and did not all "
                f"answer when asked for theirs. This one has {state}, and noticed it at {gradients}."
            )
        self._clear()
        return control.RankMismatchError(message)

    def _explain_mismatch(
        self, question: str, gradients: list[control.Description], state: control.Description
    ) -> str | None:
        """Ask all ranks what they have: None, if they do not all answer, because one has died, say."""
        answers = self._ranks.ask(
            question, [state, self._parameters, gradients], lambda: self._advance(wait=False)
        )
        return control.explain_mismatch(*zip(*answers, strict=True)) if answers else None

    # --- rounds -----------------------------------------------------------------------------------------

    def _end_round(self) -> None:
        """Send everything that has come, for nothing more will before a result is used, and tell what it was.

        If the ranks have not sent the same, some of it will never arrive: who waits for that must learn it.
        """
        for group in [*self._ready, *self._fusion.flush()]:
            self._send(group)
        self._ready.clear()
        self._announced, self._sent = self._sent, []
        exchanges = [shipment.exchange for shipment in self._announced]
        # Sorted, because gradients, and with them fused buckets, may come in another order on every rank.
        sent = digest(sorted((one.name, one.algorithm, one.work.bucket.digest.hex()) for one in exchanges))
        self._ranks.announce(sent, self._completed, self._slots_skipped)
        self._forget_slots()

    def _receive_round(self, factor: float) -> None:
        """Write the means of everything that the round has sent, as it arrives.

        No result is used before the ranks are known to have sent the same: a rank that found nothing wrong
        would go on, and wait for others that have stopped.

        Args:
            factor: of the first gradient that was asked for; nearly always that of all.
        """
        # To their last collectives first, in the order in which Horovod carries them out.
        self._advance(wait=True)
        for shipment in self._announced:
            out = []
            for member, values in zip(shipment.members, shipment.exchange.work.values, strict=True):
                if member.in_place:
                    member.result = member.gradient
                    out.append(values)
                else:
                    member.result = torch.empty_like(member.gradient, memory_format=torch.contiguous_format)
                    out.append(values_of(member.result, plain=True))
            shipment.exchange.finish(out, factor)
            self._received_bytes += shipment.exchange.received_bytes
            self._wire_bytes += shipment.exchange.work.encoded_bytes
            shipment.factor = factor
        # All results are there, but some rank may wait for more. Or it has not come so far, and waits for us
        # elsewhere: then what it says is looked at in the next round.
        wait_for(self._ranks.all_announced)
        self._announced = []

    def _fill_slots(self) -> None:
        """Submit as many messages as all ranks do after so many gradients.

        Where none is ready, because this rank has other gradients than others, or in another order, it
        submits an operation that Horovod refuses, and counts all the same.
        """
        while self._slots_used < bisect_right(self._ranks.slots, self._gradients):
            self._slots_used += 1
            if self._ready:
                self._send(self._ready.popleft())
            else:
                self._slots_skipped += 1
                submit_as_many(1, 0)

    def _forget_slots(self) -> None:
        self._gradients = self._slots_used = self._slots_skipped = 0
        self._completed = []

    # --- exchange ---------------------------------------------------------------------------------------

    def _take(self, pending: Pending) -> None:
        """Have a gradient travel, in the next slot after its fused bucket is complete."""
        key = pending.known.key
        pending.use = max(self._uses[key], self._least_use)
        self._uses[key] = pending.use + 1
        if (ready := self._fusion.add(pending.known.entry)) is not None:
            self._ready.append(ready)
            self._completed.append(self._gradients)

    def _bucket(self, group: Group) -> FusedBucket:
        # With the ranks of the process set in the seed: sets side by side must not share their noise.
        seed = (self.seed, self.process_set.ranks)
        return group.bucket(self._transport.size, self._transport.rank, seed, self._topology)

    def _send(self, group: Group) -> None:
        """Encode a fused bucket and start its exchange."""
        bucket = self._bucket(group)
        members = [self._pending[entry.key] for entry in bucket.entries]
        on_cpu = members[0].gradient.device.type == "cpu"
        if members[0].gradient.is_cuda:
            wait_for_streams(members)
        values = []
        for member in members:
            plain = is_plain(member.gradient)
            values.append(values_of(member.gradient, plain))
            # A parameter's gradient is overwritten, as Horovod would have done; any other tensor is the
            # caller's.
            member.in_place = member.known.named and plain
        # Horovod remembers collectives by their names, and then does not notice that a rank has called
        # hvd.join(): it crashes. Numbered ones are new to it, and it refuses them.
        name = self._ranks.name(f"{group.name}.{group.times_sent}")
        work = Work(
            bucket,
            values,
            np.array([member.use for member in members], np.uint64),
            native if on_cpu else torch_ops,
            [values_of(self._residual(member), plain=True) for member in members]
            if self.error_feedback
            else (),
            bucket.buffers,
        )
        algorithm = self._algorithm_for(bucket.whole.size, bucket.whole.count)
        exchange = Exchange(work, algorithm, self._transport, name)
        self._messages += 1
        shipment = Shipment(exchange, members)
        for member in members:
            member.shipment = shipment
        self._underway.append(exchange)
        self._sent.append(shipment)

    def _residual(self, pending: Pending) -> torch.Tensor:
        """What has not been sent of a parameter's earlier gradients; nothing, if these were others."""
        key, gradient = pending.known.key, pending.gradient
        residual = self._residuals.get(key)
        if residual is None or residual.numel() != gradient.numel():
            residual = torch.zeros(gradient.numel(), dtype=torch.float32, device=gradient.device)
        self._residuals[key] = residual.to(gradient.device)
        return self._residuals[key]

    def _advance(self, *, wait: bool) -> bool:
        """Take exchanges to their last collective; are all there?

        All of them side by side: they may have begun in another order on every rank, and one's second
        collective may wait for a rank that waits for another's.
        """
        while not self._look() and wait:
            self._transport.while_waiting()
            time.sleep(POLL_SECONDS)
        return not self._underway

    def _look(self) -> bool:
        """Take exchanges on as far as they are; are all at their last collective?

        Not in hooks of backward, where it would depend on the others' progress how much this rank has
        submitted. And what an exchange on a GPU does between its collectives waits for that.
        """
        self._underway = [exchange for exchange in self._underway if not exchange.advance(wait=False)]
        return not self._underway

    def _go_on_for_others(self) -> None:
        """Take exchanges to their last collectives, if the other ranks do, too: they may wait for these."""

        def there() -> bool:
            self._ranks.all_announced()  # raises an exception if they do not
            return self._advance(wait=False)

        with contextlib.suppress(hvd.HorovodInternalError, ValueError):
            wait_for(there)

    def _decode_again(self, ctx: Pending, factor: float) -> None:
        """Write the mean of one gradient whose factor is not that of those it travelled with."""
        members = ctx.shipment.members
        known = [member.known for member in members]
        results = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in known]
        ctx.shipment.exchange.finish([values_of(result, plain=True) for result in results], factor)
        ctx.result.copy_(results[members.index(ctx)])


class QSGDCompressor(QSGDArguments, QuantizedCompressor):
    """Gradients quantized by QSGD: ``hvd.DistributedOptimizer(..., compression=QSGDCompressor(bits=4))``.

    Args:
        bits, norm, bucket_size, coding: of the scheme, see `hvd_quant.QSGD`.
        rounding: of the scheme; by default ``"independent"``, or ``"nearest"`` with ``error_feedback``.
        **options: of the exchange, see `QuantizedCompressor`.

    Warning:
        Without ``named_parameters``, training in which some parameters get no gradient on some rank may stop
        with a `RankMismatchError`, because Horovod submits those in an order of its own on every rank. Pass
        them, or use `hvd_quant.torch.DistributedOptimizer`.
    """


class NUQSGDCompressor(NUQSGDArguments, QuantizedCompressor):
    """Gradients quantized by NUQSGD; see `QSGDCompressor`, its warning included.

    Args:
        bits, norm, bucket_size, coding: of the scheme, see `hvd_quant.NUQSGD`.
        rounding: as in `QSGDCompressor`.
        **options: of the exchange, see `QuantizedCompressor`.
    """


class DQSGDCompressor(DQSGDArguments, QuantizedCompressor):
    """Gradients quantized by DQ-SGD, in which the number of bits follows the training; see `QSGDCompressor`.

    A step ends when nothing is on its way any more, as it is after ``optimizer.synchronize()``. The norm that
    the next step's bits follow from is that of the quantized gradients: the root of the sum over them of the
    ranks' mean squared norm.

    Args:
        k, mean_bits, total_steps, alpha, min_bits, max_bits: of the schedule, see `hvd_quant.DQSGD`.
        norm, bucket_size, coding: of the scheme, see `hvd_quant.QSGD`.
        rounding: as in `QSGDCompressor`.
        **options: of the exchange, see `QuantizedCompressor`.

    Example:
        >>> hq.DQSGDCompressor(mean_bits=4, total_steps=epochs * len(loader))
    """
