"""Memory of results, given out again once nobody looks at it: new memory is slow."""

from __future__ import annotations

import threading
import weakref

import numpy as np

from hvd_quant.codec import native

_ON_CPU = np.empty(0, np.uint8)


class BufferPool:
    """Room for what TensorFlow keeps as long as it likes. It may be called from several threads.

    One room is kept for each key: as much memory as the results of one step have.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: dict[str, tuple[np.ndarray, weakref.ref[np.ndarray]]] = {}

    def empty(self, key: str, count: int, dtype: np.dtype) -> np.ndarray:
        """Room for ``count`` values, whose content is undefined; from a cache line on.

        It is what was given out before for this key, if that had as many bytes and no array, view or tensor
        on it is left.
        """
        size = count * dtype.itemsize
        with self._lock:
            kept = self._buffers.get(key)
            if kept is not None and kept[0].size == size and kept[1]() is None:
                buffer = kept[0]
            else:
                buffer = native.empty(size, "uint8", _ON_CPU)
            # A view of a view is a view of what owns the memory, and keeps this alone; but over a memoryview
            # NumPy sees no further, so that this array lives as long as any view of it.
            array = np.frombuffer(memoryview(buffer), dtype)
            self._buffers[key] = buffer, weakref.ref(array)
        return array
