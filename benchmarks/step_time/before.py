"""Another checkout's package beside this one's, so that rows of both take turns in one launch."""

from __future__ import annotations

import random
import shutil
import statistics
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = "hvd_quant_before"
SUFFIX = ", before"  # of its rows' names


def is_built(checkout: Path) -> bool:
    """Return whether a checkout has a package whose native codec has been built."""
    return any(checkout.glob("hvd_quant/codec/_native*.so"))


def copy_package(checkout: Path, folder: Path) -> None:
    """Copy a checkout's package, which has been built, into a folder, under the name `PACKAGE`."""
    own = folder / PACKAGE
    shutil.copytree(checkout / "hvd_quant", own, ignore=shutil.ignore_patterns("__pycache__"))
    for file in own.rglob("*.py"):
        # Names of collectives and of variables change with it: both packages need their own.
        file.write_text(file.read_text().replace("hvd_quant", PACKAGE))


def front_end(row: str, framework: str) -> ModuleType:
    """Import the front end of the package that a row measures."""
    return import_module(f"{PACKAGE if row.endswith(SUFFIX) else 'hvd_quant'}.{framework}")


def ratio(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Compare steps of the same rounds.

    Returns:
        The median of after / before, and its 95 % confidence interval, by a bootstrap with a fixed seed.
    """
    ratios = [one / other for other, one in zip(before, after, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[49], medians[1949]
