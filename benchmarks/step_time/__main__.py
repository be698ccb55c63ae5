"""Seconds a training step, of Horovod, of hvd_quant and of torch's DDP, between hosts of the network lab.

    python -m benchmarks.step_time                                     # the default cases, as root
    python -m benchmarks.step_time --cases 'linear/1gbit/*' small/unshaped/1
    python -m benchmarks.step_time --cases tensorflow/1gbit/2
    python -m benchmarks.step_time --markdown --json step_time.json --plot step_time.png
    python -m benchmarks.step_time --cases small/unshaped/1 --before ../older-checkout

A case is MODEL/RATE/HOSTS, with one rank a host, or two ranks on the only one, or MODEL/RATE/HOSTSxRANKS:

- models: linear, 8 x Linear(1024), 8.4 M parameters; device, the same where another device computes: the
  processor sleeps for 2 ms a layer; transformer, an encoder of 25 M parameters in 96 tensors; small, 320
  matrices of 64 x 64; tensorflow, TensorFlow's 8 x Dense(1024) in a tf.function;
- rates of every host's link: 100mbit, 1gbit, 10gbit, unshaped;
- hosts: 1, 2, 4, 8, and 2x2, 2x4.

A case is two launches, one for the rows that use Horovod and one for DDP's, each with a row that computes and
exchanges nothing; the model tensorflow has only the first. The rows of a launch take turns, step by step, so
that what disturbs the machine disturbs all of them. A step's time is that of its slowest rank, from a barrier
on. With --before the rows are few: Horovod's, and ours as it is here and in another checkout, in one launch.
Ranks share this machine's cores: where there are more ranks than cores, computing takes longer than on as
many machines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from benchmarks.netlab import Lab, LabError, missing
from benchmarks.step_time import before, report
from benchmarks.step_time.report import Case, progress

MODELS = ("linear", "device", "transformer", "small", "tensorflow")
RATES = ("100mbit", "1gbit", "10gbit", "unshaped")
DEFAULT = [
    *(f"linear/{rate}/2" for rate in RATES),
    *(
        "linear/1gbit/4",
        "linear/1gbit/8",
        "device/1gbit/2",
        "device/1gbit/4",
        "transformer/1gbit/2",
        "transformer/1gbit/4",
        "small/unshaped/1",
        "tensorflow/1gbit/2",
    ),
]
ALL = [
    *(f"{model}/{rate}/{n}" for model in MODELS for n in (2, 4, 8, "2x2", "2x4") for rate in RATES),
    *(f"{model}/unshaped/1" for model in MODELS),
]
ENVIRONMENT = {
    # Every row has tensors of its own: with Horovod's default, they would push each other out of its cache.
    "HOROVOD_CACHE_CAPACITY": "16384",
    "GLOO_SOCKET_IFNAME": "eth0",
    "MASTER_PORT": "29500",
}


@contextlib.contextmanager
def watched(what: str, file: Path) -> Iterator[None]:
    """Tell every few seconds what the file says."""
    done, begin = threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(10):
            state = file.read_text() if file.exists() else "starting"
            progress(f"{what}: {time.monotonic() - begin:.0f} s, {state}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def run_ddp(lab: Lab, command: list[str], slots: int, timeout: float) -> tuple[int, str]:
    """Run a command as the ranks of a torch process group; the first status that is not 0, and output."""
    size = slots * len(lab.names)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        ranks = []
        for rank in range(size):
            env = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": lab.addresses[0], **ENVIRONMENT}
            process = lab.popen_on(rank // slots, command, env=env, stdout=log, stderr=log)
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)
        deadline = time.monotonic() + timeout
        while None in (statuses := [process.poll() for process in ranks]) and not any(statuses):
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(command, timeout)
            time.sleep(0.05)
        log.seek(0)
        return next(filter(None, statuses), 0), log.read()


def launch(lab: Lab, case: Case, library: str, args: argparse.Namespace) -> None:
    """Note in the case what rank 0 reports, or that the launch has failed."""
    with tempfile.TemporaryDirectory() as folder:
        program = ["tf_rank"] if library == "tensorflow" else ["rank", library, case.model]
        command = [sys.executable, "-m", f"benchmarks.step_time.{program[0]}", *program[1:], folder]
        command += ["--steps", str(args.steps), "--seconds", str(args.seconds)]
        if args.before:
            before.copy_package(args.before, Path(folder))
            command.append("--before")
        try:
            with watched(f"{case.name}, {library}", Path(folder) / "progress"):
                if library == "ddp":
                    status, output = run_ddp(lab, command, case.slots, args.timeout)
                else:
                    # horovodrun --mpi would call mpirun too, but refuses a lab of one host.
                    start = (
                        lab.mpirun if args.controller == "mpi" else partial(lab.horovodrun, controller="gloo")
                    )
                    done = start(command, slots=case.slots, env=ENVIRONMENT, timeout=args.timeout)
                    status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            case.failures[library] = f"not done after {error.timeout:.0f} s\n{error.output or ''}"
            return
        if status:
            case.failures[library] = f"status {status}\n{output}"
        else:
            case.rows |= json.loads((Path(folder) / "figures.json").read_text())


def run(case: Case, args: argparse.Namespace) -> None:
    """Measure a case; what fails is noted in it."""
    begin = time.monotonic()
    try:
        with Lab(case.hosts, None if case.rate == "unshaped" else case.rate) as lab:
            libraries = ("tensorflow",) if case.model == "tensorflow" else ("horovod", "ddp")
            for library in libraries[:1] if args.before else libraries:
                launch(lab, case, library, args)
    except LabError as error:
        case.failures["lab"] = str(error)
    for what, why in case.failures.items():
        progress(f"{case.name}, {what}: FAILED, {why}")
    progress(f"{case.name}: done in {time.monotonic() - begin:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cases", nargs="+", metavar="CASE", help="as linear/1gbit/2; * stands for anything")
    what.add_argument("--read", type=Path, metavar="FILE", help="measure nothing: show what --json wrote")
    what.add_argument("--all", action="store_true", help="every model, rate and number of hosts; hours")
    parser.add_argument("--steps", type=int, default=20, help="of each row that count (default: 20)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=30,
        help="after which a launch takes no more steps than it must, which is 5 of each row (default: 30)",
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds of a launch (default: 600)")
    parser.add_argument("--controller", choices=("mpi", "gloo"), default="mpi", help="of Horovod")
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="compare with the package there, which has been built"
    )
    parser.add_argument("--markdown", action="store_true", help="print tables for a Markdown document")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the linear model's times")
    args = parser.parse_args()
    names = ALL if args.all else DEFAULT
    if args.cases:
        names = [name for name in ALL if any(fnmatch(name, pattern) for pattern in args.cases)]
        for pattern in args.cases:
            if not any(fnmatch(name, pattern) for name in names):
                parser.error(f"{pattern} is none of the cases: {' '.join(ALL)}")
    if args.steps < 2 or args.seconds < 0 or args.timeout <= 0:
        parser.error("--steps must be 2 or more, --seconds and --timeout positive")
    if args.before and not before.is_built(args.before):
        parser.error(f"{args.before} has no package whose codec has been built: run scripts/setup.sh there")
    if args.read:
        written = json.loads(args.read.read_text())
        cases = [Case(case["case"], case["rows"], case["failures"]) for case in written["cases"]]
        here = written["machine"]
    elif reason := missing():
        parser.error(reason)
    else:
        here = report.machine()
        cases = [Case(name) for name in names]
        for number, case in enumerate(cases, 1):
            progress(f"{number} of {len(cases)}: {case.name}")
            run(case, args)
    goals = report.goals(cases)
    if args.json:
        result = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": here,
            "controller": args.controller,
            "cases": [case.as_dict() for case in cases],
            "goals": goals,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    report.print_all(cases, goals, here, args.markdown)
    if args.plot:
        report.plot(cases, args.plot)
    return int(any(case.failures for case in cases))


if __name__ == "__main__":
    sys.exit(main())
