"""The device store on a CUDA device, or on anything that has its shape (``driver.py``).

Two lanes are the two directions, each a stream of its own with a priority, stages and a thread that polls events;
the owner's thread only plans batches and takes completions. Promotion (PUT) goes before demotion (GET) on the device:
an engine waits for the one and for the other only when it is out of room. Lanes are in ``lane.py``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from hicache.device import kernels
from hicache.device.chores import Calibrate, Chore, Wipe
from hicache.device.driver import Driver, DriverError
from hicache.device.engines import Choice, available
from hicache.device.jobs import Fate, Job
from hicache.device.kv import MemoryKind, SharedMemory
from hicache.device.lane import Lane
from hicache.device.many import ManyDevices
from hicache.device.patience import Patience
from hicache.device.pinned import Pins
from hicache.device.plan import Extent
from hicache.device.result import Result
from hicache.device.segment import DeviceSegment
from hicache.device.store import DeviceOptions, DeviceStore
from hicache.device.table import SegmentTable, require_sharing
from hicache.errors import ConfigError, ExhaustedError, UnavailableError, UnsupportedError
from hicache.types import Batch, Notify, Op, TierSpec

PROMOTION_PRIORITY, DEMOTION_PRIORITY = -1, 0
#: How often a lane asks for its events, and how long it sleeps with nothing in flight unless it is woken.
POLL_S, IDLE_S = 30e-6, 1.0
#: The grain of what CUDA IPC shares: a smaller allocation shares its granule with others.
SHARED_GRAIN_BYTES = 2 << 20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceStats:
    """What a device store tells of itself."""

    device: str
    choices: dict[tuple[str, int, str], Choice]  # (direction, bytes of a page, few or many) -> engine
    direct_bytes: int
    bounced_bytes: int
    registered_bytes: int
    faults: int
    problem: str  # why the device was given up; empty while it serves


class Spare(NamedTuple):
    """Memory of a closed segment. ``sound``: nothing but that segment's pages lies in it."""

    address: int
    domain: str
    sound: bool


class CudaDevice(SegmentTable[DeviceSegment]):
    """The DeviceStore of ``cuda:<n>``.

    ``pins``: of several devices together; whoever made them closes them, between ``settle`` and ``close``.
    ``threaded=False``: no threads; ``step`` does their work (tests). ``now_ns``: the clock of ``timeout_ms``.
    """

    def __init__(
        self,
        spec: TierSpec,
        notify: Notify,
        options: DeviceOptions,
        driver: Driver,
        *,
        pins: Pins | None = None,
        threaded: bool = True,
        now_ns: Callable[[], int] = lambda: 0,
    ) -> None:
        engines = ("auto", *available(driver))
        if options.copy_engine not in engines:
            raise ConfigError(
                f"copy engine {options.copy_engine!r}: {driver.name} has {', '.join(engines)}",
                hint="choose one of these, or auto",
            )
        super().__init__(spec, notify)
        self.name = driver.name
        self._driver = driver
        self.options = options
        self._share = options.share
        if options.share:  # what else lies in a granule is shared along with it
            self._memory_bytes = -(-spec.segment_bytes // SHARED_GRAIN_BYTES) * SHARED_GRAIN_BYTES
        self._spare: list[Spare] = []  # giving memory back would wait for the device
        self._memory: list[int] = []
        self._calibrates = options.copy_engine == "auto"
        self._sizes: set[int] = set()  # of pages, of which lanes were told
        self.patience = self._patience = Patience(now_ns, options.timeout_ms * 1_000_000)
        self._fate = Fate()
        self._released = False
        driver.bind()
        self._own_pins = pins is None
        self.pins = pins or Pins(driver, threaded=threaded)
        make = functools.partial(
            Lane,
            driver,
            self.pins,
            self._lock,
            engine=options.copy_engine,
            stage_bytes=options.cuda_staging_bytes,
            patience=self._patience,
            fate=self._fate,
        )
        self._wiped = driver.event()
        self._writes = make(priority=PROMOTION_PRIORITY, to_host=False)
        self._reads = make(priority=DEMOTION_PRIORITY, to_host=True)
        self._lanes = (self._writes, self._reads)
        self._pumps = [
            Pump(f"hicache-{spec.name}-{name}", lane, driver.bind)
            for name, lane in (("put", self._writes), ("get", self._reads))
            if threaded
        ]

    @property
    def driver(self) -> Driver:
        """The device, for those who copy from its slots."""
        return self._driver

    @property
    def stats(self) -> DeviceStats:
        """What was chosen, measured and moved so far; from any thread."""
        counts = [lane.counts for lane in self._lanes]
        return DeviceStats(
            device=self._driver.name,
            choices={**self._writes.chooser.choices, **self._reads.chooser.choices},
            direct_bytes=sum(count.direct_bytes for count in counts),
            bounced_bytes=sum(count.bounced_bytes for count in counts),
            registered_bytes=self.pins.registered_bytes,
            faults=sum(count.faults for count in counts),
            problem=self.problem,
        )

    @property
    def silent(self) -> bool:
        """It was given up without an answer: what it was given may still happen."""
        return self._fate.silent

    @property
    def problem(self) -> str:
        """Why the device was given up; empty while it serves."""
        return next((lane.dead for lane in self._lanes if lane.dead), "")

    # --- segments

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """See DeviceStore. What must be done before its first batch waits in the lanes in front of that."""
        self._check_room(segment, page_bytes, slots)
        if self.problem:
            raise ExhaustedError(f"segment {segment}: {self.name}: {self.problem}")
        try:
            address, clean = self._take_memory(domain)
        except DriverError as error:
            raise ExhaustedError(f"no memory for segment {segment}: {error}") from error
        hashable = kernels.can_hash(page_bytes)
        opened = DeviceSegment(domain, page_bytes, slots, address=address, hashable=hashable)
        self._segments[segment] = opened
        if not clean:
            wipe = Wipe(
                self._driver,
                opened,
                self._memory_bytes,
                stream=self._writes.stream,
                event=self._wiped,
                patience=self._patience,
            )
            self._chore(self._writes, wipe)
        if self._calibrates and page_bytes not in self._sizes:
            self._sizes.add(page_bytes)
            for lane in self._lanes:
                self._chore(lane, Calibrate(functools.partial(lane.calibrate, page_bytes)))

    def close_segment(self, segment: int, *, reusable: bool = True) -> None:
        """See DeviceStore. The memory is kept for the next segment, where that may be."""
        found = self._take_out(segment)
        if not reusable:
            self._memory.remove(found.address)

        def unused() -> None:
            if reusable:
                self._spare.append(Spare(found.address, found.domain, sound=not found.problem))
            else:
                self.pins.later(functools.partial(self._driver.release, found.address))

        with self._lock:  # a transfer may be reading it still
            lent = found.loans > 0
            found.unused = unused
        if not lent:
            unused()

    def shared(self, segment: int) -> SharedMemory:
        """See DeviceStore."""
        require_sharing(self._spec, on=self._share)
        found = self._segment(segment)
        if not found.clean:
            raise UnavailableError(
                f"segment {segment} has not been wiped yet: {found.problem or 'it will be'}"
            )
        try:
            handle = found.handle = found.handle or self._driver.share(found.address)
        except DriverError as error:
            raise UnsupportedError(f"{self.name} cannot share its memory: {error}") from error
        return SharedMemory(
            MemoryKind.CUDA_IPC, self._memory_bytes, handle=handle, device_uuid=self._driver.uuid
        )

    def _take_memory(self, domain: str) -> tuple[int, bool]:
        """An address, and whether the domain may read what lies there. Raises DriverError."""
        mine = [at for at, spare in enumerate(self._spare) if spare.sound and spare.domain == domain]
        if self._spare:
            spare = self._spare.pop(mine[0] if mine else 0)
            return spare.address, bool(mine) and not self._share
        address = self._driver.allocate(self._memory_bytes)
        self._memory.append(address)
        return address, not self._share  # nobody else's, or bytes of this process that none can map

    # --- the port

    def step(self) -> bool:
        """Without threads: do what can be done now. True if anything happened."""
        self.pins.work()
        return any([lane.step() for lane in self._lanes])

    def settle(self) -> None:
        """Finish what was submitted, end the threads; from now on only ``poll`` and ``close`` are called."""
        if self._closed:
            return
        self._closed = True
        for pump, lane in zip(self._pumps, self._lanes, strict=False):
            if not pump.close(self._patience.timeout_ns / 1e9):
                lane.abandon()
        while not all(lane.idle for lane in self._lanes):
            self.step()

    def close(self) -> None:
        """Finish what was submitted, end the threads, give all memory back. ``poll`` still gives the rest.

        A device that has given no answer keeps its memory, and the host memory that it was to copy from or to.
        """
        if self._released:
            return
        self.settle()
        self._released = True
        if self._own_pins:
            self.pins.close(leave=self.silent)
        self._segments.clear()
        if self.silent:
            _log.error("%s gives no answer: %d segments are left to it", self.name, len(self._memory))
            return
        for lane in self._lanes:
            lane.stages.close()
        with contextlib.suppress(DriverError):  # a device that was lost has taken it with it
            for address in self._memory:
                self._driver.release(address)
        self._driver.close()

    def _start(self, extents: list[Extent[DeviceSegment]], result: Result) -> None:
        lane = self._reads if result.batch.op is Op.GET else self._writes
        finish = functools.partial(self._finish, extents, result)
        self._give(lane, Job(result.batch.op, extents, result, finish, collections.deque(extents)))

    def _pass(self, batch: Batch, then: Callable[[], None]) -> None:
        for lane in self._lanes:
            self._give(lane, Job(Op.FLUSH, [], Result(batch), then))

    def _chore(self, lane: Lane, chore: Chore) -> None:
        nothing = Result(Batch(0, Op.FLUSH))
        self._give(lane, Job(Op.FLUSH, [], nothing, lambda: None, chore=chore))

    def _give(self, lane: Lane, job: Job) -> None:
        lane.submit(job)
        if self._pumps:
            self._pumps[self._lanes.index(lane)].wake()


def open_cuda(
    spec: TierSpec,
    notify: Notify,
    options: DeviceOptions,
    drivers: Sequence[Driver],
    *,
    now_ns: Callable[[], int] = lambda: 0,
) -> DeviceStore:
    """The store of one device or several. Raises ConfigError, UnsupportedError."""
    if len(drivers) == 1:
        return CudaDevice(spec, notify, options, drivers[0], now_ns=now_ns)
    pins = Pins(drivers[0])  # registered once, host memory is pinned for all

    def opener(driver: Driver) -> Callable[[TierSpec], CudaDevice]:
        return lambda part: CudaDevice(part, notify, options, driver, pins=pins, now_ns=now_ns)

    return CudaDevices(spec, [opener(driver) for driver in drivers], pins)


class CudaDevices(ManyDevices[CudaDevice]):
    """Several CUDA devices; they share the host memory that is registered."""

    def __init__(self, spec: TierSpec, opens: Sequence[Callable[[TierSpec], CudaDevice]], pins: Pins) -> None:
        self.pins = pins
        super().__init__(spec, opens, self._close_pins)

    @property
    def stats(self) -> tuple[DeviceStats, ...]:
        """Of each device, in the order in which they were named."""
        return tuple(device.stats for device in self.devices)

    def _close_pins(self) -> None:
        self.pins.close(leave=any(device.silent for device in self.devices))


class Stepped(Protocol):
    """What a pump runs."""

    steps: int  # how often it was asked

    @property
    def idle(self) -> bool:
        """Nothing is waiting or in flight."""

    def step(self) -> bool:
        """Do what can be done now. True if anything happened."""


class Pump:
    """The thread that runs a lane's steps. ``pause_s``: until it is asked again, where it is not idle."""

    def __init__(
        self,
        name: str,
        lane: Stepped,
        bind: Callable[[], None],
        pause_s: Callable[[], float] = lambda: POLL_S,
    ) -> None:
        self._lane = lane
        self._bind = bind
        self._pause_s = pause_s
        self._work = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is work."""
        self._work.set()

    def close(self, timeout_s: float) -> bool:
        """Finish what was submitted, end the thread. False: a call of the driver does not return, in all that time."""
        self._ending = True
        self._work.set()
        while self._thread.is_alive():
            before = self._lane.steps
            self._thread.join(timeout_s or None)
            if self._thread.is_alive() and self._lane.steps == before:
                return False
        return True

    def _run(self) -> None:
        self._bind()
        while True:
            self._work.clear()
            if self._lane.step():
                continue
            if not self._lane.idle:
                self._work.wait(self._pause_s())
            elif self._ending:
                return
            else:
                self._work.wait(IDLE_S)
