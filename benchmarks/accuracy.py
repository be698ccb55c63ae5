#!/usr/bin/env python3
"""Test accuracy after equal epochs, with float32 and with quantized gradients, over several seeds.

    python benchmarks/accuracy.py --markdown --json accuracy.json

Runs an example on Fashion-MNIST under horovodrun once for every seed and kind of gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LABELS = {"none": "float32", "fp16": "float16"}
EXAMPLES = Path(__file__).parents[1] / "examples"


def train(kind: str, seed: int, args: argparse.Namespace, log: Path) -> dict[str, Any]:
    """The last epoch's record of a run; ``kind`` is none, fp16, SCHEME:BITS, or SCHEME:BITS:ef."""
    compression, *options = kind.split(":")
    launcher = Path(sys.executable).with_name("horovodrun")
    example = EXAMPLES / f"{args.example}_fashion_mnist.py"
    command = [launcher, f"--{args.controller}", "-np", str(args.ranks), sys.executable, example]
    command += ["--compression", compression, "--epochs", str(args.epochs), "--seed", str(seed)]
    command += ["--json-log", log] + (["--bits", options[0]] if options else [])
    command += ["--error-feedback"] if options[1:] == ["ef"] else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or "bit-identical" not in done.stdout:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return json.loads(log.read_text().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["none", "qsgd:4", "nuqsgd:4", "dqsgd:4", "qsgd:2", "qsgd:2:ef"],
        metavar="none|fp16|(qsgd|nuqsgd|dqsgd):BITS[:ef]",
    )
    parser.add_argument("--example", choices=("torch", "tf2", "keras"), default="torch")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--controller", choices=("gloo", "mpi"), default="gloo")
    parser.add_argument("--markdown", action="store_true", help="print a table for a Markdown document")
    parser.add_argument("--json", type=Path, help="write all records to this file")
    args = parser.parse_args()

    records: dict[str, list[dict[str, Any]]] = {kind: [] for kind in args.kinds}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for kind in args.kinds:
                record = train(kind, seed, args, Path(folder) / "log.jsonl")
                records[kind].append(record)
                print(
                    f"seed {seed}, {kind}: {100 * record['test_accuracy']:.2f} %", file=sys.stderr, flush=True
                )

    header = ("gradients", "test accuracy, mean", "each seed", "difference", "fewer bytes")
    rows = []
    means = {
        kind: statistics.mean(100 * one["test_accuracy"] for one in runs) for kind, runs in records.items()
    }
    for kind, runs in records.items():
        each = ", ".join(f"{100 * one['test_accuracy']:.2f}" for one in runs)
        difference = "" if kind == args.kinds[0] else f"{means[kind] - means[args.kinds[0]]:+.2f} points"
        ratio = runs[0]["raw_bytes"] / runs[0]["wire_bytes"]
        name = LABELS.get(kind, runs[0]["compression"]) + (", error feedback" if kind.endswith(":ef") else "")
        rows.append((name, f"{means[kind]:.2f} %", each, difference, f"{ratio:.2f} x"))
    separator = " | " if args.markdown else "   "
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        separator.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    ]
    if args.markdown:
        lines.insert(1, "---|" * len(header))
        lines = [f"| {line.strip()} |" if i != 1 else f"|{line}" for i, line in enumerate(lines)]
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
