"""What the parts of `benchmarks.papers` share: confidence intervals, tables, the look of plots."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

Record = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind tell apart; markers and dashes say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# The 97.5 % quantile of Student's t, by degrees of freedom; above 30, the normal distribution's is near.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
_T += (2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval by Student's t; NaN of a single sample."""
    mean = statistics.fmean(samples)
    if len(samples) < 2 or not math.isfinite(mean):
        return mean, math.nan
    degrees = len(samples) - 1
    quantile = _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.6 / degrees
    return mean, quantile * statistics.stdev(samples) / math.sqrt(len(samples))


def plus_minus(mean: float, half: float, scale: float = 1.0, digits: int = 2) -> str:
    return f"{scale * mean:.{digits}f} ± {scale * half:.{digits}f}"


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for GitHub that can also be read as it is."""
    rows = [tuple(headers), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width if not n else "-" * (width - 1) + ":" for n, width in enumerate(widths)))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def each(function: Callable[..., Record], jobs: Sequence[tuple[Any, ...]], workers: int) -> list[Record]:
    """``function(*job)`` of all jobs, in processes of one thread each; results in the order of the jobs."""
    results: list[Record | None] = [None] * len(jobs)
    os.environ.update(HVD_QUANT_THREADS="1", OMP_NUM_THREADS="1")  # which the processes inherit
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        numbers = {pool.submit(function, *job): number for number, job in enumerate(jobs)}
        for done, future in enumerate(as_completed(numbers), 1):
            results[numbers[future]] = future.result()
            if done == len(jobs) or done % max(1, len(jobs) // 10) == 0:
                progress(f"  {done} of {len(jobs)}")
    return [result for result in results if result is not None]


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records with the same values of ``keys``, in the order of their first."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def figure(rows: int, columns: int, width: float = 10.0, height: float = 4.0, **options: Any) -> Any:
    """Figure and axes, the latter always an array of two dimensions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "font.size": 9})
    return pyplot.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )


def legend_below(fig: Any, axis: Any, columns: int = 4) -> None:
    """One legend for the figure, outside its axes, so that it hides no data."""
    handles, labels = axis.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
