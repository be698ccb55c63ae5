"""Assignment of gradients to fused buckets, which adapt to the order in which gradients arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from hvd_quant.exchange.layout import Entry, GroupLayout
from hvd_quant.exchange.topology import Topology
from hvd_quant.exchange.transport import Buffer
from hvd_quant.schemes import MAX_BITS, MIN_BITS

_BUCKETS_KEPT = MAX_BITS - MIN_BITS + 1  # per group of gradients, for schemes that change their bits


class HasEntry(Protocol):
    """A gradient with an entry."""

    @property
    def entry(self) -> Entry:
        """Its place in a fused bucket."""


T = TypeVar("T", bound=HasEntry)


class FusionGroup(Generic[T]):
    """Entries that travel together, and their gradients that have arrived.

    Args:
        name: the same on all ranks, whatever each has in the group: so ranks that disagree meet.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: dict[str, Entry] = {}
        self.nbytes = 0  # gradient bytes, uncompressed
        self.arrived: dict[str, T] = {}
        self.open = False  # more entries may join
        self.times_sent = 0
        self._splits = 0
        self._bucket: GroupLayout | None = None
        self._buckets: dict[tuple[Entry, ...], GroupLayout] = {}  # for schemes that change
        self._buffers: dict[str, Buffer] = {}

    @property
    def complete(self) -> bool:
        """Whether all expected gradients have arrived."""
        return not self.open and len(self.arrived) == len(self.entries)

    def put(self, entry: Entry) -> None:
        """Append an entry, or replace the one with its key."""
        former = self.entries.get(entry.key)
        self.nbytes += entry.nbytes - (former.nbytes if former is not None else 0)
        self.entries[entry.key] = entry
        self._bucket = None

    def take_out(self, keys: Iterable[str]) -> list[Entry]:
        """Remove entries."""
        entries = [self.entries.pop(key) for key in keys]
        self.nbytes -= sum(entry.nbytes for entry in entries)
        self._bucket = None
        return entries

    def split(self) -> FusionGroup[T]:
        """Keep what has arrived, and return a group of the rest."""
        others: FusionGroup[T] = FusionGroup(f"{self.name}.{self._splits}")
        self._splits += 1
        for entry in self.take_out([key for key in self.entries if key not in self.arrived]):
            others.put(entry)
        return others

    def bucket(self, size: int, rank: int, seed: object, topology: Topology | None = None) -> GroupLayout:
        """Return the fused bucket of the entries."""
        if self._bucket is None:
            entries = tuple(self.entries.values())
            if entries not in self._buckets:
                if len(self._buckets) == _BUCKETS_KEPT:
                    self._buckets.clear()
                self._buckets[entries] = GroupLayout(entries, size, rank, seed, topology, self._buffers)
            self._bucket = self._buckets[entries]
        return self._bucket


class Fusion(Generic[T]):
    """Assigns gradients to fused buckets as they arrive.

    Gradients known in advance (`plan`) and those of an earlier step have their bucket. Others join the open
    one, which is closed when it is full. A bucket that was sent incomplete, because a result was requested,
    is split from then on into what had arrived and what had not. So buckets adapt to the training loop, in
    the same way on all ranks, as long as these request results after the same gradients.

    Args:
        fusion_bytes: size at which a bucket is full, in bytes of its gradients.
    """

    def __init__(self, fusion_bytes: int) -> None:
        self.fusion_bytes = fusion_bytes
        self._group_of: dict[str, FusionGroup[T]] = {}
        self._open: dict[str, FusionGroup[T]] = {}  # by device
        self._waiting: dict[str, FusionGroup[T]] = {}  # groups that have arrived in part, by name, in order
        self._groups = 0

    def plan(self, entries: Sequence[Entry]) -> None:
        """Lay out gradients that are expected, in the order in which they are expected."""
        for device in dict.fromkeys(entry.device for entry in entries):
            group = None
            for entry in entries:
                if entry.device != device:
                    continue
                if group is None or group.nbytes >= self.fusion_bytes:
                    group = self._new_group()
                group.put(entry)
                self._group_of[entry.key] = group

    def _new_group(self) -> FusionGroup[T]:
        self._groups += 1
        return FusionGroup(str(self._groups - 1))

    def group_of(self, entry: Entry) -> FusionGroup[T]:
        """Return the entry's group: if it is new or on a new device, the open one from now on.

        An entry that has changed otherwise keeps its group, because changed ones may arrive in another order
        on every rank.
        """
        group = self._group_of.get(entry.key)
        if group is not None:
            known = group.entries[entry.key]
            if known is entry:
                return group
            if known == entry:
                group.entries[entry.key] = entry  # found at once next time
                return group
            if known.device == entry.device:
                group.put(entry)
                return group
            group.take_out([entry.key])
        group = self._open.get(entry.device)
        if group is None:
            group = self._open[entry.device] = self._new_group()
            group.open = True
        group.put(entry)
        self._group_of[entry.key] = group
        return group

    def add(self, gradient: T) -> tuple[FusionGroup[T], list[T]] | None:
        """Note that a gradient has arrived.

        Returns:
            The group that is to be sent now, if any, and its gradients in the order of its entries.
        """
        entry = gradient.entry
        group = self.group_of(entry)
        group.arrived[entry.key] = gradient
        self._waiting[group.name] = group
        if group.open and group.nbytes >= self.fusion_bytes:
            self._close(group)
        return self._pop(group) if group.complete else None

    def flush(self) -> list[tuple[FusionGroup[T], list[T]]]:
        """Return everything that has arrived, to be sent now, even if its group is incomplete."""
        groups = list(self._waiting.values())
        for group in groups:
            self._close(group)
            if not group.complete:
                others = group.split()
                self._group_of.update(dict.fromkeys(others.entries, others))
        return [self._pop(group) for group in groups]

    def _close(self, group: FusionGroup[T]) -> None:
        if group.open:
            group.open = False
            self._open = {device: other for device, other in self._open.items() if other is not group}

    def _pop(self, group: FusionGroup[T]) -> tuple[FusionGroup[T], list[T]]:
        gradients = [group.arrived[key] for key in group.entries]
        group.arrived.clear()
        group.times_sent += 1
        del self._waiting[group.name]
        return group, gradients
