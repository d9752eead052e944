"""A reservation's pages without I/O: buffers in the client's own memory, and what is committed out of them.

A page's way: missing -> prepared (it has a buffer) -> sending (a Commit names it) -> committed. A Commit that was
refused brings its pages back to prepared; one that was never answered loses them, and poisons their region.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import xxhash

from hicache.errors import InvalidArgumentError, NotFoundError
from hicache.rpc.client.buffers import Bytes, readable
from hicache.rpc.client.calls import Piece
from hicache.rpc.client.region import ForeignRegion, Region, WriteMemory
from hicache.rpc.client.results import Reserved

#: How far ahead consecutive buffers are set aside, so that consecutive pages make one piece.
AHEAD_BYTES = 64 << 20


@dataclasses.dataclass(slots=True)
class PageBuffer:
    """One page's place in the client's memory, and the view of it that was handed out.

    ``checksum``: of what is to lie there, where that was fixed before it arrived (on a GPU).
    """

    region: Region
    offset: int
    bytes: Bytes
    view: memoryview | None = None
    checksum: int | None = None


class Place(Protocol):
    """Where a page lies that was written elsewhere."""

    def check(self, memory: WriteMemory, page_bytes: int) -> None:
        """Raise InvalidArgumentError for a place that cannot hold such a page of this client."""

    def take(self, page_bytes: int) -> PageBuffer:
        """Hand it over. Raises InvalidArgumentError where it was handed over before."""

    def put_back(self, buffer: PageBuffer) -> None:
        """Undo ``take``."""


class ReservationState:
    """One reservation, or none where nothing was missing (``reservation`` 0)."""

    def __init__(self, reserved: Reserved, incarnation: int, page_bytes: int, memory: WriteMemory) -> None:
        self.reservation = reserved.reservation
        self.present_pages = reserved.present_pages
        self.missing_pages = reserved.missing_pages
        self.expires_in_ms = reserved.expires_in_ms
        self.incarnation = incarnation
        self.page_bytes = page_bytes
        self.ended = not reserved.reservation
        self._memory = memory
        self._lock = threading.RLock()  # pages may be prepared by several threads
        self._prepared: dict[int, PageBuffer] = {}
        self._ahead: dict[int, PageBuffer] = {}
        self._done: set[int] = set()  # sending or committed
        self._open = reserved.present_pages  # no page before this one is open

    @property
    def first_open(self) -> int | None:
        """The first page that is neither prepared nor committed; None where there is none."""
        with self._lock:
            end = self.present_pages + self.missing_pages
            while self._open < end and (self._open in self._prepared or self._open in self._done):
                self._open += 1
            return self._open if self._open < end else None

    # --- preparing

    def buffer(self, page: int) -> memoryview:
        """The writable buffer of a missing page. Raises InvalidArgumentError, NotFoundError, ExhaustedError."""
        with self._lock:
            found = self._buffer(page)
            if found.view is None:
                found.view = found.bytes.data
            return found.view

    def write(self, page: int, data: Any) -> None:
        """Copy a page's bytes into its buffer; releases the GIL. Raises as ``buffer`` does."""
        source = readable(data)
        if source.nbytes != self.page_bytes:
            raise InvalidArgumentError(
                f"page {page}: {source.nbytes} bytes given, a page has {self.page_bytes}"
            )
        with self._lock:
            target = self._buffer(page).bytes
        np.copyto(target, source)

    def adopt(self, pages: Mapping[int, Place]) -> None:
        """Take pages as prepared that were written elsewhere: no copy is made. All of them, or none.

        What a place hands over is this reservation's from now on, as its own buffers are. Raises InvalidArgumentError
        for pages that are not missing or are prepared already, and for places that do not fit or were given away.
        """
        with self._lock:
            for page, place in pages.items():
                self._require_missing(page)
                if page in self._prepared:
                    raise InvalidArgumentError(f"page {page} was written already")
                place.check(self._memory, self.page_bytes)
            taken: dict[int, PageBuffer] = {}
            try:
                for page, place in pages.items():
                    taken[page] = place.take(self.page_bytes)
            except InvalidArgumentError:  # one place for two pages, or another thread was faster
                for page, buffer in taken.items():
                    pages[page].put_back(buffer)
                raise
            ahead = {page: self._ahead.pop(page) for page in taken if page in self._ahead}
            self._prepared.update(taken)
        self._free(ahead)

    def _require_missing(self, page: int) -> int:
        """The end of the missing pages, of which this is one that was not committed yet."""
        if self.ended:
            raise NotFoundError("the reservation has ended" if self.reservation else "nothing was missing")
        end = self.present_pages + self.missing_pages
        if not self.present_pages <= page < end:
            raise InvalidArgumentError(f"page {page} is not missing; pages [{self.present_pages}, {end}) are")
        if page in self._done:
            raise InvalidArgumentError(f"page {page} was committed already")
        return end

    def _buffer(self, page: int) -> PageBuffer:
        end = self._require_missing(page)
        if page not in self._prepared:
            if page not in self._ahead:
                self._set_aside(page, end)
            self._prepared[page] = self._ahead.pop(page)
        return self._prepared[page]

    def _set_aside(self, page: int, end: int) -> None:
        """Buffers for this page and for those after it that have none."""
        taken = self._prepared.keys() | self._ahead.keys() | self._done
        count, most = 1, min(end - page, max(1, AHEAD_BYTES // self.page_bytes))
        while count < most and page + count not in taken:
            count += 1
        block = self._memory.allocate(self.page_bytes, count)
        for index in range(block.pages):
            offset = block.offset + index * self.page_bytes
            data = block.region.bytes[offset : offset + self.page_bytes]
            self._ahead[page + index] = PageBuffer(block.region, offset, data)

    # --- committing

    def select(self, pages: Iterable[int] | None) -> dict[int, PageBuffer]:
        """Take prepared pages for a Commit, in order; None: all. Raises InvalidArgumentError for others."""
        with self._lock:
            chosen = sorted(self._prepared if pages is None else set(pages))
            unprepared = [page for page in chosen if page not in self._prepared]
            if unprepared:
                raise InvalidArgumentError(
                    f"page {unprepared[0]} has not been written", hint="write() or buffer() it first"
                )
            self._done.update(chosen)
            return {page: self._prepared.pop(page) for page in chosen}

    def claim(self, first: int, pages: int) -> None:
        """Take pages for a Commit out of an engine's KV, all or none. Raises InvalidArgumentError, NotFoundError."""
        with self._lock:
            for page in range(first, first + pages):
                self._require_missing(page)
                if page in self._prepared:
                    raise InvalidArgumentError(f"page {page} was written already")
            self._done.update(range(first, first + pages))
            ahead = {
                page: self._ahead.pop(page) for page in range(first, first + pages) if page in self._ahead
            }
        self._free(ahead)

    def unclaim(self, first: int, pages: int) -> None:
        """Undo ``claim``: that Commit was refused."""
        with self._lock:
            self._done.difference_update(range(first, first + pages))
            self._open = self.present_pages

    def committed(self, sent: dict[int, PageBuffer]) -> None:
        """The Commit was answered: its buffers are free."""
        self._free(sent)

    def refused(self, sent: dict[int, PageBuffer]) -> None:
        """The Commit was refused: its pages are prepared still."""
        with self._lock:
            self._done.difference_update(sent)
            self._open = self.present_pages
            if not self.ended:
                self._prepared.update(sent)
                return
        self._free(sent)

    def unanswered(self, sent: dict[int, PageBuffer]) -> None:
        """Nobody knows whether the server still reads: the buffers are never used again."""
        for buffer in sent.values():
            self._memory.poison(buffer.region)
        self._free(sent)

    def end(self) -> None:
        """No more pages: what is prepared is let go. Idempotent."""
        with self._lock:
            self.ended = True
            left = self._prepared | self._ahead
            self._prepared, self._ahead = {}, {}
        self._free(left)

    def _free(self, buffers: dict[int, PageBuffer]) -> None:
        for buffer in buffers.values():
            if buffer.view is not None:
                _revoke(buffer.view)
            self._memory.free(buffer.region, buffer.offset, self.page_bytes)


def _revoke(view: memoryview) -> None:
    """A later write through the handed-out view fails, unless something was made from it."""
    try:
        view.release()
    except BufferError:
        return


def checksums(buffers: dict[int, PageBuffer]) -> list[int]:
    """xxh3-64 of each page."""
    return [
        xxhash.xxh3_64_intdigest(buffer.bytes.data) if buffer.checksum is None else buffer.checksum
        for buffer in buffers.values()
    ]


def pieces(buffers: dict[int, PageBuffer], region_ids: dict[Region, int], page_bytes: int) -> list[Piece]:
    """The pages of a Commit, those that follow each other in memory joined."""
    found: list[Piece] = []
    for page, buffer in buffers.items():
        piece = Piece(page, 1, region_ids[buffer.region], buffer.offset)
        if found and _continues(found[-1], piece, page_bytes):
            last = found.pop()
            piece = dataclasses.replace(last, pages=last.pages + 1)
        found.append(piece)
    return found


def _continues(last: Piece, piece: Piece, page_bytes: int) -> bool:
    return (
        piece.first_page == last.first_page + last.pages
        and piece.region_id == last.region_id
        and piece.offset == last.offset + last.pages * page_bytes
    )


def foreign(buffers: dict[int, PageBuffer]) -> bool:
    """Whether a page lies in memory that its owner may write to at any time."""
    return any(isinstance(buffer.region, ForeignRegion) for buffer in buffers.values())


def regions(buffers: dict[int, PageBuffer]) -> Sequence[Region]:
    """The regions of a Commit, each once."""
    return list(dict.fromkeys(buffer.region for buffer in buffers.values()))
