#!/usr/bin/env python3
"""The plots of docs/algorithms.md: levels and their variance, and DQ-SGD's bits over a run.

python scripts/plot_algorithms.py [FOLDER]     # writes algorithms_levels.png and algorithms_dqsgd.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in scripts/ alone

from benchmarks.papers import dqsgd  # noqa: E402
from benchmarks.papers.report import COLOURS, figure, legend_below  # noqa: E402
from hvd_quant import NUQSGD, QSGD  # noqa: E402


def plot_levels(path: Path, bits: int = 4) -> None:
    """Levels, and the exact variance of a value r, in units of N^2, between them."""
    fig, axes = figure(1, 2, width=10, height=4)
    for axis, r in zip(axes[0], (np.linspace(0, 1, 4001), np.geomspace(2**-9, 1, 4001)), strict=True):
        for number, kind in enumerate((QSGD, NUQSGD)):
            levels = kind(bits=bits).levels()
            above = np.clip(np.searchsorted(levels, r), 1, len(levels) - 1)
            variance = (levels[above] - r) * (r - levels[above - 1])
            name, colour = kind.__name__, COLOURS[number]
            axis.plot(r, variance, color=colour, linestyle=("-", "--")[number], label=f"{name}, variance")
            at = -0.03 - 0.035 * number  # below the axis of the variance, in parts of its height
            axis.plot(
                levels[1:] if axis is axes[0, 1] else levels,
                np.full(len(levels) - (axis is axes[0, 1]), at),
                color=colour,
                marker="|",
                markersize=9,
                linestyle="",
                transform=axis.get_xaxis_transform(),
                clip_on=False,
                label=f"{name}, levels",
            )
        axis.tick_params(axis="x", pad=14)
        axis.set_xlabel("r = |v| / N")
    axes[0, 0].set_ylabel("variance / N²")
    axes[0, 0].set_ylim(0)
    axes[0, 1].set_xscale("log", base=2)
    axes[0, 1].set_yscale("log")
    axes[0, 1].set_ylim(1e-6)
    fig.suptitle(f"{bits} bits", fontsize=10)
    legend_below(fig, axes[0, 0])
    fig.savefig(path, dpi=120)


def plot_schedule(path: Path) -> None:
    """Bits and gradient norm of a DQ-SGD run on the convex problem of `benchmarks.papers.dqsgd`."""
    run = dqsgd.convex(dqsgd.DYNAMIC, "l2", 4, seed=0)
    fig, axes = figure(2, 1, width=8, height=4.5, sharex=True)
    axes[0, 0].plot(run["norms"], color=COLOURS[1], linewidth=0.8)
    axes[0, 0].set_ylabel("gradient norm")
    axes[1, 0].step(
        range(len(run["bits_used"])), run["bits_used"], color=COLOURS[0], where="post", linewidth=0.8
    )
    axes[1, 0].axhline(4, color="black", linestyle=":", label="mean")
    axes[1, 0].set_ylabel("bits a value")
    axes[1, 0].set_xlabel("step")
    axes[1, 0].legend(loc="upper left", frameon=False)
    axes[0, 0].set_title(f"softmax regression, alpha = {dqsgd.ALPHA:.3f}, mean_bits=4", fontsize=9)
    fig.savefig(path, dpi=120)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    plot_levels(folder / "algorithms_levels.png")
    plot_schedule(folder / "algorithms_dqsgd.png")


if __name__ == "__main__":
    main()
