"""The GPU kernels on a CPU: compiled as C++, with fibers for threads (emulator.hpp)."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from hvd_quant.codec import cuda, nvrtc

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off"]


@functools.cache
def library():
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, to emulate the GPU")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "emulator.so")
        command = [
            compiler,
            *FLAGS,
            "-shared",
            "-fPIC",
            f"-I{cuda.SOURCE.parent}",
            str(HERE / "emulator.cpp"),
            "-o",
            str(out),
        ]
        subprocess.run(command, check=True, timeout=120)
        return ctypes.CDLL(str(out))


def launch(name, blocks, threads, arguments):
    getattr(library(), f"{name}_emulated")(blocks * threads // cuda.WARP, *map(nvrtc.as_c, arguments))


def kernels(blocks=3, threads=64):
    library()
    return cuda.Kernels(launch, blocks, threads, torch.device("cpu"))
