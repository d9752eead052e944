"""The server's arena as this process sees it: regions mapped read-only, found by their ids.

A mapping lives as long as anything refers to it (a lease, a view that a caller kept), so a view never points to
unmapped memory. A retired region leaves the table at once; when the last reference has gone and the memory with it,
its id appears in ``unmapped``, for the server to be told.
"""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from hicache.errors import ExhaustedError, HicacheError, StaleError, UnsupportedError
from hicache.rpc.client.buffers import Bytes
from hicache.rpc.client.results import Extent, RegionInfo

GENERATION_BYTES = 8


@dataclasses.dataclass(slots=True)
class _Fate:
    """What the finalizer of a mapping needs to know; it must not refer to the mapping."""

    region_id: int
    retired: bool = False


class ArenaRegion:
    """One region, mapped read-only. ``generations`` is live shared memory: it changes under its readers."""

    __slots__ = ("__weakref__", "bytes", "fate", "generations", "info", "memory")

    def __init__(self, info: RegionInfo, memory: mmap.mmap, fate: _Fate) -> None:
        self.info = info
        self.fate = fate
        self.memory = memoryview(memory)
        self.bytes: Bytes = np.frombuffer(memory, dtype=np.uint8)
        counted_bytes = info.slots * GENERATION_BYTES if info.counted else 0
        self.generations: npt.NDArray[np.uint64] = self.bytes[:counted_bytes].view("<u8")

    def check(self, extent: Extent, page_bytes: int) -> None:
        """Raise HicacheError for an extent that does not lie in the region's slots."""
        info = self.info
        fits = (
            page_bytes == info.page_bytes
            and extent.first_slot + extent.pages <= info.slots
            and extent.offset == info.first_slot_offset + extent.first_slot * info.slot_stride
        )
        if not fits:
            raise HicacheError(f"the server sent an extent that is not in region {info.region_id}: {extent}")

    def rows(self, first_slot: int, pages: int) -> npt.NDArray[np.uint8]:
        """The bytes of consecutive slots, shape (pages, page_bytes)."""
        info = self.info
        begin = info.first_slot_offset + first_slot * info.slot_stride
        slots = self.bytes[begin : begin + pages * info.slot_stride].reshape(pages, info.slot_stride)
        return slots[:, : info.page_bytes]

    def views(self, first_slot: int, pages: int) -> list[memoryview]:
        """Read-only views of consecutive slots."""
        info, memory = self.info, self.memory
        begin = info.first_slot_offset + first_slot * info.slot_stride
        end = begin + pages * info.slot_stride
        return [memory[at : at + info.page_bytes] for at in range(begin, end, info.slot_stride)]

    def unchanged(self, first_slot: int, expected: npt.NDArray[np.uint64]) -> bool:
        """Whether these slots still hold what was leased, as far as counters tell; without, the deadline alone does."""
        if not self.info.counted:
            return True
        now = self.generations[first_slot : first_slot + len(expected)]
        return bool(np.array_equal(now, expected))


class Arena:
    """The mapped regions of one session. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._regions: dict[int, ArenaRegion] = {}
        self._incarnation = 0
        self.unmapped: deque[int] = deque()  # retired regions whose memory has gone: to be confirmed
        #: Called with each region that leaves the table: whoever registered its memory with a device lets go of it.
        self.watchers: list[Callable[[ArenaRegion], None]] = []

    def __len__(self) -> int:
        return len(self._regions)

    def find(self, region_id: int) -> ArenaRegion | None:
        """The mapped region of that id."""
        return self._regions.get(region_id)

    def unknown(self, region_ids: Iterable[int]) -> set[int]:
        """Those that are not mapped yet."""
        return {region_id for region_id in region_ids if region_id not in self._regions}

    def add(self, info: RegionInfo, fd: int, incarnation: int = 0) -> ArenaRegion:
        """Map a region; the descriptor stays the caller's. A region that is mapped already wins.

        Raises UnsupportedError for a descriptor that is not the sealed region described, ExhaustedError where the
        system has no room for the mapping, StaleError where it was given to a session that is over: another run of the
        sidecar uses the same numbers.
        """
        _check_region(info, fd)
        try:
            memory = mmap.mmap(fd, info.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise ExhaustedError(f"cannot map arena region {info.region_id}: {error}") from error
        fate = _Fate(info.region_id)
        weakref.finalize(memory, _gone, fate, self.unmapped).atexit = False
        with self._lock:
            if incarnation != self._incarnation:
                raise StaleError("the session ended while its regions were being mapped")
            return self._regions.setdefault(info.region_id, ArenaRegion(info, memory, fate))

    def retire(self, region_id: int) -> None:
        """Forget a region; its id appears in ``unmapped`` when nothing refers to its memory any more."""
        with self._lock:
            region = self._regions.pop(region_id, None)
        if region is None:
            self.unmapped.append(region_id)
        else:
            region.fate.retired = True
            self._tell([region])

    def begin(self, incarnation: int) -> None:
        """Forget all regions: the session that was given them is gone, and this one has begun."""
        with self._lock:
            self._incarnation = incarnation
            gone = list(self._regions.values())
            self._regions.clear()
            self.unmapped.clear()
        self._tell(gone)

    def clear(self) -> None:
        """Forget all regions (the client is closed)."""
        self.begin(self._incarnation)

    def _tell(self, gone: Iterable[ArenaRegion]) -> None:
        for region in gone:
            for watcher in list(self.watchers):
                watcher(region)


def _gone(fate: _Fate, unmapped: deque[int]) -> None:
    if fate.retired:
        unmapped.append(fate.region_id)


def _check_region(info: RegionInfo, fd: int) -> None:
    """A mapping past the end of a file, or of one that may shrink, would kill this process with SIGBUS."""
    try:
        sealed = bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        sealed = False
    size_bytes = os.fstat(fd).st_size
    if not sealed or size_bytes < info.size_bytes:
        raise UnsupportedError(
            f"arena region {info.region_id}: the descriptor is no sealed memory of {info.size_bytes} bytes"
        )
    slots_end = info.first_slot_offset + info.slots * info.slot_stride
    if (
        info.page_bytes < 1
        or info.page_bytes > info.slot_stride
        or (info.counted and info.slots * GENERATION_BYTES > info.first_slot_offset)
        or slots_end > info.size_bytes
    ):
        raise UnsupportedError(f"arena region {info.region_id}: its layout does not fit it: {info}")
