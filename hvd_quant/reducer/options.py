"""Options of compressors, checked, and described for ranks to compare."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from hvd_quant import wire
from hvd_quant.codec import native
from hvd_quant.exchange import cost
from hvd_quant.exchange.algorithms import EXCHANGES
from hvd_quant.reducer.errors import Description
from hvd_quant.reducer.overrides import Overrides
from hvd_quant.schemes import DQSGD, Scheme, check_choice, check_integer

FUSION_BYTES = 8 << 20


@dataclass
class Options:
    """Options of compressors, in keyword arguments of theirs.

    Args:
        scheme: how gradients are quantized.
        overrides: which gradients are quantized otherwise, or not at all: a mapping of shell patterns on
            their names to schemes or None, such as ``{"*.bias": None, "embed.*": QSGD(bits=8)}``, or the path
            of a YAML or TOML file with one; see `Overrides`. The first pattern that matches holds.
            ``min_numel`` holds for all. It needs the parameters' names.
        min_numel: gradients of fewer values stay uncompressed.
        exchange: ``"allgather"``, every rank receives all payloads; ``"scatter_allgather"``, every rank
            averages one chunk and sends the mean to all: fewer bytes to receive with three or more ranks, but
            a second rounding; ``"hierarchical"``, the ranks of a host average their gradients uncompressed,
            and the hosts exchange the quantized means; ``"auto"``, the quickest by the cost model in
            `hvd_quant.exchange.cost`.
        error_feedback: whether each rank keeps, for every gradient, the quantization error, and adds it to
            the next one (Karimireddy et al., ICML 2019). It takes a float32 buffer of each gradient's size.
            Schemes in ``overrides`` keep the rounding that they have; in a file, they have the compressor's
            unless they name another.
        fusion_bytes: gradients travel together in fused buckets of about this size (before they are encoded);
            0 sends every gradient by itself.
        seed: seed of the rounding noise, 0 to 2^64 - 1. Each rank draws its own noise from it. For
            ``rounding="correlated"`` all ranks need the same one.

    Raises:
        TypeError, ValueError: an argument is not of its type, or not in its range; or an environment variable
            is invalid.
    """

    scheme: Scheme | DQSGD
    overrides: Overrides | Mapping[str, Scheme | None] | str | os.PathLike | None = None
    min_numel: int = 1024
    exchange: str = "auto"
    error_feedback: bool = False
    fusion_bytes: int = FUSION_BYTES
    seed: int = 0

    def __post_init__(self) -> None:
        self.overrides = Overrides(self.overrides, self.scheme.rounding)
        check_integer("min_numel", self.min_numel, 0, 2**63 - 1)
        check_choice("exchange", self.exchange, EXCHANGES)
        if not isinstance(self.error_feedback, bool):
            raise TypeError(f"error_feedback must be True or False, not {self.error_feedback!r}")
        if "nearest" in self._roundings and not self.error_feedback:
            raise ValueError(
                'rounding="nearest" is biased, and needs error_feedback=True, which makes up for that'
            )
        check_integer("fusion_bytes", self.fusion_bytes, 0, 2**63 - 1)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        native.threads()  # this and the next check the environment
        cost.stated_bandwidth()
        self._has_overrides = bool(self.overrides)
        self.min_numel, self.fusion_bytes = int(self.min_numel), int(self.fusion_bytes)
        self.seed = int(self.seed)

    @property
    def _roundings(self) -> set[str]:
        schemes = [self.scheme, *(scheme for _, scheme in self.overrides if scheme is not None)]
        return {scheme.rounding for scheme in schemes}

    @property
    def needs_names(self) -> bool:
        """Whether gradients must be identified from step to step."""
        return self.error_feedback or bool(self.overrides)

    def scheme_of(self, name: str | None, count: int, present: Scheme) -> Scheme | None:
        """Return a gradient's scheme; None if it stays uncompressed.

        Args:
            name: name of the gradient; None if it is unknown.
            count: number of its values.
            present: the user's scheme in this step.
        """
        if count < self.min_numel:
            return None
        return self.overrides.scheme(name, present) if self._has_overrides and name is not None else present

    def describe(self, link: cost.Link) -> Description:
        """Describe what must be the same on all ranks.

        Args:
            link: link between the ranks, which the environment can change.
        """
        # With correlated rounding ranks share their noise.
        seed = {"seed": self.seed} if "correlated" in self._roundings else {}
        return {
            "scheme": type(self.scheme).__name__,
            **asdict(self.scheme),
            "min_numel": self.min_numel,
            "exchange": self.exchange,
            "error_feedback": self.error_feedback,
            "fusion_bytes": self.fusion_bytes,
            "overrides": [[pattern, str(scheme)] for pattern, scheme in self.overrides],
            "link": asdict(link),
            "wire version": wire.VERSION,
            **seed,
        }
