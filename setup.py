"""Builds the native codec; everything else about the package stands in pyproject.toml.

Environment:
    HVD_QUANT_WERROR=1        C++ warnings are errors (scripts/setup.sh and CI set it).
    HVD_QUANT_SANITIZE=LIST   build with these sanitizers, e.g. "address,undefined" (see CONTRIBUTING.md).
"""

import os
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# No contraction into fused multiply-adds: payloads must not depend on the instruction set.
compile_args = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wall", "-Wextra"]
link_args = ["-pthread"]

if os.environ.get("HVD_QUANT_WERROR") == "1":
    compile_args.append("-Werror")
if sanitizers := os.environ.get("HVD_QUANT_SANITIZE"):
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
    compile_args += flags
    link_args += flags

csrc = Path("hvd_quant/codec/csrc")

setup(
    ext_modules=[
        Pybind11Extension(
            "hvd_quant.codec._native",
            [str(csrc / "native.cpp")],
            depends=sorted(map(str, csrc.rglob("*.hpp"))),
            cxx_std=17,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ]
)
