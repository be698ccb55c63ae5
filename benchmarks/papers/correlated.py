"""Correlated beside independent rounding: the error of the mean over ranks whose gradients are similar.

Rank k of n has g + noise, g Gaussian, the noise so many times as large. The error is |mean of Q(g_k) - mean
of g_k|^2 over |mean of g_k|^2; intervals are over the seeds of the rounding, by Student's t.
Correlated rounding: Suresh et al., ICML 2022.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

import hvd_quant
from benchmarks.papers.report import (
    COLOURS,
    MARKERS,
    Record,
    figure,
    grouped,
    interval,
    legend_below,
    progress,
)
from hvd_quant import QSGD

VALUES, DRAWS = 1 << 15, 10
RANKS, NOISES, BITS = (2, 4, 8, 16), (0.0, 0.1, 0.3, 1.0, 3.0), (2, 4)
NORMS = ("max", "l2")
INDEPENDENT, CORRELATED = "independent", "correlated"


def sent(x: np.ndarray, scheme: QSGD, seed: int, rank: int, size: int) -> np.ndarray:
    """What all ranks decode of this one's gradient."""
    if scheme.rounding == INDEPENDENT:
        return hvd_quant.decode(hvd_quant.encode(x, scheme, seed=seed * size + rank))
    return hvd_quant.decode(hvd_quant.encode(x, scheme, seed=seed, rank=rank, size=size))


def run(workers: int) -> list[Record]:
    records = []
    for size in RANKS:
        progress(f"  {size} ranks")
        for noise in NOISES:
            random = np.random.default_rng(0)
            g = random.standard_normal(VALUES)
            own = [(g + noise * random.standard_normal(VALUES)).astype(np.float32) for _ in range(size)]
            mean = np.mean(own, axis=0, dtype=np.float64)
            for norm, bits in itertools.product(NORMS, BITS):
                record = {"norm": norm, "ranks": size, "noise": noise, "bits": bits}
                for rounding in (INDEPENDENT, CORRELATED):
                    errors, scheme = [], QSGD(bits, norm, rounding=rounding)
                    for seed in range(DRAWS):
                        decoded = [sent(x, scheme, seed, rank, size) for rank, x in enumerate(own)]
                        error = np.mean(decoded, axis=0, dtype=np.float64) - mean
                        errors.append(float(np.square(error).sum() / np.square(mean).sum()))
                    record[rounding], record[f"{rounding}_half"] = interval(errors)
                records.append(record)
    return sorted(records, key=lambda one: NORMS.index(one["norm"]))


HEADERS = ("norm", "ranks", "noise", "bits", INDEPENDENT, CORRELATED, "correlated of independent")


def rows(records: list[Record]) -> list[tuple[str, ...]]:
    return [
        (
            one["norm"],
            str(one["ranks"]),
            f"{one['noise']:g}",
            str(one["bits"]),
            *(f"{one[name]:.4g} ± {one[f'{name}_half']:.1g}" for name in (INDEPENDENT, CORRELATED)),
            f"{one[CORRELATED] / one[INDEPENDENT]:.3f}",
        )
        for one in records
    ]


def plot(records: list[Record], path: Path) -> None:
    fig, axes = figure(len(NORMS), len(BITS), width=9, height=7)
    for axis, (norm, bits) in zip(axes.flat, itertools.product(NORMS, BITS), strict=True):
        groups = grouped([one for one in records if (one["norm"], one["bits"]) == (norm, bits)], "noise")
        for number, ((noise,), ones) in enumerate(groups.items()):
            ratios = [one[CORRELATED] / one[INDEPENDENT] for one in ones]
            colour, marker = COLOURS[number], MARKERS[number]
            axis.plot(
                [one["ranks"] for one in ones], ratios, color=colour, marker=marker, label=f"noise {noise:g}"
            )
        axis.axhline(1.0, color="black", linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, labels=[str(size) for size in RANKS])
        axis.set_yscale("log")
        axis.set_xlabel("ranks")
        axis.set_title(f"{bits} bits, {norm} norm", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("correlated / independent")
    legend_below(fig, axes[0, 0], columns=5)
    fig.savefig(path, dpi=120)
