"""Starts what the multi-rank tests run on several ranks."""

import atexit
import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import preloaded
import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SECONDS = 500  # for one launch; far above what it takes, so that only a hang gets there
AT_ONCE = [sys.executable, TESTS / "support" / "horovodrun_at_once.py"]
# There may be more ranks than cores: waiting must not keep others from working.
SHARED_CORES = {"OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
# What ranks import before they begin. torch._dynamo: by the first optimizer's first step.
PRELOADED = {
    "torch": ("horovod.torch", "torch._dynamo", "pytest"),
    "tensorflow": ("horovod.tensorflow.keras", "pytest"),
}


def need(framework):
    """Horovod for a framework; skips where that is missing, or Horovod was built without it."""
    pytest.importorskip(framework)
    hvd = pytest.importorskip(f"horovod.{framework}", exc_type=ImportError)
    if not hasattr(hvd, "init"):  # horovod.torch can be imported without what was not built
        pytest.skip(f"needs Horovod built with {framework}", allow_module_level=True)
    return hvd


def python(framework):
    """The beginning of a command for ranks, who need not import the framework; see `preloaded`."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    environment = {**os.environ, **SHARED_CORES, **quiet, **sleeping()}
    environment.pop("TEST_SLEEPS_WHILE_WAITING", None)  # the ranks' own environment says so
    return preloaded.python(*PRELOADED[framework], environment=environment)


@functools.cache
def sleeping():
    """Environment in which ranks under Gloo sleep while they wait for a tensor; see sched_yield.c."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return {}
    folder = tempfile.mkdtemp(prefix="sched_yield-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = f"{folder}/sched_yield.so"
    source = TESTS / "support" / "sched_yield.c"
    command = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source, "-o", library]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        warnings.warn(f"ranks take more time, as {source} was not compiled: {done.stderr}", stacklevel=2)
        return {}
    preloaded_libraries = filter(None, [os.environ.get("LD_PRELOAD"), library])
    return {"LD_PRELOAD": ":".join(preloaded_libraries), "TEST_SLEEPS_WHILE_WAITING": "1"}


def launch(command, seconds, **environment):
    """Run a launcher's command, stdout and stderr as one; a hang of so many seconds fails the test."""
    with hangs_fail():
        return subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env={**os.environ, **SHARED_CORES, **environment},
        )


@contextlib.contextmanager
def hangs_fail():
    """Fail the test with the output so far, where a process takes more than its time."""
    try:
        yield
    except subprocess.TimeoutExpired as error:
        output = error.output or ""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        pytest.fail(f"hung for {error.timeout} s:\n{text[-8000:]}")


def horovodrun(ranks, controller, *command, at_once=True, **environment):
    """Run a command on several ranks and return its completed process.

    At once: by `horovodrun_at_once`, and ranks under Gloo are `sleeping`.
    """
    programs = Path(sys.executable).parent
    launcher = AT_ONCE if at_once else [programs / "horovodrun"]
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        **(sleeping() if at_once and controller == "gloo" else {}),
        **environment,
    }
    return launch([*launcher, f"--{controller}", "-np", str(ranks), *command], SECONDS, **environment)


def run_checks(ranks, controller, where, selection="", interpreter=None, **environment):
    """Have every rank run the checks of a folder or file below tests/ranks/ together.

    With an interpreter that has imported the folder's framework, unless another is given.
    """
    options = (
        "-x",
        "-q",
        "--color=no",
        "--timeout=120",
        "--timeout-method=thread",  # a hang is mostly in C++, where no signal is looked at
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
    )
    names = ("-o", "python_files=check_*.py", "-o", "python_functions=check_*", "-k", selection)
    interpreter = interpreter or python(where.partition("/")[0])
    command = (*interpreter, "-m", "pytest", *options, *names, TESTS / "ranks" / where)
    done = horovodrun(ranks, controller, *command, **environment)
    assert done.returncode == 0, done.stdout[-12000:]
    assert len(re.findall(r"\d passed", done.stdout)) == ranks, done.stdout[-12000:]
