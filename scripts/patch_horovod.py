#!/usr/bin/env python3
"""Apply the three edits that let Horovod 0.28.1 build against current frameworks.

Horovod's Python is left as it is; only its CMake files change, because today's torch and TensorFlow
headers need C++20, Horovod forgets to include ``<string>``, and TensorFlow no longer ships a header that
``xla_mpi_ops.cc`` includes.

Usage: patch_horovod.py PATH_TO_UNPACKED_HOROVOD_SOURCE

Every edit must find its place exactly once. An edit that is already applied is left alone, so the
script can be run again; anything else stops with exit status 1 before a file is written.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

SUPPORTED_VERSION = "0.28.1"


class PatchError(Exception):
    """An edit did not find its place: this is not the source that the edit was written for."""


@dataclass(frozen=True)
class Edit:
    """Replace the only occurrence of ``old`` in ``path`` by ``new``."""

    path: str
    old: str
    new: str
    why: str

    def apply(self, text: str) -> str:
        found = text.count(self.old)
        if found == 1:
            return text.replace(self.old, self.new)
        if found == 0 and self.new in text:
            return text
        raise PatchError(f"{self.path}: expected exactly one {self.old!r}, found {found} (edit: {self.why})")


EDITS = (
    Edit(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        'set(CMAKE_CXX_STANDARD 20)\nadd_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include string>")',
        "framework headers need C++20; Horovod forgets <string>, which other headers do not always include",
    ),
    Edit(
        "horovod/torch/CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
        "torch headers need C++20",
    ),
    Edit(
        "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")',
        "# xla_mpi_ops.cc needs a header that TensorFlow no longer ships",
        "TensorFlow without the XLA custom call",
    ),
)


def check_version(source: Path) -> None:
    init = source / "horovod" / "__init__.py"
    if not init.is_file():
        raise PatchError(f"{source} is no unpacked Horovod source: {init} is missing")
    if f"__version__ = '{SUPPORTED_VERSION}'" not in init.read_text():
        raise PatchError(f"{init} is not Horovod {SUPPORTED_VERSION}")


def patch(source: Path) -> None:
    """Apply all edits below ``source``, or none of them.

    Raises:
        PatchError: the source has another version, or an edit did not find its place.
    """
    check_version(source)
    patched: dict[Path, str] = {}
    for edit in EDITS:
        path = source / edit.path
        if not path.is_file():
            raise PatchError(f"{path} is missing (edit: {edit.why})")
        patched[path] = edit.apply(path.read_text())
    for path, text in patched.items():
        path.write_text(text)
    for edit in EDITS:
        print(f"patched {edit.path}: {edit.why}")


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        patch(Path(sys.argv[1]))
    except PatchError as error:
        print(f"patch_horovod: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
