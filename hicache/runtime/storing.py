"""The calls that bring pages in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from hicache.engine import events
from hicache.engine.actions import CommitResult, ReserveResult
from hicache.errors import InvalidArgumentError, NotFoundError
from hicache.runtime.clock import Clock
from hicache.runtime.counters import Latencies
from hicache.runtime.door import Door
from hicache.runtime.loop import EngineLoop
from hicache.runtime.namespaces import NamespaceBook
from hicache.runtime.regions import RegionRegistry
from hicache.runtime.sources import PageSource, RegionSource
from hicache.runtime.writer import Writer
from hicache.types import NO_USE, Ack, Pressure, Use

#: Reservations whose page size is remembered for ``begin_write``; older ones have ended long ago.
MAX_REMEMBERED = 1 << 16


class StoreCalls:
    """Reserve, commit, write, abort."""

    def __init__(
        self,
        loop: EngineLoop,
        namespaces: NamespaceBook,
        regions: RegionRegistry,
        *,
        door: Door,
        clock: Clock,
        latencies: Latencies,
    ) -> None:
        self._loop = loop
        self._namespaces = namespaces
        self._regions = regions
        self._door = door
        self._clock = clock
        self._latencies = latencies
        self._page_bytes: OrderedDict[tuple[int, int], int] = OrderedDict()  # by (session, reservation)

    async def reserve(
        self,
        session: int,
        namespace: int,
        prompt: bytes,
        *,
        ttl_ms: int = 0,
        wait_ms: int = 0,
        pressure: Pressure = Pressure.WAIT,
        use: Use = NO_USE,
    ) -> ReserveResult:
        """Room for the pages of a prompt that are missing; waits for it up to ``wait_ms``.

        ``use`` is kept with the pages that are stored, for policies and admission.

        A call that is cancelled gives its reservation back. Raises ExhaustedError without room, UnavailableError,
        StaleError, NotFoundError, InvalidArgumentError.
        """
        began = self._clock.now_ns()
        self._door.admit(session)
        whole = self._namespaces.prompt(namespace, prompt)
        result = await self._loop.call(
            ReserveResult,
            lambda request: events.Reserve(
                request, session, namespace, whole, ttl_ms, wait_ms, pressure, use
            ),
            session,
        )
        self.granted(session, namespace, result)
        self._latencies.observe("reserve", self._clock.now_ns() - began)
        return result

    def granted(self, session: int, namespace: int, result: ReserveResult) -> None:
        """A reservation was made: its pages may come as bytes, whose number must be known."""
        if result.reservation:
            self._page_bytes[session, result.reservation] = self._namespaces.find(namespace)[0].page_bytes
            if len(self._page_bytes) > MAX_REMEMBERED:
                self._page_bytes.popitem(last=False)

    async def commit(
        self,
        session: int,
        reservation: int,
        pieces: Sequence[tuple[int, int]],
        source: Sequence[tuple[int, int]],
        *,
        checksums: Sequence[int] = (),
        ack: Ack = Ack.VISIBLE,
        last: bool = False,
    ) -> CommitResult:
        """Copy pages in from the session's own regions and make them visible (or durable).

        ``pieces``: (first page, pages), in page order; ``source``: (region, byte offset) of each; ``checksums``:
        xxh3-64, one a page, or none. Raises InvalidArgumentError, NotFoundError, ConflictError, StaleError.
        """
        if len(pieces) != len(source):
            raise InvalidArgumentError(f"commit: {len(pieces)} pieces and {len(source)} places in regions")
        pages = sum(count for _, count in pieces)
        if checksums and len(checksums) != pages:
            raise InvalidArgumentError(f"commit: {len(checksums)} checksums for {pages} pages")
        if any(offset < 0 for _, offset in source) or any(min(piece) < 0 for piece in pieces):
            raise InvalidArgumentError("commit: pages and offsets must not be negative")
        places = [(self._regions.find(session, region), offset) for region, offset in source]
        how = (RegionSource(pieces, places, checksums), ack, last)
        return await self._commit(session, reservation, pieces, how)

    async def _commit(
        self,
        session: int,
        reservation: int,
        pieces: Sequence[tuple[int, int]],
        how: tuple[PageSource, Ack, bool],
    ) -> CommitResult:
        began = self._clock.now_ns()
        self._door.require(session)
        result = await self._loop.call(
            CommitResult,
            lambda request: events.Commit(request, session, reservation, tuple(pieces), *how),
            session,
        )
        self._latencies.observe("commit", self._clock.now_ns() - began)
        return result

    def begin_write(self, session: int, reservation: int) -> Writer:
        """A commit whose pages will come as bytes. Raises NotFoundError."""
        page_bytes = self._page_bytes.get((session, reservation))
        if page_bytes is None:
            raise NotFoundError(f"reservation {reservation} expired or never was", hint="reserve again")
        return Writer(page_bytes, lambda pieces, *how: self._commit(session, reservation, pieces, how))

    def abort(self, session: int, reservation: int) -> None:
        """Give a reservation back; unknown ones are fine."""
        self._page_bytes.pop((session, reservation), None)
        self._loop.handle(events.Abort(session, reservation))
