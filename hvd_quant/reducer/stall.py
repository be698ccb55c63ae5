"""Warn on every rank about what it waits for, when other ranks do not come.

Horovod's own stall check warns on rank 0 only, and knows tensors' names, but neither gradients nor the line
of the program that waits. Ours uses the same settings: ``HOROVOD_STALL_CHECK_TIME_SECONDS`` (default 60) and
``HOROVOD_STALL_CHECK_DISABLE``.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

_SECONDS = 60  # Horovod's default
_LIBRARIES = ("horovod", "hvd_quant", "torch", "tensorflow", "keras", "tf_keras")
_NAMED_AT_MOST = 5  # items in a message
_THREAD = "hvd_quant stall"

T = TypeVar("T")

logger = logging.getLogger("hvd_quant")


def stall_seconds() -> float | None:
    """Return the seconds before a warning, by Horovod's settings; None if it is disabled."""
    if _integer("HOROVOD_STALL_CHECK_DISABLE", 0) > 0:
        return None
    seconds = _integer("HOROVOD_STALL_CHECK_TIME_SECONDS", _SECONDS)
    return float(seconds) if seconds > 0 else None


def _integer(variable: str, default: int) -> int:
    """Parse an integer as C's strtol: without leading digits it is 0."""
    text = os.environ.get(variable)
    if text is None:
        return default
    number = re.match(r"\s*[+-]?\d+", text)
    return int(number[0]) if number else 0


class StallCheck(Generic[T]):
    """Watches operations in flight from a daemon thread, and warns when one takes too long.

    Args:
        in_flight: called with what is watched; returns what is in flight, as keys that no later operation
            has.
        describe: called with the keys that are in flight for too long, and what is watched; returns the lines
            of the warning about them, of which the first names this rank.
    """

    def __init__(
        self,
        in_flight: Callable[[list[T]], Iterable[Hashable]],
        describe: Callable[[list[Hashable], list[T]], list[str]],
    ) -> None:
        self.watched: weakref.WeakSet[T] = weakref.WeakSet()  # submitters of operations
        self._in_flight, self._describe = in_flight, describe
        self._since: dict[Hashable, float] = {}
        self._reported: set[Hashable] = set()  # in flight at the last warning
        self._process = 0  # process of the thread, which does not survive a fork

    def watch(self, one: T) -> None:
        """Watch a submitter of operations, unless the user has disabled Horovod's stall check."""
        self.watched.add(one)
        if self._process == os.getpid() or (seconds := stall_seconds()) is None:
            return
        self._process = os.getpid()
        thread = threading.Thread(target=self._watch, args=(seconds,), name=_THREAD, daemon=True)
        thread.start()

    def _watch(self, seconds: float) -> None:
        while True:
            time.sleep(min(1.0, seconds / 4))
            if (message := self.poll(time.monotonic(), seconds)) is not None:
                logger.warning(message)

    def poll(self, now: float, seconds: float) -> str | None:
        """Return the warning that is due, once per operation.

        Args:
            now: current time, in seconds.
            seconds: time that operations may be in flight.
        """
        self._since = {key: self._since.get(key, now) for key in self._in_flight(list(self.watched))}
        self._reported &= self._since.keys()
        stalled = [key for key, since in self._since.items() if now - since >= seconds]
        if self._reported.issuperset(stalled):
            return None
        self._reported.update(self._since)
        first, *lines = self._describe(stalled, list(self.watched))
        return "\n  ".join([f"{first} has waited {seconds:g} s for other ranks.", *lines, *_places()])


def enumeration(names: Iterable[str]) -> str:
    """Enumerate names in a sentence; of many, the first few and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def _places() -> list[str]:
    """Return where in the user's program the main thread is, and each that has called Horovod or us."""
    libraries = {
        name: str(Path(module.__file__).parent) + os.sep
        for name in _LIBRARIES
        if (module := sys.modules.get(name)) is not None and module.__file__
    }
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    places = []
    for ident, frame in sys._current_frames().items():
        stack = traceback.extract_stack(frame)[::-1]  # innermost frame first
        within = [
            next((name for name, folder in libraries.items() if entry.filename.startswith(folder)), None)
            for entry in stack
        ]
        is_main = ident == threading.main_thread().ident
        is_check = ident == threading.get_ident() or names.get(ident) == _THREAD
        if is_check or not (is_main or {"horovod", "hvd_quant"} & set(within)):
            continue
        for entry, library in zip(stack, within, strict=True):
            if library is None:
                where = f"{entry.filename}:{entry.lineno}, in {entry.name}: {entry.line}"
                places.append(f"{names.get(ident, 'A thread')} is at {where}")
                break
    return places
