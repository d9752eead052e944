"""A lease's pages without I/O: where they lie, whether they may still be read, and how they are copied out.

A page read in place is good only if, *after* reading it, the lease's deadline has not passed and the generations of
its slots are what they were when it was granted. The deadline is counted on this process's monotonic clock from
before the call was sent, less a margin, so that it always comes before the server's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from hicache.errors import CorruptError, HicacheError, InvalidArgumentError, NotFoundError, StaleError
from hicache.rpc.client.arena import ArenaRegion
from hicache.rpc.client.buffers import Bytes
from hicache.rpc.client.results import U64, Extent, Grant
from hicache.rpc.pb import cache_pb2

#: Copied and checksummed in pieces that stay in the cache between the two.
VERIFY_BYTES = 2 << 20
Rows = Sequence[Bytes] | npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True)
class MappedRun:
    """Consecutive leased pages in consecutive slots."""

    region: ArenaRegion
    first_page: int
    pages: int
    first_slot: int


@dataclasses.dataclass(frozen=True, slots=True)
class Terms:
    """What stands still while a lease lasts."""

    incarnation: int
    page_bytes: int
    tier_names: tuple[str, ...]
    now_ns: Callable[[], int]
    incarnation_now: Callable[[], int]


class LeaseState:
    """One lease. ``runs`` is empty where its pages come as a stream; then ``private`` holds them once read."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.lease = 0
        self.operation = 0
        self.matched_pages = 0
        self.granted_pages = 0
        self.tier_pages: dict[str, int] = {}
        self.pending_pages = 0
        self.pending_ms = 0
        self.deadline_ns = 0
        self.runs: tuple[MappedRun, ...] = ()
        self.extents: tuple[Extent, ...] = ()  # as the server named them, whether mapped here or not
        self.checksums: U64 = np.empty(0, np.uint64)
        self.generations: U64 = np.empty(0, np.uint64)
        self.private: npt.NDArray[np.uint8] | None = None
        self._over: HicacheError | None = None  # why it can no longer be used

    @property
    def streamed(self) -> bool:
        """Whether the pages must be read from the server."""
        return not self.runs

    def adopt(self, grant: Grant, regions: Mapping[int, ArenaRegion], deadline_ns: int) -> None:
        """The lease as the server sees it now. ``regions`` are those of its extents; none: read as a stream.

        Raises HicacheError for extents that do not lie in their regions.
        """
        runs, page = [], 0
        for extent in grant.extents if regions else ():
            regions[extent.region_id].check(extent, self.terms.page_bytes)
            runs.append(MappedRun(regions[extent.region_id], page, extent.pages, extent.first_slot))
            page += extent.pages
        self.lease, self.operation = grant.lease, grant.operation
        self.matched_pages = grant.matched_pages
        names = self.terms.tier_names
        self.pending_pages, self.pending_ms = grant.pending_pages, grant.pending_ms
        self.tier_pages = {name: pages for name, pages in zip(names, grant.tier_pages, strict=False) if pages}
        self.deadline_ns = deadline_ns
        self.runs, self.checksums, self.generations = tuple(runs), grant.checksums, grant.generations
        self.extents = grant.extents
        if grant.granted_pages != self.granted_pages:
            self.granted_pages, self.private = grant.granted_pages, None

    # --- may it be read?

    def end(self, why: HicacheError) -> None:
        """The lease is over; its memory is let go of. The first reason stays."""
        if self._over is None:
            self._over = why
            self.runs, self.private = (), None

    @property
    def over(self) -> bool:
        """Whether it was released or lost; expiry shows in ``check``."""
        return self._over is not None

    @property
    def expired(self) -> bool:
        """Whether its deadline has passed."""
        return self.terms.now_ns() >= self.deadline_ns

    def check(self) -> None:
        """Raise StaleError or NotFoundError unless its pages are what was leased, this moment."""
        if self._over is not None:
            raise self._over
        if self.terms.incarnation_now() != self.terms.incarnation:
            raise StaleError("the lease was lost with its session: the sidecar restarted", hint="fetch again")
        if not self.lease:
            return
        if self.expired:
            raise NotFoundError(
                f"lease {self.lease} has expired", hint="renew it in time, or ask for a longer ttl_ms"
            )
        for run in self.runs:
            expected = self.generations[run.first_page : run.first_page + run.pages]
            if not run.region.unchanged(run.first_slot, expected):
                raise NotFoundError(f"lease {self.lease}: its slots were reused", hint="fetch again")

    def still_valid(self) -> bool:
        """Whether ``check`` finds nothing."""
        try:
            self.check()
        except HicacheError:
            return False
        return True

    def pages_from(self, first: int, count: int | None) -> int:
        """How many pages a caller means. Raises InvalidArgumentError for pages that are not granted."""
        pages = self.granted_pages - first if count is None else count
        if first < 0 or pages < 0 or first + pages > self.granted_pages:
            raise InvalidArgumentError(
                f"pages [{first}, {first + pages}) are not in a lease of {self.granted_pages} pages"
            )
        return pages

    # --- reading in place

    def views(self, *, verify: bool) -> list[memoryview]:
        """A read-only view of each page. Raises as ``check`` does, and CorruptError where asked to verify."""
        self.check()
        if self.private is not None:
            return [memoryview(row).toreadonly() for row in self.private]
        found: list[memoryview] = []
        for run in self.runs:
            found += run.region.views(run.first_slot, run.pages)
        if verify:
            bad = [page for page, view in enumerate(found) if not self.sound(page, view)]
            self.check()
            self._refuse(bad)
        return found

    # --- copying

    def copy(self, rows: Rows, first: int, *, verify: bool) -> None:
        """Copy pages into ``rows`` (one a page, from page ``first``), then make sure that they are what was leased.

        Raises as ``check`` does, and CorruptError; ``rows`` then hold nothing to be used. Releases the GIL.
        """
        self.check()
        bad: list[int] = []
        for run, page, pages in self.spans(first, len(rows), verify=verify):
            source = run.region.rows(run.first_slot + page - run.first_page, pages)
            _copy_rows(rows, page - first, source)
            if verify:
                bad += [page + i for i in range(pages) if not self.sound(page + i, rows[page + i - first])]
        self.check()
        self._refuse(bad)

    def copy_private(self, rows: Rows, first: int) -> None:
        """As ``copy``, out of pages that were streamed, and verified, before."""
        self.check()
        assert self.private is not None, "pages were streamed"
        _copy_rows(rows, 0, self.private[first : first + len(rows)])

    def spans(self, first: int, count: int, *, verify: bool) -> Iterator[tuple[MappedRun, int, int]]:
        """The parts of runs that hold these pages: (run, first page, pages)."""
        most = max(1, VERIFY_BYTES // self.terms.page_bytes) if verify else count
        for run in self.runs:
            page, end = max(first, run.first_page), min(first + count, run.first_page + run.pages)
            while page < end:
                pages = min(most, end - page)
                yield run, page, pages
                page += pages

    def sound(self, page: int, data: Bytes | memoryview) -> bool:
        """Whether these are the bytes of that page."""
        raw = data if isinstance(data, memoryview) else data.data
        return bool(xxhash.xxh3_64_intdigest(raw) == int(self.checksums[page]))

    def _refuse(self, bad: Sequence[int]) -> None:
        if bad:
            raise CorruptError(f"lease {self.lease}: checksum of page {bad[0]} differs ({len(bad)} in all)")


def _copy_rows(rows: Rows, at: int, source: npt.NDArray[np.uint8]) -> None:
    """One copy where the destination is one array, which numpy does as one move where both are contiguous."""
    if isinstance(rows, np.ndarray):
        np.copyto(rows[at : at + len(source)], source)
        return
    for index, row in enumerate(source):
        np.copyto(rows[at + index], row)


class PageSink:
    """Puts a ReadPages stream into rows, and checks that every page arrives whole and sound."""

    def __init__(self, rows: Rows, first: int, *, verify: bool) -> None:
        self._rows = rows
        self._first = first
        self._verify = verify
        self._filled_bytes = 0  # of the page that is arriving
        self.pages = 0  # that arrived

    def take(self, chunk: cache_pb2.PageChunk) -> None:
        """The next chunk. Raises CorruptError for a page that is not what was stored, HicacheError for disorder."""
        page = self._first + self.pages
        if self.pages >= len(self._rows) or chunk.page != page or chunk.offset != self._filled_bytes:
            raise HicacheError(f"ReadPages sent page {chunk.page} from byte {chunk.offset} out of order")
        row = self._rows[self.pages]
        data = np.frombuffer(chunk.data, dtype=np.uint8)
        end = self._filled_bytes + len(data)
        if not len(data) or end > len(row):
            raise HicacheError(f"ReadPages sent a chunk of {len(data)} bytes that does not fit page {page}")
        np.copyto(row[self._filled_bytes : end], data)
        self._filled_bytes = end
        if end < len(row):
            return
        if self._verify and xxhash.xxh3_64_intdigest(row.data) != chunk.checksum:
            raise CorruptError(f"checksum of page {page} differs after its way over the network")
        self.pages += 1
        self._filled_bytes = 0

    def restart(self) -> None:
        """The stream broke: the page that was arriving comes again."""
        self._filled_bytes = 0

    @property
    def next_page(self) -> int:
        """The page that the stream is to go on with."""
        return self._first + self.pages

    @property
    def missing_pages(self) -> int:
        """Pages that have not arrived."""
        return len(self._rows) - self.pages
