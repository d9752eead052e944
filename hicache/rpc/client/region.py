"""The client's own memory: memfds that it writes and the server only reads, cut into page buffers.

A buffer's life: free -> allocated -> (committed, and the Commit was answered) -> free. Where a Commit was never
answered the server may still be reading, so its region is *poisoned*: nothing in it is handed out again, and it is
discarded when no buffer in it is in use; the server keeps its own reference to the memory, whose content stays.

Regions are registered with the server when a Commit first names them, once a session.
"""

from __future__ import annotations

import bisect
import dataclasses
import fcntl
import mmap
import os
import stat
import threading

import numpy as np

from hicache.errors import ExhaustedError, InvalidArgumentError
from hicache.rpc.client.buffers import Bytes
from hicache.types import LARGE_ALIGN_BYTES, LARGE_PAGE_BYTES, SMALL_ALIGN_BYTES

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    """A region's id, in the session of that incarnation."""

    incarnation: int
    region_id: int


class WriteRegion:
    """One memfd, mapped writable, and the order of its free space: disjoint spans, sorted, never touching."""

    __slots__ = ("bytes", "fd", "poisoned", "registration", "size_bytes", "spans", "used_bytes")

    def __init__(self, size_bytes: int) -> None:
        """Raises ExhaustedError where the system has no descriptor or memory for it."""
        self.fd = -1
        try:
            self.fd = os.memfd_create("hicache-client", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            memory = mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            self.close()
            raise ExhaustedError(f"no shared memory of {size_bytes} bytes: {error}") from error
        self.bytes: Bytes = np.frombuffer(memory, dtype=np.uint8)
        self.size_bytes = size_bytes
        self.spans: list[tuple[int, int]] = [(0, size_bytes)]
        self.used_bytes = 0
        self.poisoned = False
        self.registration: Registration | None = None

    def close(self) -> None:
        """Close the descriptor; the mapping goes when the last view of it does. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def room(self, page_bytes: int, count: int) -> tuple[int, int]:
        """The first span that holds ``count`` pages, else the one that holds most: (offset, pages), pages may be 0."""
        best_offset, best_pages = 0, 0
        align = LARGE_ALIGN_BYTES if page_bytes >= LARGE_PAGE_BYTES else SMALL_ALIGN_BYTES
        for begin, end in self.spans:
            offset = -(-begin // align) * align
            pages = min(count, (end - offset) // page_bytes)
            if pages > best_pages:
                best_offset, best_pages = offset, pages
            if pages == count:
                break
        return best_offset, best_pages

    def take(self, offset: int, size_bytes: int) -> None:
        """Take free bytes out of the span that holds them."""
        index = bisect.bisect_right(self.spans, offset, key=lambda span: span[0]) - 1
        begin, end = self.spans[index]
        assert begin <= offset and offset + size_bytes <= end, "taken bytes are free"
        rest = [(begin, offset), (offset + size_bytes, end)]
        self.spans[index : index + 1] = [span for span in rest if span[0] < span[1]]
        self.used_bytes += size_bytes

    def give(self, offset: int, size_bytes: int) -> None:
        """Give taken bytes back, joined with their free neighbours."""
        begin, end = offset, offset + size_bytes
        index = bisect.bisect_left(self.spans, begin, key=lambda span: span[0])
        before = self.spans[index - 1] if index else None
        after = self.spans[index] if index < len(self.spans) else None
        assert before is None or before[1] <= begin, "given bytes were taken"
        assert after is None or end <= after[0], "given bytes were taken"
        first, last = index, index
        if before is not None and before[1] == begin:
            begin, first = before[0], index - 1
        if after is not None and after[0] == end:
            end, last = after[1], index + 1
        self.spans[first:last] = [(begin, end)]
        self.used_bytes -= size_bytes


class ForeignRegion:
    """Memory of the caller's own (a memfd, or a file in shared memory), mapped to be read; never handed out."""

    __slots__ = ("bytes", "fd", "inode", "registration", "size_bytes")

    def __init__(self, fd: int, size_bytes: int) -> None:
        """The descriptor is duplicated. Raises InvalidArgumentError where it cannot be used, ExhaustedError."""
        self.registration: Registration | None = None
        self.size_bytes = size_bytes
        self.fd = -1
        try:
            self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
            found = os.fstat(self.fd)
        except OSError as error:
            raise InvalidArgumentError(f"descriptor {fd} cannot be used: {error}") from error
        if not stat.S_ISREG(found.st_mode) or not 0 < size_bytes <= found.st_size:
            self.close()
            raise InvalidArgumentError(
                f"descriptor {fd} is no memory of {size_bytes} bytes: it has {found.st_size}",
                hint="give the descriptor of a memfd, or of a file in shared memory",
            )
        self.inode = found.st_ino
        try:
            memory = mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            self.close()
            raise ExhaustedError(f"cannot map {size_bytes} bytes of descriptor {fd}: {error}") from error
        self.bytes: Bytes = np.frombuffer(memory, dtype=np.uint8)

    def close(self) -> None:
        """Close our descriptor; the mapping goes with the last view of it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


Region = WriteRegion | ForeignRegion


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """Consecutive page buffers; each is given back on its own."""

    region: WriteRegion
    offset: int
    pages: int


class WriteMemory:
    """All regions of one client, bounded. Any thread may call it."""

    def __init__(self, limit_bytes: int, step_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._step_bytes = min(step_bytes, limit_bytes)
        self._lock = threading.Lock()
        self._regions: list[WriteRegion] = []
        self._foreign: set[ForeignRegion] = set()
        self._discarded: list[Registration] = []

    @property
    def mapped_bytes(self) -> int:
        """The size of all regions."""
        return sum(region.size_bytes for region in self._regions)

    @property
    def used_bytes(self) -> int:
        """Bytes in buffers that are handed out."""
        return sum(region.used_bytes for region in self._regions)

    def allocate(self, page_bytes: int, count: int) -> Block:
        """Between 1 and ``count`` consecutive page buffers.

        Raises InvalidArgumentError for pages larger than the limit, ExhaustedError where the limit is reached.
        """
        if page_bytes > self.limit_bytes:
            raise InvalidArgumentError(
                f"a page of {page_bytes} bytes exceeds the client's limit of {self.limit_bytes} bytes",
                hint="raise write_limit_bytes",
            )
        with self._lock:
            region, offset, pages = self._find(page_bytes, count)
            region.take(offset, pages * page_bytes)
            return Block(region, offset, pages)

    def free(self, region: Region, offset: int, page_bytes: int) -> None:
        """Give one page buffer back; foreign memory stays its owner's."""
        if isinstance(region, ForeignRegion):
            return
        with self._lock:
            region.give(offset, page_bytes)
            if region.poisoned and not region.used_bytes and region in self._regions:
                self._discard(region)

    def poison(self, region: Region) -> None:
        """The server may read from this region for an unknown time: hand nothing in it out again.

        Foreign memory is never handed out; what is committed from it always carries checksums, which the server
        compares with its own copy, so that what its owner writes meanwhile is not stored.
        """
        if isinstance(region, WriteRegion):
            with self._lock:
                region.poisoned = True

    def adopt(self, region: ForeignRegion) -> None:
        """Own a foreign region until it is let go of."""
        with self._lock:
            self._foreign.add(region)

    def let_go(self, region: ForeignRegion) -> None:
        """Close a foreign region; the server is told at the next commit. Idempotent."""
        with self._lock:
            if region not in self._foreign:
                return
            self._foreign.discard(region)
            region.close()
            if region.registration is not None:
                self._discarded.append(region.registration)

    def discarded(self) -> list[Registration]:
        """Registrations of regions that are gone, each told once: to be unregistered."""
        with self._lock:
            found, self._discarded = self._discarded, []
        return found

    def close(self) -> None:
        """Close all regions; views that callers kept stay readable. Idempotent."""
        with self._lock:
            for region in self._regions:
                region.close()
            for foreign in self._foreign:
                foreign.close()
            self._regions.clear()
            self._foreign.clear()

    def _find(self, page_bytes: int, count: int) -> tuple[WriteRegion, int, int]:
        """Where the buffers go: the region with the most room, a new one where none holds all of them."""
        best: tuple[WriteRegion, int, int] | None = None
        for region in self._regions:
            if region.poisoned:
                continue
            offset, pages = region.room(page_bytes, count)
            if pages == count:
                return region, offset, pages
            if pages and (best is None or pages > best[2]):
                best = (region, offset, pages)
        left_bytes = self.limit_bytes - self.mapped_bytes
        if best is None and left_bytes < page_bytes:
            self._discard_unused()  # regions too small or too cut up for this page size
            left_bytes = self.limit_bytes - self.mapped_bytes
        if left_bytes >= page_bytes and (best is None or left_bytes >= count * page_bytes):
            region = self._grow(page_bytes, count, left_bytes)
            offset, pages = region.room(page_bytes, count)
            return region, offset, pages
        if best is None:
            raise ExhaustedError(
                f"all {self.limit_bytes} bytes of the client's write memory are in use",
                hint="commit or abort what is prepared, or raise write_limit_bytes",
            )
        return best

    def _grow(self, page_bytes: int, count: int, left_bytes: int) -> WriteRegion:
        size_bytes = min(max(self._step_bytes, count * page_bytes), left_bytes)
        region = WriteRegion(size_bytes)
        self._regions.append(region)
        return region

    def _discard_unused(self) -> None:
        for region in [region for region in self._regions if not region.used_bytes]:
            self._discard(region)

    def _discard(self, region: WriteRegion) -> None:
        self._regions.remove(region)
        region.close()
        if region.registration is not None:
            self._discarded.append(region.registration)
