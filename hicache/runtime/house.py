"""Everything behind the calls, wired together: stores, threads, copier, engine and loop. Opened and closed as one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hicache.device.opening import open_transfers
from hicache.device.transfers import Transfers
from hicache.engine import Engine, events
from hicache.engine.actions import Action, Announce, SurveyDone
from hicache.errors import ConfigError, HicacheError
from hicache.runtime.clock import Clock
from hicache.runtime.copier import Copier
from hicache.runtime.desk import TransferDesk
from hicache.runtime.door import Door
from hicache.runtime.heat import HeatTeller
from hicache.runtime.kv_regions import KvRegions
from hicache.runtime.loading import LoadCalls
from hicache.runtime.loop import EngineLoop
from hicache.runtime.namespaces import NamespaceBook
from hicache.runtime.options import ServiceOptions
from hicache.runtime.packing import PackCalls
from hicache.runtime.perform import Performer
from hicache.runtime.ports import TierPort
from hicache.runtime.recorder import Recorder
from hicache.runtime.recovery import Recoverer
from hicache.runtime.regions import RegionRegistry
from hicache.runtime.stores import Stores, open_stores
from hicache.runtime.turns import Backlog, Turns
from hicache.runtime.watch import Watch
from hicache.runtime.watchers import Watchers
from hicache.runtime.workers import Wake, Workers, resolve
from hicache.types import Completion, Namespace, Notify, Op, PageStore, TierKind

_log = logging.getLogger(__name__)


class OpenTransfers(Protocol):
    """``device.opening.open_transfers``."""

    def __call__(self, store: PageStore | None, notify: Notify, *, now_ns: Callable[[], int]) -> Transfers:
        """See there."""


class House:
    """Use ``open_house``. The loop's thread owns it."""

    def __init__(
        self,
        options: ServiceOptions,
        clock: Clock,
        stores: Stores,
        wake: Wake,
        regions: RegionRegistry,
        *,
        transfers: Transfers,
        door: Door,
    ) -> None:
        self.stores = stores
        self.ports = stores.ports
        self.regions = regions
        self.engine = Engine(options.engine_options(stores.specs))
        self.loop = EngineLoop(self.engine, clock, self._perform)
        self.namespaces = NamespaceBook(stores.specs)
        self._wake = wake
        self._backlog = Backlog(wake.ring, clock.now_ns)
        self._workers = Workers(options.workers, wake.ring)
        self.desk = TransferDesk(transfers, self._workers, wake.ring)
        self.kv_regions = KvRegions(self.desk, regions.next_id, door.require)
        self.copier = Copier(
            self.ports,
            self._workers,
            done=self.loop.handle,
            chunk_bytes=options.copy_chunk_bytes,
            bounce_bytes=options.bounce_bytes,
            lanes=2 * options.workers,
            now_ns=clock.now_ns,
            soon=self._backlog.add,
        )
        self.packs = PackCalls(self.desk, self.kv_regions, self.ports[0], clock)
        self.loads: LoadCalls | None = None  # made with the calls that it needs
        self.performer = Performer(self.ports, self.copier, regions, self.loop.handle, self._backlog.add)
        self.watchers = Watchers(
            self.loop.handle, lambda number: self.namespaces.find(number)[0].tenant, clock
        )
        self.performer.hand_on(Announce, self.watchers.take)
        self.performer.hand_on(SurveyDone, self.watchers.survey_done)
        for port in self.ports:
            port.on_local = wake.ring
            port.now_ms = clock.now_ms
        self._clock = clock
        self._watches = [Watch(port, clock) for port in self.ports if port.spec.durable]
        self.heat = HeatTeller(self.engine, stores.disk, clock)
        self.recoverer: Recoverer | None = None
        self._recovering: asyncio.Task[None] | None = None
        self.recorder: Recorder | None = None

    def _perform(self, action: Action) -> None:
        self.performer.perform(action)

    def poll(self) -> int:
        """Hand out what workers, stores and transfers have finished; returns how many results there were."""
        found = self._backlog.poll() + self._workers.poll()
        return found + sum(port.poll() for port in self.ports) + self.desk.poll()

    def poll_by_turns(self) -> Callable[[], None]:
        """``poll`` in turns: to be called whenever somebody rings."""
        ports = [port.poll for port in self.ports]
        sources = [self._backlog.poll, self._workers.poll, *ports, lambda _turn: self.desk.poll()]
        return Turns(sources, self._clock.now_ns, self._wake.ring).take

    # --- namespaces

    def open_namespace(self, spec: Namespace) -> tuple[int, bytes]:
        """The number and fingerprint of a namespace; the disk learns of it before any of its pages."""
        number, digest, new = self.namespaces.add(spec)
        if new:
            if self.stores.disk is not None:
                self.stores.disk.put_namespace(digest, spec)
            self.loop.handle(events.NamespaceOpened(number, spec, digest))
        return number, digest

    # --- recovery

    def start_recovery(self) -> None:
        """Bring back what the disk holds, in the background; until then it takes no writes."""
        disk = self.stores.disk
        if disk is None:
            return
        port = next(port for port in self.ports if port.store is disk)
        port.hold_writes()
        stored = disk.namespaces()
        start_ms = self._clock.now_ms()
        offset_ms = start_ms - int(self._clock.wall_s() * 1000)
        self.heat.start()
        self.recoverer = Recoverer(
            disk.recover,
            port,
            namespace=lambda digest: self.open_namespace(stored[digest])[0],
            handle=self.loop.handle,
            clock_ms=lambda wall_ms: min(wall_ms + offset_ms, start_ms - 1),
        )
        self._recovering = asyncio.get_running_loop().create_task(self.recoverer.run())

    async def recovered(self) -> None:
        """Return when recovery is over."""
        if self._recovering is not None:
            await asyncio.shield(self._recovering)

    # --- recording

    def start_recording(self, options: ServiceOptions, clock: Clock) -> None:
        """Record what is looked up and stored, where the options say so. Raises ConfigError."""
        if options.record:
            self.recorder = Recorder(
                Path(options.record),
                rotate_bytes=options.record_bytes,
                files=options.record_files,
                show_salt=options.record_salt,
                clock=clock,
                namespace=self.namespaces.find,
            )
            self.loop.watch = self.recorder.see

    # --- the end

    async def flush(self, timeout_ms: int) -> None:
        """Return when everything that the stores were given is done, and durable where they are; or in time."""
        flushes = [asyncio.ensure_future(self._flush(port)) for port in self.ports]
        _, late = await asyncio.wait(flushes, timeout=timeout_ms / 1000)
        for flush in late:
            flush.cancel()
        if late:
            _log.warning("the stores had not finished within %d ms", timeout_ms)

    async def _flush(self, port: TierPort) -> None:
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        port.submit(Op.FLUSH, lambda completion: resolve(done, completion))
        await done

    async def close(self) -> None:
        """Stop recovery, refuse who waits, finish what the stores were given, release everything."""
        if self.recoverer is not None:
            self.recoverer.stop()
        await self.recovered()
        for watch in self._watches:
            watch.close()
        self.heat.stop()
        self.watchers.close()
        self.loop.close()
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.close)
        self._wake.close()
        self.kv_regions.cut("the service stopped")
        await asyncio.to_thread(self._workers.close)
        self.poll()  # a chunk that was read in may still go to its store; those that wait for a worker fail
        await asyncio.to_thread(self.desk.finish)  # transfers use the stores' memory
        self.desk.close()
        for port in reversed(
            self.ports
        ):  # what a lower tier has read goes to slots above it, which must be there
            await asyncio.to_thread(port.finish)
            self.poll()
        while self.poll():
            pass  # each chunk that fails lets the next one in, to fail as well
        assert not self.copier.in_flight, "a copy was lost"
        assert not self.desk.in_flight, "a transfer was lost"
        self.kv_regions.close()
        self.regions.close()


async def open_house(
    options: ServiceOptions,
    clock: Clock,
    regions: RegionRegistry,
    *,
    door: Door,
    open_transfers: OpenTransfers = open_transfers,
) -> House:
    """Open the stores (on a thread: a lock, a file to map) and wire everything. Raises as ``open_stores`` does."""
    wake = Wake(asyncio.get_running_loop())
    stores = await asyncio.to_thread(
        open_stores, options, wake.ring, lambda: int(clock.wall_s() * 1000), clock.now_ns
    )
    device = next((port.store for port in stores.ports if port.spec.kind is TierKind.DEVICE), None)
    try:
        transfers = await asyncio.to_thread(open_transfers, device, wake.ring, now_ns=clock.now_ns)
    except HicacheError:
        for port in stores.ports:
            port.store.close()
        raise
    house = House(options, clock, stores, wake, regions, transfers=transfers, door=door)
    wake.call = house.poll_by_turns()
    try:
        house.start_recording(options, clock)
    except ConfigError:
        await house.close()
        raise
    return house


def refuse_optimised() -> None:
    """Raise ConfigError where Python strips asserts: they are part of how this service keeps its promises."""
    if not __debug__:
        raise ConfigError(
            "hicache does not serve under python -O: it relies on its asserts", hint="run without -O"
        )
