"""What a rank of `benchmarks.step_time` does whatever its library: rows take turns, and each step is timed.

In each round every row takes a step, in an order that changes from round to round: what disturbs the machine
disturbs all rows alike.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hvd_quant import wire

WARM_UP = 3  # rounds that do not count: fused buckets, caches, traces and PowerSGD need them to settle
AT_LEAST = 5  # rounds that do, however long they take


class Row(Protocol):
    """A way to train."""

    @property
    def compressor(self) -> Any:
        """Ours; None where there is none."""

    @property
    def sizes(self) -> Sequence[int]:
        """How many values each gradient has."""

    @property
    def step(self) -> Callable[[Any], object]:
        """Trains on a batch; returns when that is done."""


class Library(Protocol):
    """What ranks talk to each other by."""

    rank: int
    barrier: Callable[[], object]

    def maximum(self, values: list[float]) -> list[float]:
        """The greatest of all ranks, item by item."""


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments that `benchmarks.step_time` hands to every rank, after the parser's own."""
    parser.add_argument("folder", type=Path, help="where rank 0 writes progress and figures.json")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="begin no further round after these")
    parser.add_argument("--before", action="store_true", help="the folder has another checkout's package")
    args = parser.parse_args()
    if args.before:
        sys.path.append(str(args.folder))
    return args


def tell(library: Library, folder: Path, text: str) -> None:
    """Say what the launch is doing."""
    if library.rank == 0:
        (folder / "progress").write_text(text)


def measure(
    library: Library, rows: Mapping[str, Row], batch: Any, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Figures of every row; seconds of a step are those of the rank that took longest, from a barrier on."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    before: dict[str, dict[str, float]] = {}
    begin = time.perf_counter()
    for number in range(-WARM_UP, args.steps):
        if number == 0:
            before = {name: row.compressor.stats() for name, row in rows.items() if row.compressor}
        for name in random.Random(number).sample(list(rows), len(rows)):
            doing = f"step {number + 1} of {args.steps}" if number >= 0 else "warming up"
            tell(library, args.folder, f"{name}, {doing}")
            library.barrier()
            start = time.perf_counter()
            rows[name].step(batch)
            times[name].append(time.perf_counter() - start)
        if number + 1 >= AT_LEAST and library.maximum([time.perf_counter() - begin])[0] > args.seconds:
            break
    figures: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        counted = times[name][WARM_UP:]
        figures[name] = {"seconds": library.maximum(counted)}
        if row.compressor:
            after = row.compressor.stats()
            received, buckets = (
                (after[key] - before[name][key]) / len(counted) for key in ("received_bytes", "messages")
            )
            quantized = [size for size in row.sizes if size >= row.compressor.min_numel]
            figures[name] |= {
                "received_bytes": library.maximum([received])[0],
                "payload_bytes": sum(wire.payload_size(row.compressor.scheme, size) for size in quantized),
                "buckets": buckets,
                "gradients": len(quantized),
            }
    return figures


def write(library: Library, folder: Path, figures: Mapping[str, Any]) -> None:
    """Hand the figures to `benchmarks.step_time`, and leave together."""
    if library.rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    library.barrier()
