"""A commit whose pages arrive as bytes, one by one, with bounded memory.

Pages are handed to the engine in chunks as they come, each chunk a commit of its own; while one is copied in the next
one gathers. The last chunk is kept for ``commit``, whose acknowledgement covers everything: the durable tier is
ancestor-closed, so that where the last page is durable all before it are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hicache.engine.actions import CommitResult
from hicache.errors import ConflictError, CorruptError, InvalidArgumentError
from hicache.runtime.sources import StreamSource
from hicache.types import Ack

#: Commits a chunk: (pieces, source, ack, last) -> result.
Send = Callable[[tuple[tuple[int, int], ...], StreamSource, Ack, bool], Awaitable[CommitResult]]

CHUNK_BYTES = 4 << 20


class Writer:
    """One stream of pages into one reservation. ``close`` it whatever happens; the reservation stays the caller's."""

    def __init__(self, page_bytes: int, send: Send, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.page_bytes = page_bytes
        self._send = send
        self._chunk_pages = max(1, chunk_bytes // page_bytes)
        self._first = -1  # of the pages that are gathered here
        self._pages: dict[int, memoryview] = {}
        self._checksums: dict[int, int] = {}
        self._sent: asyncio.Future[CommitResult] | None = None
        self._total = CommitResult(0, 0, 0, 0)
        self._closed = False

    async def put(self, page: int, data: bytes | bytearray | memoryview, checksum: int | None = None) -> None:
        """Take the next page; the data is the writer's from then on. Waits while an earlier chunk is copied in.

        Raises InvalidArgumentError for a page of another size or out of order, CorruptError when an earlier page
        could not be stored.
        """
        self._check_open()
        if len(data) != self.page_bytes:
            raise InvalidArgumentError(f"page {page} has {len(data)} bytes, not {self.page_bytes}")
        following = self._first + len(self._pages)
        if self._first >= 0 and page != following:
            raise InvalidArgumentError(f"page {page} after page {following - 1}: send pages in order")
        if self._first < 0:
            self._first = page
        if len(self._pages) >= self._chunk_pages:
            await self._settle()
            self._sent = asyncio.ensure_future(self._take(Ack.VISIBLE, last=False))
        self._pages[page] = memoryview(data)
        if checksum is not None:
            self._checksums[page] = checksum

    async def commit(self, ack: Ack = Ack.VISIBLE, last: bool = False) -> CommitResult:  # noqa: FBT001, FBT002
        """Store what is left and answer for all of it. ``last`` gives the reservation's remaining room back."""
        self._check_open()
        await self._settle()
        pages = len(self._pages)
        result = await self._take(ack, last=last)
        self._add(result)
        durable = result.durable_pages
        if pages and durable == pages:
            durable = self._total.stored_pages + self._total.already_present_pages
        total = self._total
        self.close()
        return CommitResult(total.stored_pages, total.already_present_pages, durable, total.failed_pages)

    def close(self) -> None:
        """Drop what was not sent. A chunk being copied in is finished. Idempotent."""
        self._closed = True
        self._pages = {}
        self._checksums = {}
        if self._sent is not None:
            self._sent.add_done_callback(_look)
            self._sent = None

    def _check_open(self) -> None:
        if self._closed:
            raise ConflictError("this write is over", hint="begin another one")

    def _take(self, ack: Ack, *, last: bool) -> Awaitable[CommitResult]:
        """Commit what is gathered. It is taken out here and now, not when the commit comes to run."""
        pages, checksums, first = self._pages, self._checksums, self._first
        self._pages, self._checksums, self._first = {}, {}, first + len(pages)
        pieces = ((first, len(pages)),) if pages else ()
        return self._send(pieces, StreamSource(pages, checksums), ack, last)

    async def _settle(self) -> None:
        """Wait for the chunk under way."""
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        result = await asyncio.shield(sent)
        self._add(result)
        if result.failed_pages:
            raise CorruptError(
                f"{result.failed_pages} of the pages before page {self._first} could not be stored",
                hint="match again and store from there",
            )

    def _add(self, more: CommitResult) -> None:
        self._total = CommitResult(
            self._total.stored_pages + more.stored_pages,
            self._total.already_present_pages + more.already_present_pages,
            self._total.durable_pages + more.durable_pages,
            self._total.failed_pages + more.failed_pages,
        )


def _look(task: asyncio.Future[CommitResult]) -> None:
    """Nobody waits for this chunk; its error was the caller's concern."""
    if not task.cancelled():
        task.exception()
