"""The service: every call that an edge may make, and the life of it all.

    calls ──► events ──► engine ──► actions ──► performer ──► copier, ports ──► stores
                ▲                                                   │
                └──────────── CopyDone, SegmentClosed ... ◄─────────┘

One asyncio loop's thread owns it; all methods are called there. Copies run on worker threads of lower priority.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import sys
from collections.abc import Callable, Sequence

from hicache.device.opening import open_transfers
from hicache.engine import NodeView, events
from hicache.engine.actions import DrainResult, FetchResult
from hicache.errors import UnavailableError
from hicache.runtime.advice import Advice, Window
from hicache.runtime.clock import Clock
from hicache.runtime.counters import Latencies
from hicache.runtime.door import DRAINING, FAILED, SERVING, STOPPED, Door
from hicache.runtime.extents import ExtentColumns, extents
from hicache.runtime.house import House, OpenTransfers, open_house, refuse_optimised
from hicache.runtime.lease_tiers import LeaseTiers
from hicache.runtime.loading import LoadCalls
from hicache.runtime.many import ManyCalls
from hicache.runtime.operators import OperatorCalls
from hicache.runtime.options import ServiceOptions
from hicache.runtime.pace import pending
from hicache.runtime.pages import PageCalls
from hicache.runtime.reader import PageReader
from hicache.runtime.recovery import RecoveryReport
from hicache.runtime.regions import RegionRegistry
from hicache.runtime.reports import CorruptReports
from hicache.runtime.stats import ServiceStats, service_stats
from hicache.runtime.storing import StoreCalls
from hicache.types import Namespace, TierSpec

_log = logging.getLogger(__name__)

#: How long a thread may keep the interpreter from one that waits for it. With the default of 5 ms each worker that
#: prepares a copy in Python could delay an answer by that much; at 0.5 ms an answer waits for about its own time, and
#: the copies lose little, since their heavy parts run without the interpreter.
SWITCH_INTERVAL_S = 0.0005
FLUSH_MS = 1_000  # what was copied gets this long to reach its medium, whatever the grace


class Service:
    """A running cache. Make it, ``await start()``, in the end ``await close()`` (after ``drain`` to save pages).

    The calls that move pages are bound to the service when it starts: ``match fetch renew release lease_view read_pages
    prefetch wait_operation cancel_operation`` (``pages.PageCalls``), ``fetch_many`` (``many.ManyCalls``),
    ``report_corrupt`` (``reports.CorruptReports``), ``pending`` (``pace``),
    ``reserve commit begin_write abort`` (``storing.StoreCalls``), ``load`` (``loading.LoadCalls``), ``register_kv
    make_timeline unregister_kv timeline_fd`` (``kv_regions.KvRegions``), ``pin unpin evict clear``
    (``operators.OperatorCalls``), ``watch unwatch`` (``watchers.Watchers``), ``describe_namespace``.

    ``on_draining``: called with the grace in ms when a drain begins, and with 0 when the service fails.
    ``on_tier``: called with a durable tier's name and whether it is well, when it latches and when it comes back.
    ``regions``: shared memory. ``epoch``: 16 random bytes that name this run.
    """

    def __init__(
        self,
        options: ServiceOptions,
        *,
        clock: Clock | None = None,
        open_transfers: OpenTransfers = open_transfers,
    ) -> None:
        self.options = options
        self._open_transfers = open_transfers
        self.epoch = secrets.token_bytes(16)
        self.specs: tuple[TierSpec, ...] = options.specs()
        self.regions = RegionRegistry()
        self.on_draining: list[Callable[[int], object]] = []
        self.on_tier: list[Callable[[str, bool], object]] = []
        self.latencies = Latencies()
        self._clock = clock if clock is not None else Clock()
        self._door = Door()
        self._house: House | None = None
        self._started_ms = 0
        self._switch_interval_s = 0.0
        self._window = Window(self.specs)

    # --- life

    async def start(self) -> None:
        """Open the stores and serve; what the disk holds comes back in the background (``recovered``).

        Raises ConfigError, ExhaustedError or UnavailableError; nothing stays open then.
        """
        refuse_optimised()
        assert self._house is None, "a service starts once"
        house = await open_house(
            self.options, self._clock, self.regions, door=self._door, open_transfers=self._open_transfers
        )
        self._house = house
        self.specs = house.stores.specs
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._window = Window(self.specs)
        self._bind(house)
        house.loop.on_failed = self._failed
        house.performer.on_tier = functools.partial(_tell, self.on_tier)
        self._started_ms = self._clock.now_ms()
        self._door.state = SERVING
        house.start_recovery()

    def _bind(self, house: House) -> None:
        reader = PageReader(
            house.engine, house.ports, namespace=house.namespaces.find, handle=house.loop.handle
        )
        tiers = LeaseTiers(house.stores.specs)
        stores = StoreCalls(
            house.loop,
            house.namespaces,
            self.regions,
            kv_regions=house.kv_regions,
            packs=house.packs,
            door=self._door,
            clock=self._clock,
            latencies=self.latencies,
        )
        pages = PageCalls(
            house.engine,
            house.loop,
            house.namespaces,
            door=self._door,
            reader=reader,
            clock=self._clock,
            latencies=self.latencies,
            window=self._window,
            tiers=tiers,
            on_reserved=stores.granted,
        )
        self.match, self.fetch, self.renew, self.release = (
            pages.match,
            pages.fetch,
            pages.renew,
            pages.release,
        )
        self.pending = functools.partial(pending, house.ports)
        self.lease_view, self.read_pages, self.prefetch = pages.lease_view, pages.read_pages, pages.prefetch
        reports = CorruptReports(
            house.engine,
            house.ports,
            door=self._door,
            namespace=house.namespaces.find,
            handle=house.loop.handle,
        )
        self.report_corrupt = reports.report
        self._bind_kv(house, reports)
        self.wait_operation, self.cancel_operation = pages.wait_operation, pages.cancel_operation
        self.fetch_many = ManyCalls(
            house.engine,
            house.loop,
            house.namespaces,
            door=self._door,
            clock=self._clock,
            latencies=self.latencies,
            window=self._window,
            tiers=tiers,
        ).fetch_many
        self.reserve, self.commit = stores.reserve, stores.commit
        self.begin_write, self.abort = stores.begin_write, stores.abort
        self.watch, self.unwatch = house.watchers.come, house.watchers.leave
        self.describe_namespace = house.namespaces.find
        self._bind_operators(house)

    def _bind_operators(self, house: House) -> None:
        operators = OperatorCalls(house.loop, house.namespaces, door=self._door)
        self.pin, self.unpin, self.evict, self.clear = (
            operators.pin,
            operators.unpin,
            operators.evict,
            operators.clear,
        )

    def _bind_kv(self, house: House, reports: CorruptReports) -> None:
        house.loads = LoadCalls(
            house.engine,
            house.ports,
            house.kv_regions,
            house.desk,
            namespace=house.namespaces.find,
            door=self._door,
            report=reports.report,
            clock=self._clock,
            latencies=self.latencies,
        )
        regions = house.kv_regions
        self.load = house.loads.load
        self.register_kv, self.make_timeline = regions.register, regions.make_timeline
        self.unregister_kv, self.timeline_fd = regions.unregister, regions.timeline_fd
        self.pool_shared = any(port.shared is not None for port in house.ports)
        self.kv_memory, self.device_uuids = (
            house.desk.transfers.memory_kinds,
            house.desk.transfers.device_uuids,
        )

    async def recovered(self) -> RecoveryReport:
        """Return when what the disk held is back."""
        house = self._running
        await house.recovered()
        return house.recoverer.report if house.recoverer is not None else RecoveryReport(done=True)

    async def drain(self, grace_ms: int) -> DrainResult:
        """Refuse new leases and room, tell the sessions, bring every page to a durable tier, within ``grace_ms``.

        Raises UnavailableError where the service has failed or stopped.
        """
        house = self._running
        if self._door.state == SERVING:
            self._door.state = DRAINING
            _log.info("draining, grace_ms=%d", grace_ms)
            _tell(self.on_draining, grace_ms)
        result = await house.loop.call(DrainResult, lambda request: events.Drain(request, grace_ms))
        await house.flush(max(grace_ms, FLUSH_MS))
        _log.info("drained, unsaved_pages=%d", result.unsaved_pages)
        return result

    async def close(self) -> None:
        """Finish what was started, release everything. Idempotent; the service cannot be started again."""
        house, self._house = self._house, None
        if house is not None:
            self._door.state = STOPPED
            await house.close()
            sys.setswitchinterval(self._switch_interval_s)

    def _failed(self) -> None:
        self._door.state = FAILED
        self._running.watchers.close()
        _tell(self.on_draining, 0)

    @property
    def state(self) -> str:
        """``serving``, ``draining``, ``failed`` (an invariant broke: everything is refused) or ``stopped``."""
        return self._door.state

    @property
    def _running(self) -> House:
        if self._house is None:
            raise UnavailableError("the service is not running")
        return self._house

    def now_ms(self) -> int:
        """The clock that expiries are told in."""
        return self._clock.now_ms()

    # --- sessions and namespaces

    def open_session(self, tenant: str, name: str) -> int:
        """A client attached. Raises UnavailableError unless serving."""
        session = self._door.open(tenant, name)
        self._running.loop.handle(events.SessionOpened(session, tenant))
        return session

    def suspend_session(self, session: int, window_ms: int) -> None:
        """Its life line broke; the engine ends it after the window."""
        self._running.loop.handle(events.SessionSuspended(session, window_ms))

    def resume_session(self, session: int) -> None:
        """It came back."""
        self._running.loop.handle(events.SessionResumed(session))

    def end_session(self, session: int, *, dead: bool) -> None:
        """Release all that it holds; ``dead``: its process is gone. Unknown sessions are fine."""
        if not self._door.end(session):
            return
        if self._house is not None:
            self._house.loop.handle(events.SessionEnded(session, dead))
            self._house.kv_regions.end_session(session)
        self.regions.end_session(session)

    def open_namespace(self, spec: Namespace) -> tuple[int, bytes]:
        """Its number in this run, and its fingerprint. Raises as ``NamespaceBook.check`` does."""
        house = self._running
        self._door.admit()
        house.namespaces.check(spec)
        self._window.open(spec.page_bytes)
        return house.open_namespace(spec)

    # --- reads

    def extents(self, result: FetchResult) -> ExtentColumns:
        """Where the granted pages lie; empty columns where the tier that the lease is in cannot be mapped."""
        return extents(self.regions, self._running.ports, result)

    def stats(self) -> ServiceStats:
        """A snapshot of all counts."""
        house = self._running
        return service_stats(
            house,
            self._door.state,
            self._clock.now_ms() - self._started_ms,
            self.latencies.snapshot(),
            copy_engine=self.options.copy_engine,
        )

    async def advice(self) -> Advice:
        """What other sizes and policies would have done with the last look-ups. Worked out on another thread."""
        policy, now_ms = self.options.policy, self._clock.now_ns() // 1_000_000
        return await asyncio.to_thread(self._window.advise, policy, now_ms)

    def check(self) -> None:
        """Recompute every invariant of the engine; raises ViolationError with its story."""
        self._running.engine.check()

    def tree_view(self, namespace: int = 0, max_nodes: int = 1000) -> tuple[list[NodeView], int]:
        """Nodes for people to look at, and how many were left out. Raises NotFoundError."""
        house = self._running
        if namespace:
            house.namespaces.find(namespace)
        return house.engine.tree_view(namespace, max_nodes)

    def action_digest(self) -> str:
        """Of all actions so far; empty unless ``options.digest``."""
        return self._running.engine.action_digest()


def _tell(callbacks: Sequence[Callable[..., object]], *said: object) -> None:
    for callback in callbacks:
        callback(*said)
