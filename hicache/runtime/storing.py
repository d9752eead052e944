"""The calls that bring pages in."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

from hicache.engine import events
from hicache.engine.actions import CommitResult, ReserveResult
from hicache.errors import InvalidArgumentError, NotFoundError
from hicache.runtime.clock import Clock
from hicache.runtime.counters import Latencies
from hicache.runtime.door import Door
from hicache.runtime.kv_regions import KvRegions
from hicache.runtime.loop import EngineLoop
from hicache.runtime.namespaces import NamespaceBook
from hicache.runtime.packing import PackAsk, PackCalls
from hicache.runtime.paged import PagedPlaces
from hicache.runtime.regions import RegionRegistry
from hicache.runtime.sources import PageSource, RegionSource, StartedSource
from hicache.runtime.writer import Writer
from hicache.types import NO_USE, Ack, Pressure, Use

#: Reservations whose namespace is remembered; older ones have ended long ago.
MAX_REMEMBERED = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Paged:
    """Of a commit out of paged KV: where its pages lie, and how long to wait for their layers (0: while it may)."""

    where: PagedPlaces
    wait_ms: int = 0


class StoreCalls:
    """Reserve, commit, write, abort."""

    def __init__(
        self,
        loop: EngineLoop,
        namespaces: NamespaceBook,
        regions: RegionRegistry,
        *,
        kv_regions: KvRegions,
        packs: PackCalls,
        door: Door,
        clock: Clock,
        latencies: Latencies,
    ) -> None:
        self._loop = loop
        self._namespaces = namespaces
        self._regions = regions
        self._kv_regions = kv_regions
        self._packs = packs
        self._door = door
        self._clock = clock
        self._latencies = latencies
        # (session, reservation) -> (namespace, when it expires)
        self._reserved: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()

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
        """A reservation was made: how its pages look must be known when they come."""
        if result.reservation:
            self._reserved[session, result.reservation] = namespace, result.expires_ms
            if len(self._reserved) > MAX_REMEMBERED:
                self._reserved.popitem(last=False)

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
        paged: Paged | None = None,
    ) -> CommitResult:
        """Copy pages in from the session's own regions and make them visible (or durable).

        ``pieces``: (first page, pages), in page order; ``source``: (region, byte offset) of each; ``checksums``:
        xxh3-64, one a page, or none; ``paged``: where they lie in a KV region, which all pieces are of then. Raises
        InvalidArgumentError, NotFoundError, ConflictError, StaleError; for KV regions also what ``PackCalls.commit``
        raises.
        """
        if len(pieces) != len(source):
            raise InvalidArgumentError(f"commit: {len(pieces)} pieces and {len(source)} places in regions")
        pages = sum(count for _, count in pieces)
        if checksums and len(checksums) != pages:
            raise InvalidArgumentError(f"commit: {len(checksums)} checksums for {pages} pages")
        if any(offset < 0 for _, offset in source) or any(min(piece) < 0 for piece in pieces):
            raise InvalidArgumentError("commit: pages and offsets must not be negative")
        if paged is not None or any(self._kv_regions.has(session, region) for region, _ in source):
            region, paged = _only_region(source, paged)
            ask = self._ask(session, reservation, pieces, checksums, paged)
            return await self._packs.commit(
                (session, reservation),
                region,
                ask,
                lambda packed: self._commit(session, reservation, pieces, (packed, ack, last)),
            )
        places = [(self._regions.find(session, region), offset) for region, offset in source]
        how = (RegionSource(pieces, places, checksums), ack, last)
        return await self._commit(session, reservation, pieces, how)

    def _ask(
        self,
        session: int,
        reservation: int,
        pieces: Sequence[tuple[int, int]],
        checksums: Sequence[int],
        paged: Paged,
    ) -> PackAsk:
        """What is known of a commit out of paged KV. Raises NotFoundError."""
        self._door.require(session)
        found = self._reserved.get((session, reservation))
        if found is None:
            raise _no_reservation(reservation)
        namespace, expires_ms = found
        left_ms = max(0, expires_ms - self._clock.now_ms())
        wait_ms = min(paged.wait_ms or left_ms, left_ms)
        spec = self._namespaces.find(namespace)[0]
        return PackAsk(spec, pieces, paged.where, checksums, wait_ms)

    async def _commit(
        self,
        session: int,
        reservation: int,
        pieces: Sequence[tuple[int, int]],
        how: tuple[PageSource | StartedSource, Ack, bool],
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
        found = self._reserved.get((session, reservation))
        if found is None:
            raise _no_reservation(reservation)
        page_bytes = self._namespaces.find(found[0])[0].page_bytes
        return Writer(page_bytes, lambda pieces, *how: self._commit(session, reservation, pieces, how))

    def abort(self, session: int, reservation: int) -> None:
        """Give a reservation back; unknown ones are fine."""
        self._reserved.pop((session, reservation), None)
        self._loop.handle(events.Abort(session, reservation))


def _no_reservation(reservation: int) -> NotFoundError:
    return NotFoundError(f"reservation {reservation} expired or never was", hint="reserve again")


def _only_region(source: Sequence[tuple[int, int]], paged: Paged | None) -> tuple[int, Paged]:
    """The KV region that a commit's pieces are all of. Raises InvalidArgumentError."""
    regions = {region for region, _ in source}
    if len(regions) != 1:
        raise InvalidArgumentError(
            f"commit: pieces of {len(regions)} regions, of which one is paged KV",
            hint="a commit out of paged KV has all its pieces in one region",
        )
    if any(offset for _, offset in source):
        raise InvalidArgumentError(
            "commit: an offset in paged KV", hint="offset is 0: `places` say where pages lie"
        )
    if paged is None:
        raise InvalidArgumentError(
            "commit: pieces of paged KV without places", hint="set page_units and places, as in Load"
        )
    return regions.pop(), paged
