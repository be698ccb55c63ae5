"""Run a command on ranks in several hosts of this one machine, over links of a chosen rate.

    python -m benchmarks.netlab --hosts 2 --rate 1gbit -- python train.py
    python -m benchmarks.netlab --rate 1gbit --check

The exit status is the command's, except that horovodrun makes 1 of every failure under Gloo; 2: no lab.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from . import Lab, parse_delay, parse_rate
from .probe import measure


def _checked(text: str, parse: Callable[[str], object]) -> str:
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.netlab",
        usage="%(prog)s [options] -- command ...\n       %(prog)s [options] --check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts (default: 2)")
    parser.add_argument("--slots", type=int, default=1, help="ranks in each host (default: 1)")
    parser.add_argument(
        "--rate",
        type=lambda text: _checked(text, parse_rate),
        help="of each link in each direction, as 100mbit or 1gbit (default: unshaped)",
    )
    parser.add_argument(
        "--delay",
        type=lambda text: _checked(text, parse_delay),
        default="0ms",
        help="from one host to another, one way, as 0.2ms; needs the kernel's netem (default: 0ms)",
    )
    parser.add_argument("--launcher", choices=("horovodrun", "mpirun"), default="horovodrun")
    parser.add_argument("--controller", choices=("mpi", "gloo"), default="mpi", help="of horovodrun")
    parser.add_argument("--quiet", action="store_true", help="print the command's output only")
    parser.add_argument("--check", action="store_true", help="measure the link between the first two hosts")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _check(lab: Lab, rate: str | None, delay: str) -> None:
    print(f"asked for                 {rate or 'unshaped':>16}, {delay} one way")
    for source, target in ((0, 1), (1, 0)):
        bandwidth, round_trip = measure(lab, source, target)
        names = f"{lab.names[source]} -> {lab.names[target]}"
        print(f"{names}, measured  {bandwidth / 1e6:9.1f} Mbit/s, {round_trip * 1e3:.3f} ms there and back")
    print("Bandwidth is one TCP stream's payload; headers take 4.4 % of a link's rate.")


def main() -> int:
    parser = _options()
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.check == bool(command):
        parser.error("give a command after --, or --check")
    if args.check and args.hosts < 2:
        parser.error("--check measures between two hosts")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with Lab(args.hosts, args.rate, args.delay) as lab:
            if args.check:
                _check(lab, args.rate, args.delay)
                return 0
            if not args.quiet:
                how = args.launcher if args.launcher == "mpirun" else f"horovodrun --{args.controller}"
                link = f"{args.rate or 'unshaped'}, {args.delay}"
                print(
                    f"netlab: {args.hosts} hosts x {args.slots} slots, {link}, {how}",
                    file=sys.stderr,
                    flush=True,
                )
            if args.launcher == "mpirun":
                done = lab.mpirun(command, slots=args.slots, stream=True)
            else:
                done = lab.horovodrun(command, slots=args.slots, controller=args.controller, stream=True)
            return done.returncode if done.returncode >= 0 else 128 - done.returncode
    except (ValueError, RuntimeError, OSError) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
