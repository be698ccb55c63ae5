"""Runs tests/ranks/mpi on several ranks, through mpirun, and the example."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, launch

HERE = Path(__file__).parent
SOME = ["-k", "near or other_orders or side_by_side or calls or stats"]
BY_HOSTS = ["-k", "near or other_orders or calls"]
SECONDS = 200  # for one launch; far above what it takes, so that only a hang gets there


def mpirun(ranks, *arguments, **environment):
    """Run Python on several ranks and return its completed process."""
    pytest.importorskip("mpi4py")
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun")
    # "-m mpi4py" ends all ranks when one fails.
    command = ["mpirun", "--oversubscribe", "-np", str(ranks), sys.executable, "-m", "mpi4py", *arguments]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return launch(command, SECONDS, **as_root, **environment)


# torch and Horovod are slow to import: with 2 ranks only. With 8, only what depends on their number.
@pytest.mark.parametrize(
    ("ranks", "files", "options", "environment"),
    [
        (2, ["check_allreduce", "check_errors", "check_options", "check_torch", "check_horovod"], [], {}),
        (3, ["check_allreduce", "check_errors", "check_options"], [], {}),
        (4, ["check_allreduce", "check_errors"], [], {}),
        (8, ["check_allreduce", "check_errors"], SOME, {}),
        (4, ["check_allreduce"], BY_HOSTS, {"TEST_HOSTS": "2", "TEST_EXCHANGES": "hierarchical"}),
    ],
)
def test_checks_on_every_rank(ranks, files, options, environment):
    pytest_options = (
        "-x",
        "-q",
        "--color=no",
        "--timeout=120",
        # The other method cannot interrupt a call of MPI.
        "--timeout-method=thread",
        "-o",
        "python_files=check_*.py",
        "-o",
        "python_functions=check_*",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
    )
    paths = [str(HERE / "mpi" / f"{file}.py") for file in files]
    done = mpirun(ranks, "-m", "pytest", *pytest_options, *options, *paths, **environment)
    assert done.returncode == 0, done.stdout[-12000:]  # the worst of all ranks'


@pytest.mark.parametrize("exchange", ["allgather", "scatter_allgather"])
def test_the_example(exchange):
    example = ROOT / "examples" / "mpi_allreduce.py"
    done = mpirun(3, str(example), "--values", "100000", "--exchange", exchange)
    assert done.returncode == 0, done.stdout
    assert "every rank holds the same bits" in done.stdout
    assert "within the exact variance" in done.stdout


@pytest.mark.parametrize("broken", ["import mpi4py", "from mpi4py import MPI"])
def test_a_missing_mpi4py_is_explained(broken):
    """Whether mpi4py itself is missing, or the MPI library that it loads."""
    missing = {"import mpi4py": "mpi4py", "from mpi4py import MPI": "mpi4py.MPI"}[broken]
    script = f"import sys; sys.modules[{missing!r}] = None; import hvd_quant.mpi"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ImportError: hvd_quant.mpi needs mpi4py 4 and an MPI library" in done.stderr


def test_the_front_end_imports_no_other_framework():
    pytest.importorskip("mpi4py")
    script = "import sys, hvd_quant.mpi; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "tensorflow", "horovod"} & {name.split(".")[0] for name in done.stdout.split()}
