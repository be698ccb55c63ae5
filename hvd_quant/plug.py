"""What the compressors for Horovod's frameworks share: their options, and the arguments of their schemes."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from types import MethodType, ModuleType
from typing import Any, ClassVar

from horovod.common.process_sets import ProcessSet

from hvd_quant import wire
from hvd_quant.codec import native
from hvd_quant.exchange import cost
from hvd_quant.exchange.algorithms import EXCHANGES
from hvd_quant.exchange.control import Description
from hvd_quant.exchange.topology import NOT_BY_HOSTS, Topology
from hvd_quant.schemes import DQSGD, NUQSGD, QSGD, Scheme, check_choice, check_integer, rounding_for

FUSION_BYTES = 8 << 20
_counters: defaultdict[tuple, itertools.count] = defaultdict(itertools.count)


class Options:
    """A compressor's options: checked, kept, and described for ranks to compare.

    Args:
        scheme: how gradients are quantized.
        others: schemes that hold for some gradients instead.
        min_numel, exchange, error_feedback, fusion_bytes, process_set, seed: as the compressors explain them.

    Raises:
        TypeError, ValueError: an argument is not of its type, or not in its range.
    """

    _example: ClassVar[str] = "QSGD(bits=4)"  # arguments, for who has handed over the class

    def __init__(
        self,
        scheme: Scheme | DQSGD,
        others: Sequence[Scheme] = (),
        *,
        min_numel: int,
        exchange: str,
        error_feedback: bool,
        fusion_bytes: int,
        process_set: ProcessSet,
        seed: int,
    ) -> None:
        check_integer("min_numel", min_numel, 0, 2**63 - 1)
        check_choice("exchange", exchange, EXCHANGES)
        if not isinstance(error_feedback, bool):
            raise TypeError(f"error_feedback must be True or False, not {error_feedback!r}")
        roundings = {one.rounding for one in (scheme, *others)}
        if "nearest" in roundings and not error_feedback:
            raise ValueError(
                'rounding="nearest" is biased, and needs error_feedback=True, which makes up for that'
            )
        check_integer("fusion_bytes", fusion_bytes, 0, 2**63 - 1)
        check_integer("seed", seed, 0, 2**64 - 1)
        native.threads()  # this and the next check what the environment says
        cost.stated_bandwidth()
        if not isinstance(process_set, ProcessSet):
            raise TypeError(f"process_set must be a ProcessSet of Horovod, not {process_set!r}")
        if process_set.process_set_id is None:
            raise ValueError(
                "Horovod does not know this process_set yet: hand it to hvd.init(process_sets=...) or to "
                "hvd.add_process_set before making the compressor"
            )
        self.scheme = scheme
        self.min_numel = int(min_numel)
        self.exchange = exchange
        self.error_feedback = error_feedback
        self.fusion_bytes = int(fusion_bytes)
        self.process_set = process_set
        self.seed = int(seed)
        self.in_use = False  # by an optimizer of ours
        self._shares_noise = "correlated" in roundings
        self._link: cost.Link | None = None  # until Horovod is asked where the ranks are
        self._topology: Topology | None = None  # until all ranks have told
        # Several compressors of one process stay apart by their numbers. Ranks that are not in a process set
        # need not make its compressors, so each set counts its own.
        self._number = next(_counters[process_set.process_set_id, tuple(process_set.ranks or ())])

    def check_free(self, process_set: ProcessSet) -> None:
        """Check that an optimizer of ours with this process set can have the compressor.

        Raises:
            ValueError: it has another process set, or another optimizer.
        """
        if self.process_set.process_set_id != process_set.process_set_id:
            raise ValueError("give the compressor and the optimizer the same process_set")
        if self.in_use:
            raise ValueError("a compressor serves one optimizer: make another one for another optimizer")

    def _host(self, hvd: ModuleType, alike: bool) -> int:
        """What to tell the other ranks of this one's host.

        Args:
            hvd: ``horovod.torch``, or another of Horovod's modules.
            alike: whether all hosts have equally many ranks, by Horovod's word.

        Raises:
            ValueError: the exchange that the user asked for is none for these hosts; on every rank.
        """
        by_hosts = alike and hvd.local_size() > 1 and hvd.cross_size() > 1
        # Of all ranks this is known without asking them: one that came late would leave the others waiting.
        everyone = self.process_set.process_set_id == 0
        if self.exchange == "hierarchical" and everyone and hvd.size() > 1 and not by_hosts:
            raise ValueError(NOT_BY_HOSTS)
        # Where hosts have unequally many ranks, Horovod's number is none of the host.
        return hvd.cross_rank() if alike else -1 - hvd.rank()

    def _locate(self, topology: Topology) -> None:
        """Note where the ranks are, once all have told.

        Raises:
            ValueError: the exchange that the user asked for is none for that; on every rank.
        """
        if self.exchange == "hierarchical" and topology.ranks_a_host == 1 and len(topology.hosts) > 1:
            raise ValueError(NOT_BY_HOSTS)
        self._topology = topology

    def _algorithm_for(self, nbytes: int, count: int, *, by_hosts: bool = True) -> str:
        """The name of the exchange for so many values in so many bytes: the same on all ranks."""
        if self.exchange != "auto":
            too_large = self.exchange == "hierarchical" and not cost.fits(count)
            return "scatter_allgather" if too_large else self.exchange
        link = replace(self._link, ranks_a_host=self._topology.ranks_a_host)
        return cost.choose(link, self.process_set.size(), nbytes, count, by_hosts=by_hosts)

    def _config(self) -> Description:
        """What must be the same on all ranks."""
        return {
            "scheme": type(self.scheme).__name__,
            **asdict(self.scheme),
            "min_numel": self.min_numel,
            "exchange": self.exchange,
            "error_feedback": self.error_feedback,
            "fusion_bytes": self.fusion_bytes,
            "link": asdict(self._link),
            "wire version": wire.VERSION,
            "compressor": self._number,
            **({"seed": self.seed} if self._shares_noise else {}),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a compressor belongs to its process, and cannot be copied or pickled: make a new one, and hand "
            "it the state_dict() of the old one"
        )


# --- compressors, and not their classes -------------------------------------------------------------------


def refuse_class(compression: object) -> None:
    """Check that ``compression=`` has not been given a class of ours, though Horovod's own are classes.

    Raises:
        TypeError: it is a class of ours.
    """
    if isinstance(compression, type) and issubclass(compression, Options):
        name = compression.__name__
        raise TypeError(
            f"compression must be a compressor, not the class {name}: make one, as "
            f"{name}({compression._example})"
        )


class CompressorMethod:
    """Decorates the first method that Horovod calls: where Horovod has the class itself, that is refused.

    Called on the class, with the tensor for ``self``, the method would miss an argument, and say no more.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        functools.update_wrapper(self, function)

    def __get__(self, instance: Options | None, owner: type[Options]) -> Callable[..., Any]:
        if instance is not None:
            return MethodType(self._function, instance)

        @functools.wraps(self._function)
        def of_class(*args: Any, **options: Any) -> Any:
            if not (args and isinstance(args[0], owner)):
                refuse_class(owner)
            return self._function(*args, **options)

        return of_class


# --- arguments of the schemes, for compressors that are named after one -----------------------------------


class QSGDArguments:
    """Takes those of `hvd_quant.QSGD`, and hands on the other options."""

    _example: ClassVar[str] = "bits=4"

    def __init__(
        self,
        bits: int = 4,
        norm: str = "max",
        bucket_size: int = 512,
        coding: str = "packed",
        rounding: str | None = None,
        **options: Any,
    ) -> None:
        rounding = rounding_for(rounding, options.get("error_feedback") is True)
        super().__init__(QSGD(bits, norm, bucket_size, coding, rounding), **options)


class NUQSGDArguments:
    """Takes those of `hvd_quant.NUQSGD`, and hands on the other options."""

    _example: ClassVar[str] = "bits=4"

    def __init__(
        self,
        bits: int = 4,
        norm: str = "l2",
        bucket_size: int = 512,
        coding: str = "packed",
        rounding: str | None = None,
        **options: Any,
    ) -> None:
        rounding = rounding_for(rounding, options.get("error_feedback") is True)
        super().__init__(NUQSGD(bits, norm, bucket_size, coding, rounding), **options)


class DQSGDArguments:
    """Takes those of `hvd_quant.DQSGD`, and hands on the other options."""

    _example: ClassVar[str] = "mean_bits=4, total_steps=1000"

    def __init__(
        self,
        k: float | None = None,
        mean_bits: float | None = None,
        total_steps: int | None = None,
        alpha: float = 1.0,
        min_bits: int = 2,
        max_bits: int = 8,
        norm: str = "max",
        bucket_size: int = 512,
        coding: str = "packed",
        rounding: str | None = None,
        **options: Any,
    ) -> None:
        rounding = rounding_for(rounding, options.get("error_feedback") is True)
        scheme = DQSGD(
            k, mean_bits, total_steps, alpha, min_bits, max_bits, norm, bucket_size, coding, rounding
        )
        super().__init__(scheme, **options)
