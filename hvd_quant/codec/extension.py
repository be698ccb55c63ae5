"""The native module, imported from here only: where it is missing, the error says what to do."""

from importlib import import_module
from pathlib import Path

NAME = "hvd_quant.codec._native"

try:
    _native = import_module(NAME)
except ModuleNotFoundError as error:
    if error.name != NAME:
        raise
    raise ImportError(
        "the native codec of hvd_quant is not built for this Python: run `pip install -e .` or "
        f"scripts/setup.sh in {Path(__file__).parents[2]}"
    ) from error
