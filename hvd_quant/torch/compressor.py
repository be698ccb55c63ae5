"""Compressors for ``hvd.DistributedOptimizer(compression=...)``.

Horovod calls ``compress``, allreduces what that returns, and calls ``decompress`` on the result. Quantized
codes cannot be allreduced, so ``compress`` starts an exchange of its own and gives Horovod a control tensor
to reduce (see `hvd_quant.exchange.control`); ``decompress`` checks that tensor, waits for the exchange, and
returns the decoded mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor

from hvd_quant import wire
from hvd_quant.codec import flat_array, native, torch_ops
from hvd_quant.exchange import control
from hvd_quant.schemes import QSGD, check_integer
from hvd_quant.torch.identity import ParameterNames

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
# How long to wait for the other ranks' configurations once a mismatch is known: they notice when they get to
# the same step, but one of them may have died.
_EXPLAIN_SECONDS = 60.0
_counters: defaultdict[tuple, itertools.count] = defaultdict(itertools.count)  # of compressors, a process set


@dataclass
class _Key:
    """What a gradient is called on every rank: its parameter's name, or its place in the order of arrival."""

    text: str
    named: bool


@dataclass
class _Pending:
    """A gradient on its way, from ``compress`` to ``decompress``."""

    key: _Key
    gradient: torch.Tensor
    handle: int
    fingerprint: int
    quantized: bool
    abandoned: bool = False


class QuantizedCompressor(Compressor):
    """The exchange of quantized gradients; use a subclass that names a scheme, such as `QSGDCompressor`.

    Args:
        scheme: how gradients are quantized.
        named_parameters: ``model.named_parameters()``. Without it a gradient is known by its place in the
            order of arrival, which all ranks must share; a disagreement is detected and is an error.
            `hvd_quant.torch.DistributedOptimizer` passes it by itself.
        min_numel: gradients of fewer values are left to Horovod, uncompressed. (Their first time, they are
            averaged by an allreduce of our own, so that ranks with another ``min_numel`` are found out.)
        process_set: the ranks that take part; give the optimizer the same.
        seed: of the rounding noise, 0 to 2^64 - 1. Each rank draws its own noise from it.

    Raises:
        TypeError, ValueError: an argument is not of its type, or not in its range.
    """

    def __init__(
        self,
        scheme: QSGD,
        *,
        named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
        min_numel: int = 1024,
        process_set: hvd.ProcessSet = hvd.global_process_set,
        seed: int = 0,
    ) -> None:
        check_integer("min_numel", min_numel, 0, 2**63 - 1)
        check_integer("seed", seed, 0, 2**64 - 1)
        if not isinstance(process_set, hvd.ProcessSet):
            raise TypeError(f"process_set must be a horovod.torch.ProcessSet, not {process_set!r}")
        if process_set.process_set_id is None:
            raise ValueError(
                "Horovod does not know this process_set yet: hand it to hvd.init(process_sets=...) or to "
                "hvd.add_process_set before making the compressor"
            )
        self.scheme = scheme
        self.min_numel = int(min_numel)
        self.process_set = process_set
        self.seed = int(seed)
        self.in_use = False  # by an optimizer of ours
        self._names: ParameterNames | None = None
        # In the names of our collectives, so that several compressors of one process stay apart. Ranks that
        # are not in a process set need not make its compressors, so each set counts its own.
        self._number = next(_counters[process_set.process_set_id, tuple(process_set.ranks or ())])
        self._resets = 0  # in those names too: what was abandoned may still be on its way
        self._uses: Counter[str] = Counter()  # how often each key came; part of the noise's key
        self._announced: set[str] = set()  # small gradients that the ranks have agreed to leave alone
        self._arrivals = {True: 0, False: 0}  # in this step: quantized ones, small ones
        self._pending: dict[str, _Pending] = {}
        self._raw_bytes = 0
        self._wire_bytes = 0
        if named_parameters is not None:
            self.bind(named_parameters)

    def bind(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Tell the compressor the parameters' names, once.

        Raises:
            ValueError: it knows others already, or these are no unique names and parameters.
        """
        names = ParameterNames(named_parameters)
        if self._names is not None and self._names != names:
            raise ValueError(
                "this compressor has been given other named_parameters before. A compressor serves one "
                "optimizer: make another one for another optimizer."
            )
        if self._names is None:
            self._names = names
            names.watch()

    @property
    def bound(self) -> bool:
        """Whether the compressor knows the parameters' names."""
        return self._names is not None

    # --- what Horovod calls -----------------------------------------------------------------------------

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start the exchange of a gradient.

        Args:
            tensor: of any shape. Other dtypes than float32, float64, float16 and bfloat16 pass untouched.

        Returns:
            What Horovod is to reduce, and the context for `decompress`.

        Raises:
            RuntimeError: Horovod is not initialised.
            ValueError: the tensor is part of an autograd graph, through which no gradient would flow.
        """
        if tensor.dtype not in _DTYPES:
            return tensor, None
        if tensor.layout != torch.strided:
            raise ValueError(
                f"a gradient of layout {tensor.layout} cannot be quantized: Horovod hands over sparse ones "
                "with groups, where neither it nor we support them"
            )
        if not hvd.is_initialized():
            raise RuntimeError("Horovod is not initialised: call hvd.init() before training")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "the quantized exchange is not differentiable: pass tensor.detach() to hvd.allreduce, "
                "or leave out compression= there"
            )
        quantized = tensor.numel() >= self.min_numel
        key = self._key(tensor, quantized)
        raw_bytes = tensor.numel() * tensor.element_size()
        self._raw_bytes += raw_bytes
        use = self._uses[key.text]
        if quantized or key.named:  # the place of a small gradient without a name says little
            self._uses[key.text] += 1
        if not quantized and key.text in self._announced:
            self._wire_bytes += raw_bytes
            return tensor.contiguous(), None

        name = f"hvd_quant.{self._number}.{self._resets}.{key.text}"
        if quantized:
            payload = self._encode(tensor, self._noise_seed(key, use))
            handle = hvd.allgather_async(payload, name=name, process_set=self.process_set)
            self._wire_bytes += payload.numel() + control.NBYTES
        else:
            handle = hvd.allreduce_async(
                tensor.contiguous(), name=name, op=hvd.Average, process_set=self.process_set
            )
            self._announced.add(key.text)
            self._wire_bytes += raw_bytes + control.NBYTES
        own = control.fingerprint({**self._config(), **self._describe(key, tensor)})
        self._pending[key.text] = _Pending(key, tensor, handle, own, quantized)
        values = control.values(own, self.process_set.rank())
        return torch.tensor(values, dtype=torch.float64, device=tensor.device), self._pending[key.text]

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Finish the exchange of a gradient.

        Args:
            tensor: the reduced control tensor.
            ctx: what `compress` returned beside it; None for a tensor that passed untouched.

        Returns:
            The mean over the ranks, or the sum if that was asked for, in the gradient's shape and dtype.

        Raises:
            RankMismatchError: the ranks are configured differently, or disagree about what they sent.
            UnsupportedReductionError: Horovod was asked for Adasum, Min, Max or Product.
            RuntimeError: `reset` was called since the gradient's `compress`.
        """
        if ctx is None:
            return tensor
        if ctx.abandoned:
            raise RuntimeError(
                f"reset() was called while gradient {ctx.key.text!r} was on its way: clear the optimizer's "
                "state too, by optimizer.load_state_dict(optimizer.state_dict())"
            )
        try:
            factor = control.check(tensor.tolist(), ctx.fingerprint, self.process_set.size())
        except control.FingerprintMismatch:
            message = self._explain_mismatch(ctx)
            self.reset()
            raise control.RankMismatchError(message) from None
        except control.UnsupportedReductionError:
            self.reset()
            raise
        if self._pending.get(ctx.key.text) is ctx:
            del self._pending[ctx.key.text]
        received = hvd.synchronize(ctx.handle)
        if not ctx.quantized:
            return received if factor == 1.0 else received.mul_(factor)
        return self._decode_mean(received, ctx, factor)

    # --- what users call --------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """What this rank has contributed so far.

        Returns:
            ``steps``, how often the gradient that came most often has come (small ones count where names are
            known), those before a loaded state included; ``raw_bytes``, the gradients as they were;
            ``wire_bytes``, what was handed to Horovod in their place (payloads, control tensors, uncompressed
            small gradients); ``compression_ratio``, the former over the latter.
        """
        return {
            "steps": max(self._uses.values(), default=0),
            "raw_bytes": self._raw_bytes,
            "wire_bytes": self._wire_bytes,
            "compression_ratio": self._raw_bytes / self._wire_bytes if self._wire_bytes else 1.0,
        }

    def reset(self) -> None:
        """Forget what is on its way, and what the ranks have agreed on, but not the noise and the statistics.

        For a training loop that goes on after it left a step between ``backward`` and ``step``. All ranks
        must call it, as often as each other, and clear Horovod's optimizer as well:

            >>> compressor.reset()
            >>> optimizer.load_state_dict(optimizer.state_dict())
            >>> optimizer.zero_grad()
        """
        abandoned = list(self._pending.values())
        self._pending.clear()
        self._announced.clear()
        self._resets += 1
        for pending in abandoned:
            pending.abandoned = True
            # Let Horovod forget what has arrived. The rest may never arrive: some rank may not have sent it.
            # After hvd.shutdown, Horovod knows none of it any more.
            with contextlib.suppress(hvd.HorovodInternalError, ValueError):
                if hvd.poll(pending.handle):
                    hvd.synchronize(pending.handle)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue with the same noise: the seed, and each gradient's uses."""
        return {"seed": self.seed, "uses": dict(self._uses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: this is no such state.
        """
        try:
            seed, uses = state["seed"], Counter(state["uses"])
            check_integer("seed", seed, 0, 2**64 - 1)
            for key, count in uses.items():
                check_integer(f"uses of {key}", count, 0, 2**63 - 1)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a state of an hvd_quant compressor: {error!r}") from error
        self.seed, self._uses = int(seed), uses

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a compressor belongs to its process and its model's parameters, and cannot be copied or "
            "pickled: make a new one, and hand it the state_dict() of the old one"
        )

    # --- identity ---------------------------------------------------------------------------------------

    def _key(self, tensor: torch.Tensor, quantized: bool) -> _Key:
        if self._names is not None:
            name = self._names.find(tensor) or self._names.find_sparse(tensor, self._pending)
            if name is not None:
                return _Key(name, named=True)
        if not self._pending:
            self._arrivals = {True: 0, False: 0}
        place = self._arrivals[quantized]
        self._arrivals[quantized] += 1
        return _Key(f"#{place}" if quantized else f"#small.{place}", named=False)

    def _noise_seed(self, key: _Key, use: int) -> int:
        """64 bits that depend on seed, rank, step and tensor, and on nothing else."""
        text = json.dumps([self.seed, self.process_set.rank(), use, key.text])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    # --- agreement between ranks ------------------------------------------------------------------------

    def _config(self) -> control.Description:
        return {
            "scheme": type(self.scheme).__name__,
            **asdict(self.scheme),
            "min_numel": self.min_numel,
            "exchange": "allgather",
            "wire version": wire.VERSION,
            "compressor": self._number,
            "resets": self._resets,
        }

    def _describe(self, key: _Key, tensor: torch.Tensor) -> control.Description:
        return {
            "name": key.text,
            "named": key.named,
            "shape": list(tensor.shape),
            "dtype": _DTYPES[tensor.dtype],
        }

    def _explain_mismatch(self, pending: _Pending) -> str:
        """Ask all ranks, which have all noticed, what they have. Patience is limited, lest one has died."""
        own = [self._config(), self._describe(pending.key, pending.gradient)]
        data = torch.frombuffer(bytearray(json.dumps(own).encode() + b"\n"), dtype=torch.uint8)
        handle = hvd.allgather_async(data, name="hvd_quant.mismatch", process_set=self.process_set)
        deadline = time.monotonic() + _EXPLAIN_SECONDS
        while not hvd.poll(handle) and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            answers = hvd.synchronize(handle) if hvd.poll(handle) else None
        except hvd.HorovodInternalError:
            answers = None
        if answers is None:
            return (
                "the ranks are configured differently, and did not all answer when asked how. "
                f"This one has {own[0]}, and noticed it at {own[1]}."
            )
        lines = bytes(answers.numpy()).decode().split("\n")[:-1]
        configs, tensors = zip(*map(json.loads, lines), strict=True)
        return control.explain_mismatch(configs, tensors)

    # --- codec ------------------------------------------------------------------------------------------

    def _encode(self, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        if tensor.device.type == "cpu":
            payload = native.encode(flat_array(tensor), self.scheme, seed, _DTYPES[tensor.dtype])
            return torch.from_numpy(payload)
        return torch_ops.encode(tensor.detach().reshape(-1), self.scheme, seed)

    def _decode_mean(self, received: torch.Tensor, pending: _Pending, factor: float) -> torch.Tensor:
        gradient = pending.gradient
        payloads = received.view(self.process_set.size(), -1)
        if gradient.device.type != "cpu":
            mean = torch_ops.decode_mean(list(payloads), dtype=gradient.dtype, factor=factor)
            return mean.view(gradient.shape)
        # A parameter's gradient is overwritten, as Horovod would have done; any other tensor is the caller's.
        # Where NumPy would see a copy of it, a new one is made as well.
        aligned = gradient.data_ptr() % gradient.element_size() == 0
        in_place = pending.key.named and gradient.is_contiguous() and aligned and not gradient.is_neg()
        mean = gradient if in_place else torch.empty(gradient.shape, dtype=gradient.dtype)
        native.decode_mean(
            list(payloads.numpy()), flat_array(mean), dtype=_DTYPES[gradient.dtype], factor=factor
        )
        return mean


class QSGDCompressor(QuantizedCompressor):
    """Gradients quantized by QSGD: ``hvd.DistributedOptimizer(..., compression=QSGDCompressor(bits=4))``.

    Args:
        bits, norm, bucket_size, coding, rounding: of the scheme, see `hvd_quant.QSGD`.
        **options: of the exchange, see `QuantizedCompressor`.

    Warning:
        Without ``named_parameters``, training in which some parameters get no gradient on some rank may stop
        with a `RankMismatchError`, because Horovod submits those in an order of its own on every rank. Pass
        them, or use `hvd_quant.torch.DistributedOptimizer`.
    """

    def __init__(
        self,
        bits: int = 4,
        norm: str = "max",
        bucket_size: int = 512,
        coding: str = "packed",
        rounding: str = "independent",
        **options: Any,
    ) -> None:
        super().__init__(QSGD(bits, norm, bucket_size, coding, rounding), **options)
