"""The edits to Horovod's source: each finds its place, or nothing is written."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "patch_horovod.py"
FILES = {
    "horovod/__init__.py": "__version__ = '0.28.1'\n",
    "CMakeLists.txt": "cmake_minimum_required(VERSION 3.13)\nset(CMAKE_CXX_STANDARD 14)\n",
    "horovod/torch/CMakeLists.txt": "if(X)\n    set(CMAKE_CXX_STANDARD 14)\nendif()\n",
    "horovod/tensorflow/CMakeLists.txt": 'list(APPEND TF_SOURCES "a/mpi_ops.cc")\n'
    'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
}


@pytest.fixture
def source(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def patch(source):
    return subprocess.run([sys.executable, SCRIPT, source], capture_output=True, text=True)


def texts(source):
    return {name: (source / name).read_text() for name in FILES if (source / name).exists()}


def test_edits_are_applied_and_applying_them_again_changes_nothing(source):
    assert patch(source).returncode == 0
    once = texts(source)
    assert "CMAKE_CXX_STANDARD 20" in once["CMakeLists.txt"]
    assert 'add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include string>")' in once["CMakeLists.txt"]
    assert "CMAKE_CXX_STANDARD 20" in once["horovod/torch/CMakeLists.txt"]
    assert "APPEND" in once["horovod/tensorflow/CMakeLists.txt"]
    assert "/xla_mpi_ops.cc" not in once["horovod/tensorflow/CMakeLists.txt"]
    assert patch(source).returncode == 0
    assert texts(source) == once


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("damage", ["gone", "other", "twice"])
def test_an_edit_without_its_place_is_named_and_nothing_is_written(source, name, damage):
    path = source / name
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        path.write_text("something else\n")
    elif name == "horovod/__init__.py":
        pytest.skip("a version may stand twice")
    else:
        path.write_text(FILES[name] * 2)
    before = texts(source)
    done = patch(source)
    assert done.returncode == 1
    assert name in done.stderr
    assert texts(source) == before


def test_usage():
    assert subprocess.run([sys.executable, SCRIPT], capture_output=True).returncode == 2
