"""Leaves out the tests that need torch where it is not installed (HVD_QUANT_FRAMEWORKS=tensorflow)."""

import importlib.util
from pathlib import Path

import preloaded
import pytest

collect_ignore = []
has_torch = importlib.util.find_spec("torch") is not None
if not has_torch:
    files = Path(__file__).parent.rglob("*.py")
    collect_ignore = [str(path) for path in files if "\nimport torch\n" in path.read_text()]


def pytest_report_header():
    """Says what is left out, lest it be taken for passed, and what a failure may depend on."""
    lines = [f"TEST_HASH_SEED={preloaded.SEED}"]
    if collect_ignore:
        names = ", ".join(Path(path).name for path in collect_ignore)
        lines.append(f"without torch, these are left out: {names}")
    return lines


def pytest_collection_modifyitems(items):
    """Skips what is parametrised with torch, as the backend of the codec."""
    for item in items:
        if not has_torch and hasattr(item, "callspec") and "torch" in map(str, item.callspec.params.values()):
            item.add_marker(pytest.mark.skip(reason="needs torch"))
