"""Load: leased pages into an engine's paged KV.

The slots of the lease are taken once, when the transfer begins; when it has ended the lease is looked at again. If it
is still live, and its pages are where they were, then every page that was copied was the leased one from the first
byte to the last; else the pages count as missing, whatever was copied. So a Load holds no lease of its own. What it
does hold until the transfer has ended, even where its caller has gone: the engine's mapping, its counter, and the
segments that it reads from.

A counter tells how far the copy is, never whether it is right. Where anything goes wrong it shows FAILED, so that
nobody who waits for a layer waits for ever.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from hicache.device.kv import Places, check_apart
from hicache.device.transfers import DevicePages, HostPages, HostSlots, Transfer, TransferDone
from hicache.engine.actions import FetchResult
from hicache.errors import (
    HicacheError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from hicache.runtime.clock import Clock
from hicache.runtime.counters import Latencies
from hicache.runtime.desk import TransferDesk
from hicache.runtime.door import Door
from hicache.runtime.extents import lease_slots
from hicache.runtime.kv_regions import KvRegion, KvRegions, Use
from hicache.runtime.paged import PagedPlaces, check_fit, layers_of
from hicache.runtime.ports import TierPort
from hicache.runtime.workers import resolve
from hicache.types import Namespace, Outcome, TierKind

Report = Callable[[int, int, Sequence[int]], Awaitable[int]]


class Leases(Protocol):
    """The engine's reads that this needs."""

    def lease_view(self, session: int, lease: int) -> FetchResult:
        """The lease as it stands; raises NotFoundError."""

    def lease_prompt(self, session: int, lease: int) -> tuple[int, bytes]:
        """Its namespace and the symbols of its pages."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoadAsk:
    """Pages of a lease, from ``first_page`` on, one row of ``where`` a page. ``layers`` 0: all from the first."""

    lease: int
    region: int
    first_page: int
    where: PagedPlaces
    first_layer: int = 0
    layers: int = 0
    verify: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class LoadResult:
    """Pages by their number in the lease. ``reason``: of the first that is missing."""

    loaded_pages: int
    missing: list[int]
    corrupt: list[int]
    reason: str
    moved_bytes: int


@dataclasses.dataclass(slots=True)
class LoadCounts:
    """Since the start. ``failed_loads``: with a page, or more, that did not arrive."""

    loads: int = 0
    failed_loads: int = 0
    loaded_pages: int = 0
    loaded_bytes: int = 0
    load_missing_pages: int = 0
    load_corrupt_pages: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """One Load that may begin."""

    session: int
    ask: LoadAsk
    region: KvRegion
    spec: Namespace
    places: Places
    layers: int
    slots: list[int]  # of the pages that are granted: the first ones
    port: TierPort | None  # where they are; None: no page is granted

    @property
    def pages(self) -> int:
        return len(self.places)


class LoadCalls:
    """The one call that moves leased pages to where an engine computes with them."""

    def __init__(
        self,
        leases: Leases,
        ports: Sequence[TierPort],
        regions: KvRegions,
        desk: TransferDesk,
        *,
        namespace: Callable[[int], tuple[Namespace, bytes]],
        door: Door,
        report: Report,
        clock: Clock,
        latencies: Latencies,
    ) -> None:
        self._leases = leases
        self._ports = ports
        self._regions = regions
        self._desk = desk
        self._namespace = namespace
        self._door = door
        self._report = report
        self._clock = clock
        self._latencies = latencies
        self.counts = LoadCounts()

    async def load(self, session: int, ask: LoadAsk) -> LoadResult:
        """Copy; answer when everything has arrived or failed. Bad pages leave the tier, as if they had been reported.

        Raises NotFoundError for a lease, region or timeline that is not the session's; InvalidArgumentError for places,
        layers, pages or a counter that cannot be; UnsupportedError for memory that pages of this tier cannot go to;
        ExhaustedError; UnavailableError, StaleError. Nothing has changed then.
        """
        began = self._clock.now_ns()
        self._door.require(session)
        result = await self._run(self._plan(session, ask))
        self._door.alive()
        if result.corrupt:
            await self._give_up(session, ask.lease, result.corrupt)
        self._latencies.observe("load", self._clock.now_ns() - began)
        return result

    # --- before

    def _plan(self, session: int, ask: LoadAsk) -> _Plan:
        view = self._leases.lease_view(session, ask.lease)
        region = self._regions.find(session, ask.region)
        number, _ = self._leases.lease_prompt(session, ask.lease)
        spec, kv, places = self._namespace(number)[0], region.kv, ask.where.by_page()
        last = ask.first_page + len(places)
        if last > view.matched_pages:
            raise InvalidArgumentError(
                f"pages {ask.first_page} to {last} of lease {ask.lease}: it has {view.matched_pages}",
                hint="one row of places a page",
            )
        layers = layers_of(kv, ask.first_layer, ask.layers)
        check_fit(kv, spec, whole=False)
        kv.check_places(places, spec.page_tokens)
        check_apart(places, spec.page_tokens // places.shape[1])
        slots, port = [], None
        if view.granted_pages > ask.first_page:
            port = self._ports[view.tier]
            slots = lease_slots(view)[ask.first_page : last]
            self._check_tier(region, port)
        return _Plan(session, ask, region, spec, places, layers, slots, port)

    def _check_tier(self, region: KvRegion, port: TierPort) -> None:
        if port.spec.keyed:
            raise UnsupportedError(
                f"pages of tier {port.spec.name} cannot be loaded: they lie in no memory",
                hint="give the service a host or a device tier, or read them with ReadPages",
            )
        self._desk.transfers.check(region.handle, port.spec.kind is TierKind.DEVICE)

    # --- the transfer

    def _run(self, plan: _Plan) -> asyncio.Future[LoadResult]:
        """Begin; what is held is let go when the transfer has ended, whoever still waits for it then."""
        where, port = plan.ask.where, plan.port
        use = self._regions.use(plan.region, where.timeline, where.counter)
        ended: asyncio.Future[LoadResult] = asyncio.get_running_loop().create_future()

        def end(done: TransferDone | None) -> None:
            if port is not None:
                port.busy.leave(plan.slots)
            result = self._judge(plan, done)
            if result.missing or result.corrupt:
                use.fail()
            use.release()
            self._count(result)
            resolve(ended, result)

        if port is None:
            end(None)
            return ended
        try:
            transfer = self._transfer(plan, port, use)
        except HicacheError:
            use.fail()
            use.release()
            raise
        port.busy.take(plan.slots)
        self._desk.load(transfer, end)
        return ended

    def _transfer(self, plan: _Plan, port: TierPort, use: Use) -> Transfer:
        ask, count = plan.ask, len(plan.slots)
        pages: HostPages | DevicePages = DevicePages(plan.slots, ask.verify)
        if port.mappable is not None:
            page_bytes = plan.spec.page_bytes
            addresses, keep = port.mappable.addresses(plan.slots, page_bytes)
            checksums = port.mappable.columns(plan.slots)[0] if ask.verify else ()
            pages = HostPages(HostSlots(addresses, page_bytes, keep), checksums)
        if count < plan.pages:  # some are missing from the start: the counter never tells of an arrival
            use.fail()
        return Transfer(
            self._desk.number(),
            plan.region.handle,
            pages,
            plan.places[:count],
            plan.spec.page_tokens,
            plan.spec.page_bytes,
            ask.first_layer,
            plan.layers,
            use.counter if count == plan.pages else None,
        )

    # --- after

    def _judge(self, plan: _Plan, done: TransferDone | None) -> LoadResult:
        now, gone = self._now(plan)
        outcomes = done.outcomes if done is not None else ()
        if now == plan.slots and outcomes == (Outcome.OK,) * plan.pages:
            return LoadResult(plan.pages, [], [], "", self._bytes(plan, range(plan.pages)))
        first, lease = plan.ask.first_page, plan.ask.lease
        good: list[int] = []
        corrupt: list[int] = []
        missing: list[tuple[int, str]] = []
        for at in range(plan.pages):
            page, here = first + at, at < min(len(now), len(outcomes)) and now[at] == plan.slots[at]
            if not here:
                lost = (
                    f"page {page} of lease {lease} is not there: it was not brought yet, or its tier lost it"
                )
                missing.append((page, gone or lost))
            elif outcomes[at] is Outcome.OK:
                good.append(at)
            elif outcomes[at] is Outcome.CORRUPT:
                corrupt.append(page)
            else:
                error = done.error if done is not None else ""
                missing.append((page, error or f"page {page} was not in its slot any more"))
        reason = missing[0][1] if missing else ""
        return LoadResult(len(good), [page for page, _ in missing], corrupt, reason, self._bytes(plan, good))

    def _now(self, plan: _Plan) -> tuple[list[int], str]:
        """Where the pages are by now; or why the lease is gone."""
        try:
            self._door.alive()
            view = self._leases.lease_view(plan.session, plan.ask.lease)
        except (NotFoundError, UnavailableError) as error:
            return [], str(error)
        first = plan.ask.first_page
        return lease_slots(view)[first : first + plan.pages], ""

    def _bytes(self, plan: _Plan, good: Sequence[int]) -> int:
        kv = plan.region.kv
        units = int((plan.places[good] >= 0).sum()) if good else 0
        tokens = units * (plan.spec.page_tokens // plan.ask.where.units)
        return tokens * kv.token_bytes * kv.planes_per_layer * plan.layers

    def _count(self, result: LoadResult) -> None:
        counts = self.counts
        counts.loads += 1
        counts.failed_loads += bool(result.missing or result.corrupt)
        counts.loaded_pages += result.loaded_pages
        counts.loaded_bytes += result.moved_bytes
        counts.load_missing_pages += len(result.missing)
        counts.load_corrupt_pages += len(result.corrupt)

    async def _give_up(self, session: int, lease: int, pages: Sequence[int]) -> None:
        """Have bad pages looked at again by their tier, so that they leave it. The answer stands in any case."""
        try:
            await self._report(session, lease, pages)
        except (NotFoundError, InvalidArgumentError):
            return  # the lease ended meanwhile: somebody else will find them
