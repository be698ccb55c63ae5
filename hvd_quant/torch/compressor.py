"""Compressors for ``hvd.DistributedOptimizer(compression=...)``.

Horovod calls ``compress``, allreduces its result, and calls ``decompress`` on the reduced one. Quantized
codes cannot be allreduced, so ``compress`` submits the gradient to our own exchange and gives Horovod a
control tensor to reduce (see `hvd_quant.reducer.control_tensor`); ``decompress`` checks that tensor, waits
for the exchange, and returns the decoded mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops
from horovod.torch.compression import Compressor

from hvd_quant.codec import cuda
from hvd_quant.exchange.layout import Entry
from hvd_quant.horovod import HorovodCompressor, initialisation, renew_numbers
from hvd_quant.reducer import control_tensor
from hvd_quant.reducer.alone import Alone
from hvd_quant.reducer.gradient import Parameter
from hvd_quant.reducer.options import Options
from hvd_quant.reducer.reducer import Reducer
from hvd_quant.reducer.state import TrainingState
from hvd_quant.schemes import DQSGD, NUQSGD, QSGD, Scheme
from hvd_quant.torch.call_inspection import calling_optimizer, reduced_together
from hvd_quant.torch.gradient import (
    DTYPES,
    TorchControl,
    TorchGradient,
    TorchResiduals,
    check_supported,
    squared_norm,
)
from hvd_quant.torch.identity import ParameterNames
from hvd_quant.torch.stall import check
from hvd_quant.torch.transport import HorovodTransport, gather_json


class QuantizedCompressor(HorovodCompressor, Compressor):
    """Exchange of quantized gradients; use a subclass that names a scheme, such as `QSGDCompressor`.

    Args:
        scheme: how gradients are quantized.
        named_parameters: ``model.named_parameters()``. Without it the names are those that Horovod's
            optimizer has. A gradient of ``hvd.allreduce`` is identified by its place in the order of arrival,
            which all ranks must share; a disagreement is detected and is an error.
        process_set: the ranks that take part; give the optimizer the same.
        **options: ``overrides``, ``min_numel``, ``exchange``, ``error_feedback``, ``fusion_bytes`` and
            ``seed``, see `hvd_quant.reducer.options.Options`. ``error_feedback`` and ``overrides`` need the
            parameters' names.

    Raises:
        TypeError, ValueError: an argument is not of its type, or not in its range.
    """

    def __init__(
        self,
        scheme: Scheme | DQSGD,
        *,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        process_set: hvd.ProcessSet = hvd.global_process_set,
        **options: Any,
    ) -> None:
        cuda.check_switch()
        super().__init__(Options(scheme, **options), process_set)
        self._names: ParameterNames | None = None
        self._watching = False  # watches autograd's order, for sparse gradients
        self._places = 0  # used since nothing was in flight
        self._members = 0  # compressed so far of those that Horovod will reduce by one operation
        self._state = TrainingState(scheme, self.seed, TorchResiduals() if self.error_feedback else None)
        self._reducer = Reducer(self.options, self._state, self._number)
        self._initialisation: object = None  # of Horovod, in which the present generation has begun
        self._alone: Alone | None = None  # if there is no other rank
        if named_parameters is not None:
            self.bind(named_parameters)
        check.watch(self._reducer)

    def bind(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Give the compressor the parameters' names, once.

        Raises:
            ValueError: it has other names already, names or parameters are not unique, or residuals of a
                loaded state do not fit them.
        """
        names = ParameterNames(named_parameters)
        if self._names is not None and self._names != names:
            raise ValueError(
                "this compressor has been given other named_parameters before. A compressor serves one "
                "optimizer: make another one for another optimizer."
            )
        if self._names is None:
            given = [name for name, _ in names.named_parameters()]
            self.options.overrides.warn_of_unused(given, "parameter", stacklevel=3)
            if self._state.residuals is not None:  # from a state that was loaded before
                names.check_sizes(self._state.residuals.kept)
            self._names = names
            names.watch()
            self._watching = True

    def _bind_to(self, optimizer: Any | None) -> None:
        """Take the parameters' names from Horovod's optimizer, in the order of its parameters."""
        names = getattr(optimizer, "_parameter_names", None)
        if names is not None:
            groups = optimizer.param_groups
            self.bind((names[one], one) for group in groups for one in group["params"] if one in names)

    @property
    def is_used(self) -> bool:
        """See `HorovodCompressor.is_used`."""
        return self.in_use or self.bound or self._initialisation is not None or self._state.was_loaded

    @property
    def bound(self) -> bool:
        """Whether the compressor has the parameters' names."""
        return self._names is not None

    # --- called by Horovod ------------------------------------------------------------------------------

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """See `HorovodCompressor.compress`. The exchange starts if the gradient's fused bucket is complete.

        Raises:
            RuntimeError: also, the gradient is already in flight.
            ValueError: the tensor is part of an autograd graph, through which no gradient would flow.
        """
        quantized = tensor.dtype in DTYPES
        reducer, together = self._reducer, reduced_together()
        with reducer.lock:
            try:
                if quantized and (tensor.requires_grad or tensor.layout != torch.strided):
                    check_supported(tensor)
                has_begun = reducer.has_begun or self._alone is not None
                if not has_begun or self._initialisation is not initialisation():
                    self._begin()  # whatever the dtype, which may differ between ranks
                if self._alone is not None:
                    return tensor, self._keep(tensor) if quantized else None
                if self._members == 0:
                    reducer.count()
                taken = self._submit(tensor) if quantized else (tensor, None)
                self._members += 1
                if together is None or self._members == len(together):
                    reducer.fill_slots()
                    self._members = 0
            except BaseException:
                self._members = 0
                raise
            return taken

    def _submit(self, tensor: torch.Tensor) -> tuple[torch.Tensor, TorchGradient | torch.Size | None]:
        reducer, state = self._reducer, self._state
        name = self._name(tensor)
        scheme = self.options.scheme_of(name, tensor.numel(), state.present_scheme)
        if scheme is None:
            state.statistics.raw_bytes += tensor.nbytes
            state.statistics.wire_bytes += tensor.nbytes
            if name is not None:
                state.uses[name] += 1
            if tensor.dtype == torch.float64 and tensor.shape == (control_tensor.SIZE,):
                # It must not be taken for a control tensor, which other ranks may have in its place.
                return tensor.reshape(control_tensor.OTHER_SHAPE), tensor.shape
            return tensor.contiguous(), None

        if self.options.error_feedback and name is None:
            raise ValueError(
                "error_feedback=True keeps a residual for every parameter, and this gradient belongs to none "
                "that the compressor knows"
            )
        key = name if name is not None else f"#{self._place()}"
        gradient = reducer.known.get(key)
        if gradient is None or not gradient.fits(tensor):
            gradient = self._register(key, name is not None, tensor, scheme)
        elif gradient.entry.scheme is not scheme:
            gradient.entry = replace(gradient.entry, scheme=scheme)
        reducer.submit(gradient, tensor)
        return gradient.control.fresh(tensor if state.schedule is not None else None), gradient

    def _keep(self, tensor: torch.Tensor) -> Alone:
        """Count a gradient that no other rank gets: Horovod is given the gradient itself."""
        name = self._name(tensor)
        scheme = self.options.scheme_of(name, tensor.numel(), self._state.present_scheme)
        key = name if name is not None else f"#{self._alone.in_flight}"
        follows = scheme is not None and self._state.schedule is not None
        self._alone.submit(key, squared_norm(tensor).item() if follows else None)
        return self._alone

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """See `HorovodCompressor.decompress`. It finishes the exchange of the gradient.

        Raises:
            RankMismatchError: also, some rank has called `reset`.
            RuntimeError: `reset` was called since the gradient's `compress`.
        """
        if not isinstance(ctx, TorchGradient):
            if isinstance(ctx, Alone):
                ctx.take()
            return tensor.view(ctx) if isinstance(ctx, torch.Size) else tensor
        with self._reducer.lock:
            self._reducer.finish(ctx, ctx.control.reduced(tensor))
            if self._watching and not self._reducer.in_flight:  # the first step is complete
                self._names.watch_no_more()
                self._watching = False
            return ctx.release()

    # --- public -----------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """See `HorovodCompressor.stats`. Small gradients count as steps if names are known."""
        with self._reducer.lock:
            return self._state.stats()

    def reset(self) -> None:
        """Drop what is in flight, but keep the noise and the statistics.

        Error feedback counts what has been encoded as sent.

        For a training loop that continues after it left a step between ``backward`` and ``step``, and cannot
        finish that by ``optimizer.synchronize()``. All ranks must call it, clear Horovod's optimizer as well,
        and wait for what Horovod has in flight:

            >>> compressor.reset()
            >>> optimizer.load_state_dict(optimizer.state_dict())
            >>> optimizer.zero_grad()
            >>> hvd.barrier()

        That is enough if all ranks had submitted the same gradients before. Otherwise Horovod
        still waits for the others' of some names: call ``optimizer.synchronize()`` first, whatever it raises.
        """
        with self._reducer.lock:
            self._reducer.reset()

    @contextlib.contextmanager
    def joined(self) -> Iterator[Callable[[], bool]]:
        """Have this rank tell the others that it has no more data; see `hvd_quant.torch.join`.

        Yields:
            Returns whether no rank has more, after each step has been synchronised. That step is none.
        """
        state = self._state
        with self._reducer.joined() as all_have_joined:
            mark = state.mark()

            def all_have() -> bool:
                nonlocal mark
                if not all_have_joined():
                    mark = state.mark()
                    return False
                state.go_back(mark)
                self._put_back()
                return True

            yield all_have

    def _put_back(self) -> None:
        """Add the last means to the residuals, so that nothing is lost where nobody applies these."""
        if self._state.residuals is not None:
            for name, parameter in self._names.named_parameters():
                gradient = self._reducer.known.get(name)
                if gradient is not None and parameter.grad is not None and name in self._state.residuals.kept:
                    mean = parameter.grad.detach().flatten().float() / gradient.control.last_factor
                    self._state.residuals.kept[name] += mean.nan_to_num(0.0, 0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue with the same noise, schedule of bits, and residuals.

        With ``error_feedback`` the state differs between ranks, because residuals do: save every rank's, or
        `gather_state_dict`. Call it between steps: between ``backward`` and ``step`` some gradients count as
        sent already.
        """
        with self._reducer.lock:
            return self._state.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Call it on every rank, before the same step.

        Raises:
            ValueError: the state is invalid, or it has residuals that are not finite or do not fit the
                parameters.
            RuntimeError: gradients are in flight.
        """
        with self._reducer.lock:
            self._check_between_steps()
            self._load(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Drop what is in flight, and continue where `state_dict` was taken. On every rank.

        For elastic training, see `hvd_quant.torch.elastic`, where what is in flight will not arrive.

        Raises:
            ValueError: as `load_state_dict`.
        """
        with self._reducer.lock:
            self._reducer.clear()
            self._load(state, warns=False)

    def _load(self, state: dict[str, Any], *, warns: bool = True) -> None:
        self._state.place = self._place_of_rank() if warns and hvd.is_initialized() else None
        if self._names is not None:
            self._state.load_state_dict(state, self._names.check_sizes)
        else:
            self._state.load_state_dict(state)
        self.options.seed = self._state.seed
        self._reducer.clear()  # the ranks agree anew, and fused buckets depend on the seed

    def _gather_object(self, own: Any) -> list[Any]:
        return gather_json(own, f"hvd_quant.{self._number}.state", self.process_set)

    def _gather_rows(self, key: str, own: torch.Tensor | None, count: int) -> torch.Tensor:
        own = torch.zeros(count) if own is None else own.cpu()
        return hvd.allgather(own[None], f"hvd_quant.{self._number}.state.{key}", self.process_set)

    def _check_between_steps(self) -> None:
        if self._reducer.in_flight:
            raise RuntimeError("load and gather states between steps, not between backward and step")

    # --- identity ---------------------------------------------------------------------------------------

    def _name(self, tensor: torch.Tensor) -> str | None:
        if self._names is None:
            return None
        return self._names.find(tensor) or self._names.find_sparse(tensor, self._reducer.in_flight)

    def _place(self) -> int:
        """Return the next place in the order of arrival, since nothing was in flight."""
        if not self._reducer.in_flight:
            self._places = 0
        self._places += 1
        return self._places - 1

    def _register(self, key: str, named: bool, tensor: torch.Tensor, scheme: Scheme) -> TorchGradient:
        """Register a gradient that is new, or has changed."""
        dtype = DTYPES[tensor.dtype]
        entry = Entry(key, tensor.numel(), dtype, scheme, str(tensor.device))
        description = {"name": key, "named": named, "shape": list(tensor.shape), "dtype": dtype}
        fingerprint = self._reducer.fingerprint(description)
        own = TorchControl(fingerprint, self._reducer.rank, tensor.device)
        gradient = self._reducer.known[key] = TorchGradient(tensor, entry, named, description, own)
        return gradient

    def _begin(self) -> None:
        """Begin a generation of the reducer, with the ranks' hosts and the parameters."""
        if not hvd.is_initialized():
            raise RuntimeError("Horovod is not initialised: call hvd.init() before training")
        if self._initialisation is not initialisation():
            renew_numbers()
            self._reducer.start_again(self._number)
            self._initialisation, self._members = initialisation(), 0
        self._alone = Alone(self._state) if self.process_set.size() == 1 else None
        if self._alone is not None:
            return
        host = self._host(hvd, mpi_ops.is_homogeneous())
        if self._names is None:
            self._bind_to(calling_optimizer())
        parameters = None
        if self._names is not None:
            parameters = {
                name: Parameter(
                    tuple(one.shape),
                    str(one.dtype).removeprefix("torch."),
                    str(one.device),
                    one.requires_grad,
                )
                for name, one in self._names.named_parameters()
            }
        self._state.place = self._place_of_rank()
        self._reducer.begin(HorovodTransport(self.process_set), self._exchange_choice(hvd), host, parameters)


class QSGDCompressor(QuantizedCompressor, scheme=QSGD):
    """Gradients quantized by QSGD: ``hvd.DistributedOptimizer(..., compression=QSGDCompressor(bits=4))``.

    Its arguments are those of `hvd_quant.QSGD` (``rounding`` is ``"nearest"`` by default with
    ``error_feedback``), and options of the exchange, see `QuantizedCompressor`.
    """


class NUQSGDCompressor(QuantizedCompressor, scheme=NUQSGD):
    """Gradients quantized by NUQSGD: `hvd_quant.NUQSGD`'s arguments, otherwise as `QSGDCompressor`."""


class DQSGDCompressor(QuantizedCompressor, scheme=DQSGD):
    """Gradients quantized by DQ-SGD, with bits that follow the training; see `QSGDCompressor`.

    A step ends when nothing is in flight any more, as after ``optimizer.synchronize()``. The next step's bits
    depend on the norm of the quantized gradients: the root of the sum over them of the ranks' mean squared
    norm.

    Its arguments are those of `hvd_quant.DQSGD`, and options of the exchange, see `QuantizedCompressor`.

    Example:
        >>> hq.DQSGDCompressor(mean_bits=4, total_steps=epochs * len(loader))
    """
