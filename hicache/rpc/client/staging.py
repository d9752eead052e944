"""Pages that are written elsewhere and committed without a copy in this process.

``Staging``: places in this client's own write memory, which another process of the same user may map and fill.
``ForeignMemory``: memory of the caller's own, such as an engine's pinned host pool. ``Reservation.adopt`` takes pages
out of both as prepared.

A place of a Staging has one owner: the Staging, until it is adopted or freed; then the reservation, whose rules for its
own buffers hold (``region``): free again when its Commit was answered, never used again where it was not.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping

from hicache.errors import ExhaustedError, InvalidArgumentError
from hicache.rpc.client.buffers import Bytes
from hicache.rpc.client.region import Block, ForeignRegion, WriteMemory
from hicache.rpc.client.reservation import PageBuffer, Place


@dataclasses.dataclass(frozen=True, slots=True)
class StagingRun:
    """Consecutive places: how another process of the same user maps them, while this one lives.

    Open ``path``, compare the file's inode (descriptors are numbered anew), map ``size_bytes``; ``pages`` places lie
    one after another from ``offset``.
    """

    path: str
    inode: int
    size_bytes: int
    offset: int
    pages: int


class Staging:
    """Places for pages, in order: place ``index`` of ``pages``. Any thread may call it.

    ``free`` gives back those that no reservation has adopted: call it when nobody writes to them any more.
    """

    def __init__(self, memory: WriteMemory, page_bytes: int, pages: int) -> None:
        """Takes between 1 and ``pages`` places. Raises InvalidArgumentError, ExhaustedError where there is none."""
        if page_bytes < 1 or pages < 1:
            raise InvalidArgumentError(f"staging for {pages} pages of {page_bytes} bytes")
        self.page_bytes = page_bytes
        self._memory = memory
        self._lock = threading.Lock()
        self._blocks: list[Block] = []
        self._owned: list[PageBuffer | None] = []  # None: adopted or freed
        while len(self._owned) < pages:
            try:
                block = memory.allocate(page_bytes, pages - len(self._owned))
            except ExhaustedError:
                if not self._owned:
                    raise
                break
            self._blocks.append(block)
            for offset in range(block.offset, block.offset + block.pages * page_bytes, page_bytes):
                data = block.region.bytes[offset : offset + page_bytes]
                self._owned.append(PageBuffer(block.region, offset, data))
        inodes = {block.region: os.fstat(block.region.fd).st_ino for block in self._blocks}
        self.runs = tuple(
            StagingRun(
                path=f"/proc/{os.getpid()}/fd/{block.region.fd}",
                inode=inodes[block.region],
                size_bytes=block.region.size_bytes,
                offset=block.offset,
                pages=block.pages,
            )
            for block in self._blocks
        )

    def __len__(self) -> int:
        return len(self._owned)

    @property
    def pages(self) -> int:
        """How many places there are; fewer than asked for where the client's memory has no more."""
        return len(self._owned)

    def row(self, index: int) -> Bytes:
        """A place as a writable array, in this process. Raises InvalidArgumentError for one that was given away."""
        return self._at(index).bytes

    def seal(self, index: int, checksum: int) -> None:
        """What is to lie there, by xxh3-64: a Commit takes it instead of hashing the place. Raises as ``row`` does."""
        self._at(index).checksum = checksum

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Where the places are, in order."""
        return tuple(self._blocks)

    def free(self) -> None:
        """Give back the places that were not adopted. Idempotent."""
        with self._lock:
            left = [buffer for buffer in self._owned if buffer is not None]
            self._owned = [None] * len(self._owned)
        for buffer in left:
            self._memory.free(buffer.region, buffer.offset, self.page_bytes)

    def of(self, memory: WriteMemory) -> bool:
        """Whether its places are in this memory."""
        return self._memory is memory

    def take(self, index: int) -> PageBuffer:
        """Hand a place over. Raises InvalidArgumentError for one that is not here any more."""
        with self._lock:
            buffer = self._at(index)
            self._owned[index] = None
        return buffer

    def put_back(self, index: int, buffer: PageBuffer) -> None:
        """Undo ``take``."""
        with self._lock:
            self._owned[index] = buffer

    def _at(self, index: int) -> PageBuffer:
        buffer = self._owned[index] if 0 <= index < len(self._owned) else None
        if buffer is None:
            raise InvalidArgumentError(
                f"place {index} of {len(self._owned)} is not there, or was adopted or freed before"
            )
        return buffer


class ForeignMemory:
    """Memory of the caller's own, from which pages are committed as they lie there. Any thread may call it.

    The caller keeps a page unchanged from ``adopt`` until its Commit was answered; should it change nevertheless, the
    page is refused by its checksum, never stored wrong. ``close`` when no more pages are adopted from it.
    """

    def __init__(self, memory: WriteMemory, fd: int, size_bytes: int) -> None:
        """Raises InvalidArgumentError for a descriptor that is no memory of that size, ExhaustedError."""
        self._memory = memory
        self.region = ForeignRegion(fd, size_bytes)
        memory.adopt(self.region)

    @property
    def size_bytes(self) -> int:
        """How much of it may be used."""
        return self.region.size_bytes

    def close(self) -> None:
        """Let go of it; the server does at the next commit or with the session. Idempotent."""
        self._memory.let_go(self.region)

    def of(self, memory: WriteMemory) -> bool:
        """Whether this memory knows it."""
        return self._memory is memory


@dataclasses.dataclass(frozen=True, slots=True)
class _Staged:
    staging: Staging
    index: int

    def check(self, memory: WriteMemory, page_bytes: int) -> None:
        if not self.staging.of(memory):
            raise InvalidArgumentError("the staging memory is another client's")
        if self.staging.page_bytes != page_bytes:
            raise InvalidArgumentError(
                f"the staging memory is for pages of {self.staging.page_bytes} bytes, not {page_bytes}"
            )
        self.staging.row(self.index)

    def take(self, page_bytes: int) -> PageBuffer:
        return self.staging.take(self.index)

    def put_back(self, buffer: PageBuffer) -> None:
        self.staging.put_back(self.index, buffer)


@dataclasses.dataclass(frozen=True, slots=True)
class _Lying:
    foreign: ForeignMemory
    offset: int

    def check(self, memory: WriteMemory, page_bytes: int) -> None:
        region = self.foreign.region
        if not self.foreign.of(memory) or region.fd < 0:
            raise InvalidArgumentError("the memory is another client's, or was closed")
        if not 0 <= self.offset <= region.size_bytes - page_bytes:
            raise InvalidArgumentError(
                f"a page of {page_bytes} bytes at {self.offset} is not in memory of {region.size_bytes} bytes"
            )

    def take(self, page_bytes: int) -> PageBuffer:
        region = self.foreign.region
        return PageBuffer(region, self.offset, region.bytes[self.offset : self.offset + page_bytes])

    def put_back(self, buffer: PageBuffer) -> None:
        """It is its owner's anyway."""


#: Where a page lies: a place of a Staging, or an offset in foreign memory.
Source = tuple[Staging | ForeignMemory, int]


def places(pages: Mapping[int, Source]) -> dict[int, Place]:
    """The callers' words as places. Raises InvalidArgumentError for what is neither."""
    found: dict[int, Place] = {}
    for page, (owner, at) in pages.items():
        if isinstance(owner, Staging):
            found[page] = _Staged(owner, at)
        elif isinstance(owner, ForeignMemory):
            found[page] = _Lying(owner, at)
        else:
            raise InvalidArgumentError(f"page {page}: {type(owner).__name__} is no staging or adopted memory")
    return found
