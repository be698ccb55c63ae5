#!/usr/bin/env python3
"""Put training runs side by side: a table, and a plot of accuracy and loss against epochs and bytes sent.

    python examples/compare_runs.py --plot demo.png fp32.jsonl qsgd.jsonl

The files are those that ``torch_fashion_mnist.py --json-log FILE`` writes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Run = list[dict[str, Any]]  # one record an epoch
LABELS = {"none": "float32", "fp16": "float16", "qsgd": "QSGD", "nuqsgd": "NUQSGD", "dqsgd": "DQ-SGD"}


def label(run: Run) -> str:
    name, _, bits = run[0]["compression"].partition("-")
    feedback = "with error feedback" if run[0]["error_feedback"] else ""
    return " ".join(f"{LABELS.get(name, name)} {bits.replace('bit', ' bits')} {feedback}".split())


def show(runs: list[Run]) -> None:
    table = Table(
        "gradients", "test accuracy", "test loss", "sent by a rank", "fewer bytes", "time of training"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for run in runs:
        last = run[-1]
        table.add_row(
            label(run),
            f"{100 * last['test_accuracy']:.2f} %",
            f"{last['test_loss']:.4f}",
            f"{last['wire_bytes'] / 1e6:.1f} MB",
            f"{last['raw_bytes'] / last['wire_bytes']:.2f} x" if last["wire_bytes"] else "-",
            f"{sum(record['seconds'] for record in run):.0f} s",
        )
    Console(width=None if Console().is_terminal else 100).print(table)


def plot(runs: list[Run], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharey="row", sharex="col", layout="constrained")
    for run in runs:
        epochs = [record["epoch"] for record in run]
        megabytes = [record["wire_bytes"] / 1e6 for record in run]
        accuracy = [100 * record["test_accuracy"] for record in run]
        loss = [record["test_loss"] for record in run]
        for row, values in enumerate((accuracy, loss)):
            axes[row, 0].plot(epochs, values, marker="o", label=label(run))
            axes[row, 1].plot(megabytes, values, marker="o", label=label(run))
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("test loss")
    axes[1, 0].set_xlabel("epoch")
    axes[1, 1].set_xlabel("gradient bytes sent by a rank (MB)")
    axes[1, 1].set_xscale("log")
    axes[1, 0].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(f"Fashion-MNIST, {runs[0][0]['ranks']} ranks")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, help="write a plot to this file (PNG, SVG or PDF by its ending)")
    args = parser.parse_args()
    runs = [[json.loads(line) for line in path.read_text().splitlines()] for path in args.runs]
    for path, run in zip(args.runs, runs, strict=True):
        if not run:
            parser.error(f"{path} holds no epoch: the run did not get that far")
    show(runs)
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
