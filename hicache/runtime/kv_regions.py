"""The engines' memory that sessions registered, their timelines, and what transfers hold of both.

A region goes in three steps: it is forgotten (no new transfer finds it), the transfers under way on it end, its
mappings are closed; who unregisters it waits for the third. A transfer *out of* an engine may wait for layers that
never come: forgetting the region, or its timeline, cuts that wait, and the transfer's pages are not taken.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable

from hicache.device.kv import FAILED, PagedKv
from hicache.device.transfers import KvHandle
from hicache.errors import ExhaustedError, HicacheError, InvalidArgumentError, NotFoundError
from hicache.runtime.desk import TransferDesk, close_memories
from hicache.runtime.regions import RegionInfo, RegionKind
from hicache.runtime.timelines import Gate, SharedCounter, Timeline
from hicache.runtime.workers import resolve

#: Transfers of one session under way. A call that was cancelled leaves its transfer behind, which counts here.
TRANSFERS_PER_SESSION = 256
RETRY_MS = 10
#: Allocations that the KV regions of one session lie in, a region's counted for itself: each is a mapping here, and a
#: descriptor, of which the process has only so many for all sessions.
MEMORIES_PER_SESSION = 1024


@dataclasses.dataclass(slots=True, eq=False)
class KvRegion:
    """An engine's paged KV as it is mapped here."""

    info: RegionInfo
    session: int
    handle: KvHandle
    gates: set[Gate] = dataclasses.field(default_factory=set)  # of transfers that wait for layers

    @property
    def kv(self) -> PagedKv:
        """What it looks like."""
        return self.handle.kv


@dataclasses.dataclass(slots=True, eq=False)
class TimelineRegion:
    """Counters of one session."""

    info: RegionInfo
    session: int
    timeline: Timeline
    taken: set[int] = dataclasses.field(default_factory=set)  # counters that a transfer uses
    gates: set[Gate] = dataclasses.field(default_factory=set)
    then: Callable[[], None] | None = None  # forgotten: what follows when no counter is taken


class Use:
    """One transfer's hold on a region and, perhaps, on a counter. Undone with the last ``release``."""

    def __init__(
        self, region: KvRegion, timeline: TimelineRegion | None, number: int, *, gated: bool
    ) -> None:
        self.region = region
        self.timeline = timeline
        self.number = number
        self.counter: SharedCounter | None = None
        self.gate: Gate | None = None
        self.on_over: Callable[[], None] = lambda: None
        self._holds = 1
        if timeline is None:
            return
        self.counter = timeline.timeline.counter(number)
        timeline.taken.add(number)
        if gated:
            self.gate = Gate(self.counter, region.kv.layers)
            region.gates.add(self.gate)
            timeline.gates.add(self.gate)

    def fail(self) -> None:
        """Nobody who waits for the counter is to wait for ever."""
        if self.counter is not None:
            self.counter.set(FAILED)

    def hold(self) -> None:
        """One more needs it."""
        assert self._holds > 0, "held again after its end"
        self._holds += 1

    def release(self) -> None:
        """Undo one hold."""
        assert self._holds > 0, "released twice"
        self._holds -= 1
        if self._holds:
            return
        if self.gate is not None:
            self.region.gates.discard(self.gate)
        timeline = self.timeline
        if timeline is not None:
            if self.gate is not None:
                timeline.gates.discard(self.gate)
            timeline.taken.discard(self.number)
            if timeline.then is not None and not timeline.taken:
                timeline.then()
        self.on_over()


class KvRegions:
    """All KV regions and timelines of one service. The loop's thread owns it."""

    def __init__(
        self, desk: TransferDesk, next_id: Callable[[], int], alive: Callable[[int], object]
    ) -> None:
        """``alive``: raises StaleError, or another HicacheError, for a session that is not open."""
        self._desk = desk
        self._next_id = next_id
        self._alive = alive
        self._kv: dict[int, KvRegion] = {}
        self._timelines: dict[int, TimelineRegion] = {}
        self._closing: dict[tuple[int, int], asyncio.Future[None]] = {}  # (session, region) -> closed
        self._uses: Counter[int] = Counter()  # by session

    @property
    def regions(self) -> int:
        """KV regions that are registered."""
        return len(self._kv)

    @property
    def timelines(self) -> int:
        """Timelines that are registered."""
        return len(self._timelines)

    # --- beginnings

    async def register(self, session: int, kv: PagedKv) -> RegionInfo:
        """Map an engine's memory; its descriptors are taken over, whatever comes of it.

        Raises UnsupportedError, InvalidArgumentError, ExhaustedError as ``Transfers.open_kv`` does, StaleError where
        the session ends meanwhile. A call that is cancelled leaves nothing.
        """
        mapped = sum(len(each.kv.memories) for each in self._kv.values() if each.session == session)
        if mapped + len(kv.memories) > MEMORIES_PER_SESSION:
            close_memories(kv)
            raise ExhaustedError(
                f"the KV regions of the session lie in {mapped} allocations",
                hint=f"{len(kv.memories)} more are too many: unregister regions no longer used",
            )
        opened: asyncio.Future[KvHandle | HicacheError] = asyncio.get_running_loop().create_future()

        def arrived(result: KvHandle | HicacheError) -> None:
            if opened.cancelled() and not isinstance(result, HicacheError):
                self._desk.close_kv(result, lambda: None)  # nobody will ever know its number
            resolve(opened, result)

        self._desk.open(kv, arrived)
        handle = await _settled(opened, lambda late: self._desk.close_kv(late, lambda: None))
        try:
            self._alive(session)
        except HicacheError:
            self._desk.close_kv(handle, lambda: None)
            raise
        size_bytes = sum(memory.size_bytes for memory in kv.memories)
        info = RegionInfo(self._next_id(), size_bytes, RegionKind.KV)
        self._kv[info.region_id] = KvRegion(info, session, handle)
        return info

    def make_timeline(self, session: int, counters: int) -> RegionInfo:
        """Raises InvalidArgumentError, ExhaustedError as ``Timeline`` does."""
        timeline = Timeline(counters)
        info = RegionInfo(self._next_id(), timeline.size_bytes, RegionKind.TIMELINE)
        self._timelines[info.region_id] = TimelineRegion(info, session, timeline)
        return info

    # --- look-up

    def has(self, session: int, region: int) -> bool:
        """Whether a region of the session is a KV region."""
        found = self._kv.get(region)
        return found is not None and found.session == session

    def find(self, session: int, region: int) -> KvRegion:
        """A KV region of the session. Raises NotFoundError; InvalidArgumentError for a region of another kind."""
        found = self._kv.get(region)
        if found is not None and found.session == session:
            return found
        timeline = self._timelines.get(region)
        if timeline is not None and timeline.session == session:
            raise InvalidArgumentError(
                f"region {region} is a timeline, not paged KV", hint="name the region that Register(kv) gave"
            )
        raise NotFoundError(
            f"region {region} is no paged KV that this session registered", hint="register it first"
        )

    def timeline(self, session: int, region: int) -> TimelineRegion:
        """A timeline of the session. Raises NotFoundError."""
        found = self._timelines.get(region)
        if found is None or found.session != session:
            raise NotFoundError(
                f"timeline {region} is not one that this session had made", hint="register a timeline first"
            )
        return found

    def timeline_fd(self, session: int, region: int) -> int:
        """The descriptor of a timeline: pass it on, never close it. Raises NotFoundError."""
        return self.timeline(session, region).timeline.fd

    def use(self, region: KvRegion, timeline: int, counter: int, *, gated: bool = False) -> Use:
        """Hold a region, and a counter of a timeline (0: none), for one transfer. ``gated``: it waits for the counter.

        Raises InvalidArgumentError for a counter that there is not, or that another transfer uses; NotFoundError for
        another's timeline; ExhaustedError where the session has too many transfers under way.
        """
        session = region.session
        found = self.timeline(session, timeline) if timeline else None
        if found is None and counter:
            raise InvalidArgumentError(f"counter {counter} of no timeline", hint="name its timeline, too")
        if found is not None and not 0 <= counter < found.timeline.counters:
            raise InvalidArgumentError(
                f"counter {counter}: timeline {timeline} has {found.timeline.counters}",
                hint="counters are numbered from 0",
            )
        if found is not None and counter in found.taken:
            raise InvalidArgumentError(
                f"counter {counter} of timeline {timeline} belongs to another transfer that is under way",
                hint="use another counter, or wait for that transfer",
            )
        if self._uses[session] >= TRANSFERS_PER_SESSION:
            raise ExhaustedError(
                f"{self._uses[session]} transfers of the session are under way",
                hint="wait for some of them",
                retry_after_ms=RETRY_MS,
            )
        use = Use(region, found, counter, gated=gated)
        self._uses[session] += 1
        use.on_over = lambda: self._over(session)
        return use

    def _over(self, session: int) -> None:
        self._uses[session] -= 1
        if not self._uses[session]:
            del self._uses[session]

    # --- ends

    async def unregister(self, session: int, region: int) -> None:
        """Forget a region of the session; returns when its mappings are closed. Unknown ones are fine."""
        self._forget(session, region, "its region was unregistered")
        closed = self._closing.get((session, region))
        if closed is not None:
            await asyncio.shield(closed)

    def end_session(self, session: int) -> None:
        """Forget everything of a session; it is closed when its transfers have ended."""
        mine = [region.info.region_id for region in self._kv.values() if region.session == session]
        mine += [each.info.region_id for each in self._timelines.values() if each.session == session]
        for region in mine:
            self._forget(session, region, "its session ended")

    def cut(self, reason: str) -> None:
        """No transfer waits for layers any more: the service stops."""
        for region in self._kv.values():
            _cut(region.gates, reason)
        for timeline in self._timelines.values():
            _cut(timeline.gates, reason)

    def close(self) -> None:
        """Everything is unmapped already; let go of what is left."""
        for region in list(self._kv.values()):
            self._forget(region.session, region.info.region_id, "the service stopped")
        for timeline in list(self._timelines.values()):
            timeline.taken.clear()
            self._forget(timeline.session, timeline.info.region_id, "the service stopped")

    def _forget(self, session: int, region: int, reason: str) -> None:
        kv, timeline = self._kv.get(region), self._timelines.get(region)
        if kv is not None and kv.session == session:
            del self._kv[region]
            _cut(kv.gates, reason)
            self._desk.close_kv(kv.handle, self._until_closed(session, region))
        elif timeline is not None and timeline.session == session:
            del self._timelines[region]
            _cut(timeline.gates, reason)
            over = self._until_closed(session, region)

            def close() -> None:
                timeline.timeline.close()
                over()

            if timeline.taken:
                timeline.then = close
            else:
                close()

    def _until_closed(self, session: int, region: int) -> Callable[[], None]:
        closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing[session, region] = closed

        def over() -> None:
            del self._closing[session, region]
            resolve(closed, None)

        return over


def _cut(gates: set[Gate], reason: str) -> None:
    for gate in gates:
        gate.cut(reason)


async def _settled(
    opened: asyncio.Future[KvHandle | HicacheError], undo: Callable[[KvHandle], None]
) -> KvHandle:
    """The handle, or its error raised. If who waits is cancelled just as it came, it is undone."""
    try:
        result = await opened
    except asyncio.CancelledError:
        if opened.done() and not opened.cancelled():
            late = opened.result()
            if not isinstance(late, HicacheError):
                undo(late)
        raise
    if isinstance(result, HicacheError):
        raise result
    return result
