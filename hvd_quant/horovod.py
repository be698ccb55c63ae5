"""Shared parts of the compressors for Horovod's frameworks: process sets, hosts, and construction."""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import os
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType
from typing import Any, ClassVar

from horovod.common.process_sets import ProcessSet, global_process_set

from hvd_quant.exchange import cost
from hvd_quant.exchange.choice import ExchangeChoice
from hvd_quant.exchange.topology import NOT_HIERARCHICAL
from hvd_quant.reducer.options import Options
from hvd_quant.reducer.state import taken_over, without_own
from hvd_quant.schemes import DQSGD, Scheme, rounding_for


class _Ranks(list):
    """Ranks of the global process set, marked: ``hvd.init()`` replaces what differs from the new ones."""

    __hash__ = None

    def __ne__(self, other: object) -> bool:
        return True


def initialisation() -> object:
    """Return what stands for the present initialisation of Horovod: another object after each ``hvd.init()``.

    In elastic training that is whenever workers come or go. Of what was in flight before, nothing arrives.
    """
    ranks = global_process_set.ranks
    if not isinstance(ranks, _Ranks):
        global_process_set.ranks = ranks = _Ranks(ranks or ())
    return ranks


def is_elastic() -> bool:
    """Return whether ``horovodrun`` has started an elastic job, in which workers come and go."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


class _Numbering:
    """Numbers the compressors of a process in the order in which they were made, anew after ``hvd.init()``.

    Then there may be ranks that never had those that this process has dropped.
    """

    def __init__(self) -> None:
        self._made = itertools.count()
        self._alive: weakref.WeakValueDictionary[int, HorovodCompressor] = weakref.WeakValueDictionary()
        self._counters: defaultdict[tuple, itertools.count] = defaultdict(itertools.count)
        self._initialisation: object = None

    def add(self, compressor: HorovodCompressor) -> None:
        """Number a new compressor."""
        self.renew()
        self._alive[next(self._made)] = compressor
        compressor.number_as(self._next(compressor))

    def renew(self) -> None:
        """Number all compressors anew, if Horovod has been initialised since."""
        if self._initialisation is initialisation():
            return
        self._initialisation = initialisation()
        if self._alive:
            gc.collect()  # the others' numbers must not depend on when that happens
        self._counters.clear()
        for _, compressor in sorted(self._alive.items()):
            compressor.number_as(self._next(compressor))

    def _next(self, compressor: HorovodCompressor) -> int:
        # Ranks outside a process set need not make its compressors, so each set counts its own.
        process_set = compressor.process_set
        ranks = tuple(process_set.ranks or ()) if process_set.process_set_id != 0 else ()
        return next(self._counters[process_set.process_set_id, ranks])


_numbering = _Numbering()
renew_numbers = _numbering.renew


def refuse_class(compression: object) -> None:
    """Check that ``compression=`` is not a class of ours, though Horovod's own are classes.

    Raises:
        TypeError: it is a class of ours.
    """
    if isinstance(compression, type) and issubclass(compression, HorovodCompressor):
        name = compression.__name__
        raise TypeError(
            f"compression must be a compressor, not the class {name}: make one, as "
            f"{name}({compression._example})"
        )


class _CompressorType(type):
    """The class of compressors' classes: where Horovod calls ``compress`` of one, in place of a compressor's.

    Without it, such a call would complain about a missing argument, because ``self`` is the tensor.
    """

    def __getattribute__(cls, name: str) -> Any:
        attribute = super().__getattribute__(name)
        if name != "compress":
            return attribute

        @functools.wraps(attribute)
        def compress(*args: Any, **options: Any) -> Any:
            if not (args and isinstance(args[0], cls)):
                refuse_class(cls)
            return attribute(*args, **options)

        return compress


class HorovodCompressor(metaclass=_CompressorType):
    """Base of the compressors of both frameworks. Subclasses named after a scheme take its arguments:

        >>> class QSGDCompressor(QuantizedCompressor, scheme=QSGD): ...

    Args:
        options: what the user asked for.
        process_set: the ranks that take part.

    Raises:
        TypeError, ValueError: Horovod does not know ``process_set``.
    """

    _example: ClassVar[str] = "QSGD(bits=4)"  # arguments for the error about a class

    def __init_subclass__(cls, scheme: type[Scheme | DQSGD] | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if scheme is not None:
            cls.__init__ = _init_by_scheme(cls, scheme)  # type: ignore[method-assign]
            cls._example = "mean_bits=4, total_steps=1000" if scheme is DQSGD else "bits=4"

    def __init__(self, options: Options, process_set: ProcessSet) -> None:
        if not isinstance(process_set, ProcessSet):
            raise TypeError(f"process_set must be a ProcessSet of Horovod, not {process_set!r}")
        if process_set.process_set_id is None:
            raise ValueError(
                "Horovod does not know this process_set yet: hand it to hvd.init(process_sets=...) or to "
                "hvd.add_process_set before making the compressor"
            )
        self.options = options
        self.process_set = process_set
        self.in_use = False  # by one of our optimizers
        self._arguments: dict[str, Any] | None = None  # that make another one like it
        self._number = 0
        _numbering.add(self)

    def __getattr__(self, name: str) -> Any:
        """Return an option by its name."""
        if name in _OPTIONS:
            return getattr(self.options, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def compress(self, tensor: Any) -> tuple[Any, Any]:
        """Submit a gradient, and return what Horovod reduces in its place: called by Horovod.

        Args:
            tensor: tensor of any shape. Other dtypes than float32, float64, float16 and bfloat16 pass
                unchanged.

        Returns:
            The tensor for Horovod to reduce, and the context for `decompress`.

        Raises:
            RankMismatchError: the ranks are configured differently.
            RuntimeError: Horovod is not initialised, or what the front end says.
            ValueError: what the front end says.
        """
        raise NotImplementedError

    def decompress(self, tensor: Any, ctx: Any) -> Any:
        """Return the mean of a gradient: called by Horovod.

        Args:
            tensor: the reduced control tensor.
            ctx: context from `compress`; None for a tensor that passed unchanged.

        Returns:
            The mean over the ranks, or the sum for ``op=Sum``, in the gradient's shape and dtype.

        Raises:
            RankMismatchError: the ranks are configured differently, or disagree about what they sent.
            UnsupportedReductionError: Horovod was called with Adasum, Min, Max or Product.
            RuntimeError: what the front end says.
        """
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Return statistics of this rank.

        Returns:
            ``steps``, uses of the most frequent gradient; ``messages``, fused buckets sent; ``raw_bytes``,
            the uncompressed gradients; ``wire_bytes``, their encoded size (messages, control tensors,
            uncompressed small gradients); ``received_bytes``, bytes from other ranks by our own exchanges;
            ``compression_ratio``, raw over wire bytes. With a schedule of bits also ``bits``, a list with the
            bits of each step. In a run that was resumed, all go on from those of the loaded state.
        """
        raise NotImplementedError

    def _place_of_rank(self) -> tuple[int, int]:
        """Return the rank in the process set, and its size."""
        return self.process_set.rank(), self.process_set.size()

    def gather_state_dict(self) -> dict[str, Any] | None:
        """Return one state for a checkpoint, from which every rank can resume, and other numbers of ranks.

        Collective: all ranks call it, between steps. With error feedback, a rank takes its own residuals from
        it, or the mean of all residuals if there are more ranks then, or fewer.

        Returns:
            The state on the first rank; None on the others.

        Raises:
            RuntimeError: gradients are in flight.
        """
        self._check_between_steps()
        state, (rank, _) = self.state_dict(), self._place_of_rank()
        own = state.pop("residuals", None)
        if own is not None:
            counts: dict[str, int] = {}
            for of_rank in self._gather_object({key: len(one) for key, one in own.items()}):
                counts.update(of_rank)
            state = without_own(state)
            state["residuals_of_ranks"] = {
                key: self._gather_rows(key, own.get(key), count) for key, count in sorted(counts.items())
            }
        return state if rank == 0 else None

    def synchronize_state(self, broadcast_object: Callable[..., Any]) -> None:
        """Take over rank 0's state, but for residuals, which are each rank's own. Collective.

        Args:
            broadcast_object: Horovod's function of that name, of the same framework.
        """
        own = self.state_dict()
        others = broadcast_object(without_own(own), root_rank=0, name="hvd_quant.elastic")
        self.restore(taken_over(own, others))

    def _check_between_steps(self) -> None:
        """Raise RuntimeError if gradients are in flight, where `state_dict` does not do so."""

    def _gather_object(self, own: Any) -> list[Any]:
        """Return every rank's JSON value."""
        raise NotImplementedError

    def _gather_rows(self, key: str, own: Any, count: int) -> Any:
        """Return every rank's residual of a gradient, in rows; zeros for a rank that has none."""
        raise NotImplementedError

    def number_as(self, number: int) -> None:
        """Take a number, which compressors of one process set and one process have different ones of."""
        self._number = number

    def check_free(self, process_set: ProcessSet) -> None:
        """Check that one of our optimizers with this process set can use the compressor.

        Raises:
            ValueError: the compressor has another process set, or another optimizer.
        """
        if self.process_set.process_set_id != process_set.process_set_id:
            raise ValueError("give the compressor and the optimizer the same process_set")
        if self.in_use:
            raise ValueError("a compressor serves one optimizer: make another one for another optimizer")

    def _exchange_choice(self, hvd: ModuleType) -> ExchangeChoice:
        """Return the choice of the algorithm, before the ranks have announced their hosts."""
        link = cost.link_from_environment(hvd.local_size() == hvd.size(), cost.HOROVOD_LATENCY)
        return ExchangeChoice(self.options.exchange, self.process_set.size(), link, is_elastic())

    def _host(self, hvd: ModuleType, alike: bool) -> int:
        """Return what identifies this rank's host to the other ranks.

        Args:
            hvd: ``horovod.torch``, or another of Horovod's modules.
            alike: whether all hosts have equally many ranks, according to Horovod.

        Raises:
            ValueError: the user's exchange does not fit these hosts; on every rank.
        """
        hierarchical = alike and hvd.local_size() > 1 and hvd.cross_size() > 1
        # This is known without asking the other ranks: a late one would leave the others waiting.
        everyone = self.process_set.process_set_id == 0
        wrong = self.options.exchange == "hierarchical" and hvd.size() > 1 and not hierarchical
        if wrong and everyone and not is_elastic():
            raise ValueError(NOT_HIERARCHICAL)
        # If hosts have unequally many ranks, Horovod's number does not identify the host.
        return hvd.cross_rank() if alike else -1 - hvd.rank()

    @property
    def is_used(self) -> bool:
        """Whether it belongs to a training already."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a compressor that is unused as its arguments: for workers of Spark or Ray."""
        is_plain = getattr(type(self).__init__, "is_by_scheme", False)
        if self.is_used or not is_plain or self._arguments is None or self.process_set.process_set_id != 0:
            raise TypeError(
                "a compressor that is used belongs to its process, as does one with named_parameters, a "
                "process set or a class of its own, and cannot be copied or pickled: make a new one, and "
                "give it the state_dict() of the old one. In the state of an elastic job it is an argument "
                "of its own, such as compressor=compressor"
            )
        return functools.partial(type(self), **self._arguments), ()


_OPTIONS = {
    one.name: inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default)
    for one in fields(Options)
}


def _init_by_scheme(cls: type, scheme: type[Scheme | DQSGD]) -> Callable[..., None]:
    """Return an ``__init__`` that takes a scheme's arguments, and passes on a compressor's options."""
    arguments = [
        inspect.Parameter(one.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=one.default)
        for one in fields(scheme)
    ]
    # The default depends on error feedback.
    arguments = [one.replace(default=None) if one.name == "rounding" else one for one in arguments]
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    rest = inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)
    signature = inspect.Signature([own, *arguments, rest])
    shown = inspect.Signature(
        [own, *arguments, *(one for name, one in _OPTIONS.items() if name != "scheme"), rest]
    )

    def init(self: Any, *args: Any, **options: Any) -> None:
        given = signature.bind(self, *args, **options).arguments
        options = given.pop("options", {})
        del given["self"]
        given["rounding"] = rounding_for(given.get("rounding"), options.get("error_feedback") is True)
        super(cls, self).__init__(scheme(**given), **options)
        if "named_parameters" not in options:
            self._arguments = {**given, **{key: one for key, one in options.items() if key != "process_set"}}

    init.is_by_scheme = True  # type: ignore[attr-defined]
    init.__signature__ = shown  # type: ignore[attr-defined]
    init.__name__, init.__qualname__ = "__init__", f"{cls.__qualname__}.__init__"
    return init
