"""The papers' claims, measured: a table and a plot of each.

    python -m benchmarks.papers                                    # all parts, on two cores
    python -m benchmarks.papers --parts variance dqsgd --markdown --plots docs/papers --json papers.json

Parts: variance (exact and drawn, beside the bounds), entropy (bits a value of the codings), dqsgd (DQ-SGD
beside fixed bits, at equal total bits), training (NUQSGD, QSGD, error feedback), correlated (rounding).
Intervals are of 95 %. Ranks are simulated in one process; Fashion-MNIST must be installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path

from benchmarks.papers.report import markdown, progress

PARTS = ("variance", "entropy", "dqsgd", "training", "correlated")


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records to FILE")
    parser.add_argument("--markdown", action="store_true", help="headings for GitHub above the tables")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write PART.png for every part")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("--workers must be positive")
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)

    results = {}
    for name in args.parts:
        part = importlib.import_module(f"benchmarks.papers.{name}")
        progress(f"{name} ...")
        begin = time.perf_counter()
        records = part.run(args.workers)
        seconds = time.perf_counter() - begin
        progress(f"{name}: {seconds:.0f} s")
        results[name] = {"seconds": seconds, "records": records}
        print(f"### {name}\n" if args.markdown else f"{name}\n")
        print(markdown(part.HEADERS, part.rows(records)), end="\n\n")
        for note in part.notes(records) if hasattr(part, "notes") else ():
            print(f"- {note}")
        print(flush=True)
        if args.json:  # after every part, so that a run that is stopped has left something
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        if args.plots:
            part.plot(records, args.plots / f"{name}.png")


if __name__ == "__main__":
    main()
