"""The command ``hvd-quant``: ``doctor`` checks machines, ``bench`` runs the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hvd_quant.version import __version__

DOCTOR = """Look at this machine, or, under a launcher, at all of a job's, and say what is odd.

    hvd-quant doctor
    horovodrun -np 4 -H node0:2,node1:2 hvd-quant doctor

Exit status: 0, or 1 if something is found that will not work."""

BENCH = """Run one of the benchmarks of hvd_quant's repository, with its own arguments (--help among them)."""


def _patience(text: str) -> float:
    """Parse a number of seconds, above 0 and within a day."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= 86400.0:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds, above 0 and within a day, not {text!r}"
        )
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (without its name) and return its exit status."""
    parser = argparse.ArgumentParser(prog="hvd-quant", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hvd-quant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    doctor = commands.add_parser(
        "doctor", help="look at machines and say what is odd", description=DOCTOR, **as_written
    )
    doctor.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write everything as JSON to FILE (default: standard output)",
    )
    doctor.add_argument(
        "--patience",
        type=_patience,
        default=60.0,
        metavar="SECONDS",
        help="seconds to wait for other ranks (default: %(default)g)",
    )
    bench = commands.add_parser("bench", help="run a benchmark", description=BENCH, **as_written)
    bench.add_argument("benchmark", nargs="?", help="its name; without one, all names are listed")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    args = parser.parse_args(arguments)
    if args.command == "doctor":
        from hvd_quant.cli.doctor import doctor as run

        return run(args.json, args.patience)
    from hvd_quant.cli.bench import bench as run

    return run(args.benchmark, args.arguments)
