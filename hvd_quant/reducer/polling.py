"""Waiting for other ranks, with limited patience: one of them may not run this code, or have died."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_SECONDS = 60.0
POLL_SECONDS = 1e-3  # between two looks at what is waited for, as in Horovod itself

clock = time  # tests have one of their own


def pause() -> None:
    """Let other ranks, and Horovod's thread, go on."""
    clock.sleep(POLL_SECONDS)


def wait_for(condition: Callable[[], object]) -> bool:
    """Wait until something is so, or the other ranks have had their time for it; returns whether it is so."""
    deadline = clock.monotonic() + PATIENCE_SECONDS
    while not condition():
        if clock.monotonic() > deadline:
            return False
        pause()
    return True
