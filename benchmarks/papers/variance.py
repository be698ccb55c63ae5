"""Variance of quantization, exact and as drawn, beside the papers' bounds.

Exact: the sum of N^2 (l_j+1 - r)(r - l_j), in float64. Drawn: the mean of |Q(v) - v|^2 over encodings with
different seeds, its interval by Student's t over these. Both over |v|^2. Bounds hold for every bucket, so
they stand beside the worst one.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

import hvd_quant
from benchmarks.papers.report import COLOURS, MARKERS, Record, figure, interval, legend_below, progress
from hvd_quant import NUQSGD, QSGD
from hvd_quant.schemes import Scheme

VALUES, DRAWS = 49152, 20  # not more values than the recorded gradients have
BUCKETS, BITS = (64, 512, 4096), (2, 3, 4, 6, 8)
SCHEMES = {
    "QSGD l2": (QSGD, "l2"),
    "QSGD max": (QSGD, "max"),
    "NUQSGD l2": (NUQSGD, "l2"),
    "NUQSGD max": (NUQSGD, "max"),
}


def gradients() -> dict[str, np.ndarray]:
    """Arrays of VALUES values: drawn ones, and some of the Fashion-MNIST model's."""
    from benchmarks.papers import simulate

    random = np.random.default_rng(0)
    shapes = {
        "Gaussian": random.standard_normal(VALUES),
        "Laplace": random.laplace(size=VALUES),
        "Student t, 3": random.standard_t(3, VALUES),
    }
    epoch = simulate.steps_an_epoch()
    at = {"trained, step 0": 0, "trained, epoch 1": epoch, "trained, epoch 3": 3 * epoch - 1}
    shapes |= simulate.record_gradients(at, epochs=3)
    return {name: values[:VALUES].astype(np.float32) for name, values in shapes.items()}


def exact(buckets: np.ndarray, scheme: Scheme) -> np.ndarray:
    """E |Q(v) - v|^2 of each row."""
    v = np.abs(buckets.astype(np.float64))
    norm = v.max(1, keepdims=True) if scheme.norm == "max" else np.linalg.norm(v, axis=1, keepdims=True)
    r = np.divide(v, norm, out=np.zeros_like(v), where=norm > 0)
    levels = scheme.levels()
    above = np.clip(np.searchsorted(levels, r), 1, len(levels) - 1)
    return (norm**2 * (levels[above] - r) * (r - levels[above - 1])).sum(1)


def run(workers: int) -> list[Record]:
    progress("  recording gradients of a training run")
    records = []
    for shape, x in gradients().items():
        progress(f"  {shape}")
        total = float(np.square(x.astype(np.float64)).sum())
        for (name, (kind, norm)), d, bits in itertools.product(SCHEMES.items(), BUCKETS, BITS):
            scheme = kind(bits=bits, norm=norm, bucket_size=d)
            buckets = x.reshape(-1, d)
            variances = exact(buckets, scheme)
            squares = np.square(buckets.astype(np.float64)).sum(1)
            relative = np.divide(variances, squares, out=np.zeros_like(squares), where=squares > 0)
            drawn = [
                float(np.square(hvd_quant.decode(payload).astype(np.float64) - x).sum()) / total
                for payload in (hvd_quant.encode(x, scheme, seed=seed) for seed in range(DRAWS))
            ]
            mean, half = interval(drawn)
            records.append(
                {
                    "gradient": shape,
                    "scheme": name,
                    "bucket_size": d,
                    "bits": bits,
                    "exact": float(variances.sum()) / total,
                    "drawn": mean,
                    "drawn_half": half,
                    "worst_bucket": float(relative.max()),
                    "bound": scheme.variance_bound(d),
                }
            )
    return records


HEADERS = ("scheme", "bucket", "bits", "gradient", "exact", "drawn", "worst bucket", "bound", "of bound")


def rows(records: list[Record]) -> list[tuple[str, ...]]:
    """Those of 2 to 4 bits and buckets of 512: all are in the JSON file and in the notes."""
    return [
        (
            one["scheme"],
            str(one["bucket_size"]),
            str(one["bits"]),
            one["gradient"],
            f"{one['exact']:.4g}",
            f"{one['drawn']:.4g} ± {one['drawn_half']:.1g}",
            f"{one['worst_bucket']:.4g}",
            f"{one['bound']:.4g}",
            f"{one['worst_bucket'] / one['bound']:.2f}",
        )
        for one in records
        if one["bucket_size"] == 512 and one["bits"] in (2, 3, 4)
    ]


def notes(records: list[Record]) -> list[str]:
    within = sum(one["worst_bucket"] <= one["bound"] * (1 + 1e-9) for one in records)
    hit = sum(abs(one["drawn"] - one["exact"]) <= one["drawn_half"] for one in records)
    return [
        f"{within} of {len(records)} cases have the worst bucket within the bound.",
        f"{hit} of {len(records)} intervals of 95 % hold the exact variance; {0.95 * len(records):.0f} "
        "are expected.",
    ]


def plot(records: list[Record], path: Path) -> None:
    shapes = ("Gaussian", "Student t, 3", "trained, epoch 3")
    fig, axes = figure(len(BUCKETS), len(shapes), width=10, height=8.5, sharex=True, sharey=True)
    by = {(one["gradient"], one["scheme"], one["bucket_size"], one["bits"]): one for one in records}
    for (row, d), (column, shape) in itertools.product(enumerate(BUCKETS), enumerate(shapes)):
        axis = axes[row, column]
        for number, name in enumerate(SCHEMES):
            cases = [by[shape, name, d, bits] for bits in BITS]
            means, halves = [one["drawn"] for one in cases], [one["drawn_half"] for one in cases]
            look = {"color": COLOURS[number], "marker": MARKERS[number], "linestyle": ""}
            axis.errorbar(BITS, means, halves, label=f"{name}, drawn", **look)
            axis.plot(BITS, [one["exact"] for one in cases], color=COLOURS[number])
            axis.plot(BITS, [one["bound"] for one in cases], color=COLOURS[number], linestyle=":")
        axis.plot([], [], color="black", label="exact")
        axis.plot([], [], color="black", linestyle=":", label="bound")
        axis.set_title(f"{shape}, buckets of {d}", fontsize=9)
        axis.set_yscale("log")
    for axis in axes[-1]:
        axis.set_xlabel("bits a value")
    for axis in axes[:, 0]:
        axis.set_ylabel("E |Q(v) - v|² / |v|²")
    legend_below(fig, axes[0, 0], columns=6)
    fig.savefig(path, dpi=120)
