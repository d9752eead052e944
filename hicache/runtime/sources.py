"""Where the pages of a commit come from: a client's registered memory, a stream, or an engine's paged KV."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import xxhash

from hicache.device.transfers import HostPages
from hicache.runtime.regions import ClientRegion
from hicache.tier.region import read_region
from hicache.types import Outcome


class PageSource(Protocol):
    """Pages of one commit, by page number. ``read`` runs on a worker, the rest on the loop's thread."""

    def hold(self) -> None:
        """A copy begins: what it reads stays until ``release``."""

    def release(self) -> None:
        """Undo one ``hold``."""

    def read(self, pages: Sequence[int], buffers: Sequence[memoryview]) -> list[Outcome]:
        """Fill the buffers. Never raises for what a client did."""

    def expected(self, page: int) -> int | None:
        """The checksum that the client gave, if it gave one."""


#: What became of pages that were copied in: an outcome, and a checksum of the copy, a page.
Filled = list[tuple[Outcome, int]]


@runtime_checkable
class StartedSource(Protocol):
    """Pages that come by themselves, whenever they are there: they are asked for, and no thread is kept for them.

    All on the loop's thread.
    """

    #: Whether they go to the tier's slots, all at once; else to buffers, and on from there as any other's.
    direct: bool

    def hold(self) -> None:
        """As a PageSource's."""

    def release(self) -> None:
        """As a PageSource's."""

    def start(self, pages: Sequence[int], into: HostPages, done: Callable[[Filled], None]) -> None:
        """Have the pages copied; ``done`` gets what became of them, later, whatever happens."""


class RegionSource:
    """Pieces of client regions. ``pieces``: (first page, pages) in page order, each from its (region, offset)."""

    def __init__(
        self,
        pieces: Sequence[tuple[int, int]],
        places: Sequence[tuple[ClientRegion, int]],
        checksums: Sequence[int] = (),
    ) -> None:
        assert len(pieces) == len(places), "one place a piece"
        self._firsts = [first for first, _ in pieces]
        self._places = places
        self._checksums = checksums
        self._before = [0]  # pages in the pieces before each
        for _, pages in pieces:
            self._before.append(self._before[-1] + pages)

    def __repr__(self) -> str:
        """The same for all: actions are digested by what they show, and a replay has no regions."""
        return "PageSource()"

    def hold(self) -> None:
        """See PageSource."""
        for region, _ in self._places:
            region.hold()

    def release(self) -> None:
        """See PageSource."""
        for region, _ in self._places:
            region.release()

    def read(self, pages: Sequence[int], buffers: Sequence[memoryview]) -> list[Outcome]:
        """See PageSource: with preadv, so that a region cut short is a fault and nothing worse."""
        outcomes: list[Outcome] = []
        start = 0
        while start < len(pages):
            piece = self._piece(pages[start])
            end = start + 1
            while end < len(pages) and self._piece(pages[end]) == piece:
                end += 1
            region, base = self._places[piece]
            size = buffers[start].nbytes
            offsets = [base + (page - self._firsts[piece]) * size for page in pages[start:end]]
            outcomes += read_region(region.fd, offsets, buffers[start:end])
            start = end
        return outcomes

    def expected(self, page: int) -> int | None:
        """See PageSource."""
        if not self._checksums:
            return None
        piece = self._piece(page)
        return self._checksums[self._before[piece] + page - self._firsts[piece]]

    def _piece(self, page: int) -> int:
        return bisect.bisect_right(self._firsts, page) - 1


class StreamSource:
    """Pages that arrived as bytes."""

    def __init__(self, pages: Mapping[int, memoryview], checksums: Mapping[int, int]) -> None:
        self._pages = pages
        self._checksums = checksums

    def __repr__(self) -> str:
        """The same for all: actions are digested by what they show, and a replay has no regions."""
        return "PageSource()"

    def hold(self) -> None:
        """See PageSource; the pages are its own."""

    def release(self) -> None:
        """See PageSource."""

    def read(self, pages: Sequence[int], buffers: Sequence[memoryview]) -> list[Outcome]:
        """See PageSource."""
        for page, buffer in zip(pages, buffers, strict=True):
            np.copyto(np.frombuffer(buffer, np.uint8), np.frombuffer(self._pages[page], np.uint8))
        return [Outcome.OK] * len(pages)

    def expected(self, page: int) -> int | None:
        """See PageSource."""
        return self._checksums.get(page)


def filler(
    source: PageSource, pages: Sequence[int], buffers: Sequence[memoryview]
) -> Callable[[], list[tuple[Outcome, int]]]:
    """Work for a worker: copy first, then checksum the copy, which the client can no longer change.

    It returns (outcome, checksum of the copy) a page: FAULT where the source could not be read, CORRUPT where the
    client gave another checksum.
    """

    def fill() -> list[tuple[Outcome, int]]:
        filled: list[tuple[Outcome, int]] = []
        for page, outcome, buffer in zip(pages, source.read(pages, buffers), buffers, strict=True):
            if outcome is not Outcome.OK:
                filled.append((outcome, 0))
                continue
            checksum = xxhash.xxh3_64_intdigest(buffer)
            wanted = source.expected(page)
            wrong = wanted is not None and wanted != checksum
            filled.append((Outcome.CORRUPT if wrong else Outcome.OK, checksum))
        return filled

    return fill
