"""A pool of buffers for results, which are reused once nothing refers to them: allocation is slow."""

from __future__ import annotations

import threading
import weakref

import numpy as np

from hvd_quant.codec import native

_ON_CPU = np.empty(0, np.uint8)


class BufferPool:
    """Buffers that TensorFlow keeps as long as it likes. Thread-safe.

    One buffer is kept per key, so in all the memory of one step's results.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: dict[str, tuple[np.ndarray, weakref.ref[np.ndarray]]] = {}

    def empty(self, key: str, count: int, dtype: np.dtype) -> np.ndarray:
        """Return an uninitialised array of ``count`` values, aligned to a cache line.

        It reuses the key's last buffer, if that had as many bytes and no array, view or tensor refers to it
        any more.
        """
        size = count * dtype.itemsize
        with self._lock:
            kept = self._buffers.get(key)
            if kept is not None and kept[0].size == size and kept[1]() is None:
                buffer = kept[0]
            else:
                buffer = native.empty(size, "uint8", _ON_CPU)
            # The base of a view of a view is the owner of the memory, and only that is kept alive; but NumPy
            # does not see through a memoryview, so that this array lives as long as any view of it.
            array = np.frombuffer(memoryview(buffer), dtype)
            self._buffers[key] = buffer, weakref.ref(array)
        return array
