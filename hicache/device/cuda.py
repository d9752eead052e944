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
import threading
from collections.abc import Callable

from hicache.device import kernels
from hicache.device.driver import Driver, DriverError
from hicache.device.engines import Choice, available
from hicache.device.lane import Job, Lane
from hicache.device.pinned import Pins
from hicache.device.plan import Extent
from hicache.device.result import Result
from hicache.device.segment import DeviceSegment
from hicache.device.store import DeviceOptions
from hicache.device.table import SegmentTable
from hicache.errors import ConfigError, ExhaustedError
from hicache.types import Batch, Notify, Op, TierSpec

PROMOTION_PRIORITY, DEMOTION_PRIORITY = -1, 0
#: How often a lane asks for its events, and how long it sleeps with nothing in flight unless it is woken.
POLL_S, IDLE_S = 30e-6, 1.0


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


class CudaDevice(SegmentTable[DeviceSegment]):
    """The DeviceStore of ``cuda:<n>``.

    ``threaded=False``: no threads; ``step`` does their work (tests).
    """

    def __init__(
        self, spec: TierSpec, notify: Notify, options: DeviceOptions, driver: Driver, *, threaded: bool = True
    ) -> None:
        engines = ("auto", *available(driver))
        if options.copy_engine not in engines:
            raise ConfigError(
                f"copy engine {options.copy_engine!r}: {driver.name} has {', '.join(engines)}",
                hint="choose one of these, or auto",
            )
        super().__init__(spec, notify)
        self._driver = driver
        self._spare: list[int] = []  # memory of closed segments: giving it back would wait for the device
        self._memory: list[int] = []
        driver.bind()
        self.pins = Pins(driver, threaded=threaded)
        make = functools.partial(
            Lane,
            driver,
            self.pins,
            self._lock,
            engine=options.copy_engine,
            stage_bytes=options.cuda_staging_bytes,
        )
        self._writes = make(priority=PROMOTION_PRIORITY)
        self._reads = make(priority=DEMOTION_PRIORITY)
        self._lanes = (self._writes, self._reads)
        self._pumps = [
            Pump(f"hicache-{spec.name}-{name}", lane, driver.bind)
            for name, lane in (("put", self._writes), ("get", self._reads))
            if threaded
        ]

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
            problem=next((lane.dead for lane in self._lanes if lane.dead), ""),
        )

    # --- segments

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """See DeviceStore."""
        self._check_room(segment, page_bytes, slots)
        try:
            address = self._spare.pop() if self._spare else self._allocate()
        except DriverError as error:
            raise ExhaustedError(f"no memory for segment {segment}: {error}") from error
        hashable = kernels.can_hash(page_bytes)
        self._segments[segment] = DeviceSegment(domain, page_bytes, slots, address=address, hashable=hashable)

    def close_segment(self, segment: int) -> None:
        """See DeviceStore. The memory is kept for the next segment."""
        self._spare.append(self._take_out(segment).address)

    def _allocate(self) -> int:
        address = self._driver.allocate(self._spec.segment_bytes)
        self._memory.append(address)
        return address

    # --- the port

    def step(self) -> bool:
        """Without threads: do what can be done now. True if anything happened."""
        self.pins.work()
        return any([lane.step() for lane in self._lanes])

    def close(self) -> None:
        """Finish what was submitted, end the threads, give all memory back. ``poll`` still gives the rest."""
        if self._closed:
            return
        self._closed = True
        for pump in self._pumps:
            pump.close()
        while not all(lane.idle for lane in self._lanes):
            self.step()
        self.pins.close()
        for lane in self._lanes:
            lane.close()
        self._segments.clear()
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

    def _give(self, lane: Lane, job: Job) -> None:
        lane.submit(job)
        if self._pumps:
            self._pumps[self._lanes.index(lane)].wake()


class Pump:
    """The thread that runs a lane's steps."""

    def __init__(self, name: str, lane: Lane, bind: Callable[[], None]) -> None:
        self._lane = lane
        self._bind = bind
        self._work = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is work."""
        self._work.set()

    def close(self) -> None:
        """Finish what was submitted, end the thread."""
        self._ending = True
        self._work.set()
        self._thread.join()

    def _run(self) -> None:
        self._bind()
        while True:
            self._work.clear()
            if self._lane.step():
                continue
            if not self._lane.idle:
                self._work.wait(POLL_S)
            elif self._ending:
                return
            else:
                self._work.wait(IDLE_S)
