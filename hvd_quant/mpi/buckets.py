"""Fused buckets that no call is using, with their buffers: allocating new ones is slow."""

from __future__ import annotations

from hvd_quant.exchange.layout import Entry, GroupLayout

_IDLE_BYTES = 256 << 20  # buffers kept between calls
_LAYOUT_BYTES = 1 << 16  # minimum that a fused bucket counts for


class IdleBuckets:
    """Keeps them for later calls; the least recently used are dropped."""

    def __init__(self) -> None:
        self._idle: dict[Entry, list[GroupLayout]] = {}  # the most recently used last
        self.nbytes = 0

    def take(self, entry: Entry) -> GroupLayout | None:
        """Return one for this entry, if there is one."""
        idle = self._idle.get(entry)
        if not idle:
            return None
        bucket = idle.pop()
        self.nbytes -= kept_bytes(bucket)
        return bucket

    def put_back(self, bucket: GroupLayout) -> None:
        """Keep one that is no longer in use."""
        entry = bucket.entries[0]
        self._idle[entry] = [*self._idle.pop(entry, ()), bucket]
        self.nbytes += kept_bytes(bucket)
        while self.nbytes > _IDLE_BYTES and self.nbytes > kept_bytes(bucket):
            oldest = next(iter(self._idle))
            self.nbytes -= kept_bytes(self._idle[oldest].pop(0))
            if not self._idle[oldest]:
                del self._idle[oldest]

    def all(self) -> list[GroupLayout]:
        """Return all that are kept."""
        return [bucket for buckets in self._idle.values() for bucket in buckets]

    def clear(self) -> None:
        """Forget all."""
        self._idle.clear()
        self.nbytes = 0


def kept_bytes(bucket: GroupLayout) -> int:
    """Return the bytes that a bucket counts for."""
    return _LAYOUT_BYTES + sum(buffer.nbytes for buffer in bucket.buffers.values())
