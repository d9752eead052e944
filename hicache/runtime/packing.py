"""Commit out of an engine's paged KV: the source of its pages, and what goes before.

A transfer copies the pages to where they are kept and checksums the copy, layer after layer as the engine's counter
allows. While it waits it holds the reservation's slots and nothing else. Where pages must go through buffers that
others need, too (a device or a disk as the first tier), the commit is handed to the engine only when every layer is
there: nobody's buffers, workers or turn wait for a layer.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence

from hicache.device.kv import Places
from hicache.device.transfers import HostPages, Transfer, TransferDone
from hicache.engine.actions import CommitResult
from hicache.errors import CorruptError, InvalidArgumentError
from hicache.runtime.clock import Clock
from hicache.runtime.desk import TransferDesk
from hicache.runtime.kv_regions import KvRegion, KvRegions, Use
from hicache.runtime.paged import PagedPlaces, check_fit
from hicache.runtime.ports import TierPort
from hicache.runtime.sources import Filled
from hicache.runtime.workers import resolve
from hicache.types import Namespace, Outcome

#: How often a counter is looked at that the engine's own commit waits for.
POLL_MS = 2

Pieces = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class PackAsk:
    """Pages of an engine, one row of ``where`` a page. ``wait_ms``: for the counter, all in all."""

    spec: Namespace
    pieces: Pieces
    where: PagedPlaces
    checksums: Sequence[int]
    wait_ms: int


@dataclasses.dataclass(slots=True)
class PackCounts:
    """Since the start."""

    kv_commits: int = 0
    failed_kv_commits: int = 0
    packed_pages: int = 0
    packed_bytes: int = 0


class KvSource:
    """A StartedSource: pages of a KV region, packed by a transfer."""

    def __init__(
        self, desk: TransferDesk, use: Use, ask: PackAsk, places: Places, *, direct: bool, deadline_ns: int
    ) -> None:
        self._desk = desk
        self._use = use
        self._ask = ask
        self._places = places
        self._deadline_ns = deadline_ns
        self._first = ask.pieces[0][0]
        self.direct = direct
        self.counted = use.gate is None  # every layer is there
        self.error = ""  # why pages were not taken

    def __repr__(self) -> str:
        """The same for all: actions are digested by what they show, and a replay has no regions."""
        return "PageSource()"

    def hold(self) -> None:
        """See StartedSource."""
        self._use.hold()

    def release(self) -> None:
        """See StartedSource."""
        self._use.release()

    def start(self, pages: Sequence[int], into: HostPages, done: Callable[[Filled], None]) -> None:
        """See StartedSource. The pages of a commit follow one another: the engine takes no others."""
        if self.error:  # the layers never came
            nothing = [(Outcome.FAULT, 0)] * len(pages)
            self._desk.later(lambda: done(nothing))
            return
        begin = pages[0] - self._first
        spec, gate = self._ask.spec, self._use.gate
        transfer = Transfer(
            self._desk.number(),
            self._use.region.handle,
            into,
            self._places[begin : begin + len(pages)],
            spec.page_tokens,
            spec.page_bytes,
            counter=None if self.counted else gate,
            deadline_ns=0 if self.counted else self._deadline_ns,
        )
        self._desk.pack(transfer, lambda end: done(self._taken(begin, end)))

    def _taken(self, begin: int, end: TransferDone) -> Filled:
        gate = self._use.gate
        if gate is not None and not gate.sound:
            self.error = f"they were not all computed: {gate.reason}"
            return [(Outcome.FAULT, 0)] * len(end.outcomes)
        self.error = self.error or end.error
        wanted = self._ask.checksums[begin:] if self._ask.checksums else end.checksums
        taken: Filled = []
        for outcome, checksum, right in zip(end.outcomes, end.checksums, wanted, strict=False):
            if outcome is Outcome.OK and checksum != right:
                self.error = self.error or "their bytes do not have the checksums that they came with"
                outcome = Outcome.CORRUPT  # noqa: PLW2901
            taken.append((outcome, checksum))
        return taken


class PackCalls:
    """Commits whose pages lie in an engine's paged KV."""

    def __init__(self, desk: TransferDesk, regions: KvRegions, first: TierPort, clock: Clock) -> None:
        """``first``: the tier where pages are stored first."""
        self._desk = desk
        self._regions = regions
        self._port = first
        self._clock = clock
        self._lines: dict[tuple[int, int], asyncio.Future[None]] = {}  # the last that waits, by reservation
        self.counts = PackCounts()

    async def commit(
        self,
        key: tuple[int, int],
        region: int,
        ask: PackAsk,
        send: Callable[[KvSource], Awaitable[CommitResult]],
    ) -> CommitResult:
        """Take the pages, then ``send`` hands them to the engine. ``key``: (session, reservation).

        Raises InvalidArgumentError, NotFoundError, UnsupportedError, ExhaustedError before anything has changed;
        CorruptError, which says why, where pages were not taken.
        """
        found = self._regions.find(key[0], region)
        places = _places(found, ask)
        self._desk.transfers.check(found.handle, False)  # noqa: FBT003
        direct = self._port.addressable is not None
        use = self._regions.use(found, ask.where.timeline, ask.where.counter, gated=True)
        deadline_ns = self._clock.now_ns() + ask.wait_ms * 1_000_000
        source = KvSource(self._desk, use, ask, places, direct=direct, deadline_ns=deadline_ns)
        try:
            if not direct and not source.counted:
                await self._in_line(key, source, use, deadline_ns)
            result = await send(source)
        finally:
            source.release()
        self._count(result, ask.spec.page_bytes)
        if result.failed_pages and source.error:
            raise CorruptError(
                f"{result.failed_pages} pages of the commit were not taken: {source.error}",
                hint=f"{result.stored_pages} pages were stored; commit the others again",
            )
        return result

    def _count(self, result: CommitResult, page_bytes: int) -> None:
        self.counts.kv_commits += 1
        self.counts.failed_kv_commits += bool(result.failed_pages)
        self.counts.packed_pages += result.stored_pages
        self.counts.packed_bytes += result.stored_pages * page_bytes

    # --- layers that are waited for before the engine hears of the commit

    async def _in_line(self, key: tuple[int, int], source: KvSource, use: Use, deadline_ns: int) -> None:
        """Wait for all layers; commits of one reservation go on in the order in which they came."""
        before, mine = self._lines.get(key), asyncio.get_running_loop().create_future()
        self._lines[key] = mine
        try:
            if before is not None:
                await asyncio.shield(before)
            await self._counted(source, use, deadline_ns)
        finally:
            if self._lines.get(key) is mine:
                del self._lines[key]
            resolve(mine, None)  # the next one goes on after this one was handed in

    async def _counted(self, source: KvSource, use: Use, deadline_ns: int) -> None:
        gate, layers = use.gate, use.region.kv.layers
        assert gate is not None, "nothing to wait for"
        while (value := gate.get()) < layers:
            if self._clock.now_ns() >= deadline_ns:
                source.error = f"layer {value} of {layers} was not computed in time"
                return
            pause: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            alarm = self._clock.alarm(POLL_MS, lambda pause=pause: resolve(pause, None))  # type: ignore[misc]
            try:
                await pause
            finally:
                alarm.cancel()
        if not gate.sound:
            source.error = f"they were not all computed: {gate.reason}"
        source.counted = True


def _places(region: KvRegion, ask: PackAsk) -> Places:
    """Checked. Raises InvalidArgumentError."""
    places, pages = ask.where.by_page(), sum(count for _, count in ask.pieces)
    if len(places) != pages:
        raise InvalidArgumentError(f"commit: places of {len(places)} pages for {pages} pages")
    check_fit(region.kv, ask.spec, whole=True)
    region.kv.check_places(places, ask.spec.page_tokens)
    if int(places.min()) < 0:
        raise InvalidArgumentError(
            "commit: a negative place: every unit of a page must lie somewhere",
            hint="only Load leaves units out",
        )
    return places
