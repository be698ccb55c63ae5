"""scripts/setup.sh with a Python that only notes what it is asked: order, repetition, and messages.

The real thing is what every other test needs to have been done.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# Stands in for the interpreter, inside and outside of the virtual environment that it "makes".
PYTHON = """#!/bin/bash
echo "$* $PYTHONPATH $PYTHONHOME" >>"$NOTES"
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python" ;;
  *"$FAIL_AT"*)
    if [ -n "$FAIL_AT" ]; then
      echo "$FAIL_WITH"
      exit 1
    fi ;;&
  *"pip --disable-pip-version-check download"*)
    folder=$(sed -E 's/.* -d ([^ ]+) .*/\\1/' <<<"$*")
    mkdir -p "$folder/horovod-0.28.1"
    tar -czf "$folder/horovod-0.28.1.tar.gz" -C "$folder" horovod-0.28.1 ;;
  *" wheel --no-deps "*)
    folder=$(sed -E 's/.* -w ([^ ]+) .*/\\1/' <<<"$*")
    mkdir -p "$folder"
    touch "$folder/horovod-0.28.1-cp311.whl" ;;
  *"--editable"*)
    touch hvd_quant/codec/_native.so ;;
  "- "*)
    echo ready ;;
esac
"""
ENOUGH = "echo 'Filesystem 1024-blocks Used Available Capacity Mounted'; echo '/dev/x 1 1 99000000 1% /'"
PROGRAMS = ("g++", "make", "cmake", "mpicxx", "mpirun", "ssh")
OTHERS = (
    "bash sh sed awk tail cut tr mkdir rm cat cp touch tar gzip flock sleep mktemp nproc cksum sort head "
)
OTHERS += "dirname uname env date ls chmod ln timeout"


@pytest.fixture
def clone(tmp_path):
    """A clone at a path with spaces, on a machine that has all programs."""
    clone = tmp_path / "a path with spaces"
    csrc = "hvd_quant/codec/csrc"
    shutil.copytree(ROOT / csrc, clone / csrc)
    for name in ("setup.sh", "patch_horovod.py"):
        (clone / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, clone / "scripts")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, clone / name)
    for name in PROGRAMS:
        program(tmp_path, name, "echo cmake version 3.25.1")
    program(tmp_path, "python3", PYTHON)
    program(tmp_path, "df", ENOUGH)
    program(tmp_path, "id", "echo 1000")
    program(tmp_path, "sudo", "exit 1")
    return clone


def program(folder, name, script):
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(script if script.startswith("#!") else f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def setup(clone, *arguments, fail_at="", fail_with="", **environment):
    """The completed process, and what Python was asked since the last time."""
    notes = clone.parent / "notes"
    notes.write_text("")
    # Only what is needed of the machine's own programs, so that a missing one is missing.
    bin_ = clone.parent / "bin"
    for name in OTHERS.split():
        if not (bin_ / name).exists():
            (bin_ / name).symlink_to(shutil.which(name))
    environment = {
        "PATH": str(bin_),
        "HOME": str(clone.parent),
        "TMPDIR": str(clone.parent),
        "NOTES": str(notes),
        "FAIL_AT": fail_at,
        "FAIL_WITH": fail_with,
        **environment,
    }
    done = subprocess.run(
        [clone / "scripts" / "setup.sh", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        cwd=clone.parent,
    )
    return done, notes.read_text()


def test_what_is_done_is_skipped(clone):
    done, asked = setup(clone)
    assert done.returncode == 0, done.stdout
    assert "ready" in done.stdout
    steps = ["-m venv", "install torch==", "install tensorflow==", " wheel --no-deps", "--editable"]
    places = [asked.index(step) for step in steps]
    assert places == sorted(places)
    done, asked = setup(clone)
    assert done.returncode == 0, done.stdout
    assert not any(step in asked for step in steps)


def test_nothing_is_built_and_no_compiler_needed_once_all_is_done(clone):
    setup(clone)
    for name in ("g++", "make", "cmake", "mpicxx"):
        (clone.parent / "bin" / name).unlink()
    done, _ = setup(clone)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("part", ["system", "frameworks", "horovod"])
def test_until(clone, part):
    done, asked = setup(clone, "--until", part)
    assert done.returncode == 0, done.stdout
    assert f"stopped after {part}" in done.stdout
    assert ("install torch==" in asked) == (part != "system")
    assert (" wheel --no-deps" in asked) == (part == "horovod")
    assert "--editable" not in asked
    assert setup(clone)[0].returncode == 0


def test_a_step_that_failed_is_done_again_and_no_other(clone):
    done, _ = setup(clone, fail_at="wheel --no-deps", fail_with="c++: fatal error: Killed signal")
    assert done.returncode == 1
    assert "Killed signal" in done.stdout
    assert "step 'horovod' failed" in done.stdout
    done, asked = setup(clone)
    assert done.returncode == 0, done.stdout
    assert "install torch==" not in asked
    assert " wheel --no-deps" in asked


@pytest.mark.parametrize(
    ("says", "hint"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("Failed to establish a new connection: [Errno 101] Network is unreachable", "no network"),
        ("Temporary failure in name resolution", "no network"),
        ("Temporary failure resolving 'deb.debian.org'", "no network"),
        ("Read timed out.", "no network"),
        ("SSL: CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
    ],
)
def test_what_pip_says_is_explained(clone, says, hint):
    done, _ = setup(clone, fail_at="install torch==", fail_with=says)
    assert done.returncode == 1
    assert says in done.stdout
    assert hint in done.stdout.splitlines()[-1]


def test_a_full_disk_is_noticed_before_anything_is_done(clone):
    program(clone.parent, "df", ENOUGH.replace("99000000", "2000000"))
    done, asked = setup(clone)
    assert done.returncode == 1
    assert "has 1 GB free, and setting up takes about 6 GB" in done.stdout
    assert "-m venv" not in asked


def test_missing_programs_without_root(clone):
    for name in ("g++", "cmake"):
        (clone.parent / "bin" / name).unlink()
    program(clone.parent, "apt-get", "exit 1")
    done, asked = setup(clone)
    assert done.returncode == 1
    assert "not root, and no sudo. As root: apt-get install g++ cmake" in done.stdout
    assert "-m venv" not in asked
    (clone.parent / "bin" / "apt-get").unlink()
    done, _ = setup(clone)
    assert "this machine has no apt-get" in done.stdout


def test_mpi_without_headers(clone):
    program(clone.parent, "mpicxx", "exit 1")
    done, _ = setup(clone)
    assert "libopenmpi-dev" in done.stdout


def test_an_old_cmake_is_replaced_in_the_environment(clone):
    program(clone.parent, "cmake", "echo cmake version 3.10.2")
    done, asked = setup(clone)
    assert done.returncode == 0, done.stdout
    assert "install cmake>=3.18,<4" in asked


def test_another_environment_that_is_active(clone):
    done, asked = setup(
        clone, VIRTUAL_ENV="/somewhere/else", PYTHONPATH="/somewhere/else", PYTHONHOME="/nowhere"
    )
    assert done.returncode == 0, done.stdout
    assert "somewhere" not in asked
    assert "nowhere" not in asked


def test_an_environment_of_somebody_elses_is_left_alone(clone):
    (clone / ".venv").mkdir()
    (clone / ".venv" / "mine.txt").write_text("mine")
    done, asked = setup(clone)
    assert done.returncode == 1
    assert "not of this script's making" in done.stdout
    assert (clone / ".venv" / "mine.txt").exists()
    assert "-m venv" not in asked


def test_a_half_made_environment_is_made_again(clone):
    done, _ = setup(clone, fail_at="install setuptools", fail_with="interrupted")
    assert done.returncode == 1
    assert setup(clone)[0].returncode == 0
    (clone / ".venv" / "bin" / "python").unlink()  # as when it was moved, or its interpreter has gone
    done, asked = setup(clone)
    assert done.returncode == 0, done.stdout
    assert "install torch==" in asked


@pytest.mark.parametrize("source", ["native.cpp", "entropy/bits.hpp"])
def test_little_room_is_enough_for_little_work(clone, source):
    setup(clone)
    program(clone.parent, "df", ENOUGH.replace("99000000", "2000000"))
    (clone / "hvd_quant/codec/csrc" / source).write_text("// changed")
    done, asked = setup(clone)
    assert done.returncode == 0, done.stdout
    assert "--editable" in asked


def test_a_python_that_is_not_there(clone):
    done, asked = setup(clone, PYTHON="python3.99")
    assert done.returncode == 1
    assert "PYTHON names python3.99" in done.stdout
    assert not asked


@pytest.mark.parametrize("arguments", [["--until"], ["--until", "lunch"], ["--help"], ["torch"]])
def test_bad_arguments(clone, arguments):
    done, asked = setup(clone, *arguments)
    assert done.returncode == 2
    assert "usage: setup.sh" in done.stdout
    assert not asked


@pytest.mark.parametrize("frameworks", ["jax", " ", "torch jax"])
def test_unknown_frameworks(clone, frameworks):
    done, _ = setup(clone, HVD_QUANT_FRAMEWORKS=frameworks)
    assert done.returncode == 1
    assert "it takes torch, tensorflow" in done.stdout
    assert os.listdir(clone).count(".venv") == 0
