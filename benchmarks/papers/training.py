"""NUQSGD beside QSGD with both norms, and error feedback at 2 bits: accuracy on Fashion-MNIST.

Error feedback rounds to nearest, as the compressor does by default, and for comparison stochastically.
Intervals are over the seeds, by Student's t.
"""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.papers import simulate
from benchmarks.papers.report import (
    COLOURS,
    MARKERS,
    Record,
    each,
    figure,
    grouped,
    interval,
    legend_below,
    plus_minus,
)
from hvd_quant import NUQSGD, QSGD

SCHEMES = {"QSGD l2": (QSGD, "l2"), "QSGD max": (QSGD, "max"), "NUQSGD l2": (NUQSGD, "l2")}
FLOAT32 = "float32"
NO, NEAREST, STOCHASTIC = "no", "nearest", "stochastic"  # error feedback, and how it rounds
BITS, SEEDS, EPOCHS = (2, 3, 4), 3, 3


def one(name: str, bits: int, error_feedback: str, seed: int, epochs: int) -> Record:
    scheme = None
    if name != FLOAT32:
        kind, norm = SCHEMES[name]
        scheme = kind(
            bits=bits, norm=norm, rounding="nearest" if error_feedback == NEAREST else "independent"
        )
    log = simulate.train(scheme, seed, epochs, error_feedback != NO)
    return {"scheme": name, "bits": bits, "error_feedback": error_feedback, "seed": seed, **log}


def run(workers: int) -> list[Record]:
    jobs = [(FLOAT32, 32, NO, seed, EPOCHS) for seed in range(SEEDS)]
    jobs += [(name, bits, NO, s, EPOCHS) for name in SCHEMES for bits in BITS for s in range(SEEDS)]
    jobs += [(name, 2, NEAREST, seed, EPOCHS) for name in SCHEMES for seed in range(SEEDS)]
    jobs += [(name, 2, STOCHASTIC, seed, EPOCHS) for name in SCHEMES for seed in range(SEEDS)]
    return each(one, jobs, workers)


HEADERS = ("scheme", "bits", "error feedback", "accuracy, %", "test loss", "MB a rank")


def rows(records: list[Record]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            str(bits),
            feedback,
            plus_minus(*interval([run["accuracy"][-1] for run in runs]), scale=100),
            plus_minus(*interval([run["loss"][-1] for run in runs]), digits=3),
            f"{runs[0]['megabytes'][-1]:.1f}",
        )
        for (name, bits, feedback), runs in grouped(records, "scheme", "bits", "error_feedback").items()
    ]


def notes(records: list[Record]) -> list[str]:
    return [
        f"{name}, {bits} bits, error feedback: {feedback}: {lost} of {len(runs)} diverged."
        for (name, bits, feedback), runs in grouped(records, "scheme", "bits", "error_feedback").items()
        if (lost := sum(not math.isfinite(run["loss"][-1]) for run in runs))
    ]


def plot(records: list[Record], path: Path) -> None:
    fig, axes = figure(1, 2, height=4.2)
    final = {
        key: (interval([100 * r["accuracy"][-1] for r in runs]), interval([r["loss"][-1] for r in runs]))
        for key, runs in grouped(records, "scheme", "bits", "error_feedback").items()
    }
    for axis, quantity in zip(axes[0], (0, 1), strict=True):
        mean, half = final[FLOAT32, 32, NO][quantity]
        axis.axhspan(mean - half, mean + half, color="grey", alpha=0.25, label="float32, 95 % interval")
        for number, name in enumerate(SCHEMES):
            shift = 0.06 * (number - 1)
            look = {"color": COLOURS[number], "marker": MARKERS[number], "capsize": 3}
            points = [final[name, bits, NO][quantity] for bits in BITS]
            at = [bits + shift for bits in BITS]
            axis.errorbar(at, *zip(*points, strict=True), label=name, **look)
            if not math.isfinite(final[name, 2, NEAREST][1][0]):
                continue  # diverged: in the table alone
            mean, half = final[name, 2, NEAREST][quantity]
            label = f"{name}, error feedback"
            axis.errorbar([1.8 + shift], [mean], [half], fillstyle="none", linestyle="", label=label, **look)
        axis.set_xticks(BITS)
        axis.set_xlabel("bits a value")
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[0, 1].set_ylabel("test loss")
    axes[0, 1].set_yscale("log")
    legend_below(fig, axes[0, 0])
    fig.savefig(path, dpi=120)
