"""Wait for other ranks for a limited time: one of them may not run this code, or have died."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 1e-3  # polling interval, as in Horovod itself

clock = time  # tests replace it


def pause() -> None:
    """Let other ranks, and Horovod's thread, run."""
    clock.sleep(POLL_SECONDS)


def wait_for(condition: Callable[[], object]) -> bool:
    """Wait until a condition holds, or the time is up; returns whether it holds."""
    deadline = clock.monotonic() + PATIENCE_SECONDS
    while not condition():
        if clock.monotonic() > deadline:
            return False
        pause()
    return True
