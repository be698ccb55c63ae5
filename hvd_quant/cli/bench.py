"""Run the benchmarks, which are in the repository beside the package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hvd_quant

ROOT = Path(hvd_quant.__file__).parent.parent
BENCHMARKS = {  # name: module, and what it measures
    "codec": (
        "benchmarks.codec",
        "values per second that the codec encodes and decodes, on one thread (torch)",
    ),
    "step-time": ("benchmarks.step_time", "seconds of a training step over links of chosen rates (root)"),
    "tf-graph": ("benchmarks.tf_graph", "the codec in a tf.function"),
    "accuracy": ("benchmarks.accuracy", "test accuracy on Fashion-MNIST with several seeds"),
    "papers": ("benchmarks.papers", "the papers' claims (torch)"),
    "netlab": ("benchmarks.netlab", "any command on several hosts made of namespaces (root)"),
}


def bench(name: str | None, arguments: Sequence[str]) -> int:
    """Run a benchmark, or list all. Returns the exit status."""
    if name is None:
        for known, (_, what) in BENCHMARKS.items():
            print(f"{known:<10} {what}")
        return 0
    if name not in BENCHMARKS:
        print(f"hvd-quant bench: there is no {name!r}, but {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    if not (ROOT / "benchmarks").is_dir():
        print(
            "hvd-quant bench: the benchmarks are not installed with the package. Clone its repository, run "
            "scripts/setup.sh there, and use its .venv/bin/hvd-quant",
            file=sys.stderr,
        )
        return 2
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.call([sys.executable, "-m", BENCHMARKS[name][0], *arguments], env=environment)
