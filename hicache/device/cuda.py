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
from collections.abc import Callable, Sequence

import numpy as np

from hicache.device import kernels
from hicache.device.driver import Driver, DriverError
from hicache.device.engines import Choice, available
from hicache.device.lane import Job, Lane
from hicache.device.pinned import Pins
from hicache.device.plan import locate, plan
from hicache.device.result import Result
from hicache.device.segment import DeviceSegment
from hicache.device.store import DeviceOptions, check_room
from hicache.errors import ConfigError, ExhaustedError, InvalidArgumentError, UnavailableError
from hicache.types import Batch, Completion, Notify, Op, TierSpec

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


class CudaDevice:
    """The DeviceStore of ``cuda:<n>``. One thread owns it: all calls come from there.

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
        self._spec = spec
        self._notify = notify
        self._driver = driver
        self._lock = threading.Lock()  # the segments' columns and counts
        self._segments: dict[int, DeviceSegment] = {}
        self._spare: list[int] = []  # memory of closed segments: giving it back would wait for the device
        self._memory: list[int] = []
        self._done: collections.deque[Completion] = collections.deque()
        self._closed = False
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
        self._check_open()
        check_room(self._spec, segment, page_bytes, slots, self._segments)
        try:
            address = self._spare.pop() if self._spare else self._allocate()
        except DriverError as error:
            raise ExhaustedError(f"no memory for segment {segment}: {error}") from error
        hashable = kernels.can_hash(page_bytes)
        self._segments[segment] = DeviceSegment(domain, page_bytes, slots, address=address, hashable=hashable)

    def close_segment(self, segment: int) -> None:
        """See DeviceStore. The memory is kept for the next segment."""
        found = self._segments.get(segment)
        if found is None:
            raise InvalidArgumentError(f"segment {segment} is not open")
        with self._lock:
            moving = found.batches_in_flight
        if moving:
            raise InvalidArgumentError(
                f"segment {segment}: {moving} batches move its pages", hint="close it after their completions"
            )
        del self._segments[segment]
        self._spare.append(found.address)

    def free(self, slots: Sequence[int]) -> None:
        """See DeviceStore."""
        with self._lock:
            for extent in locate(slots, self._segments):
                extent.segment.empty(extent.indices)
                extent.segment.frees[extent.indices] += np.uint32(1)

    def _allocate(self) -> int:
        address = self._driver.allocate(self._spec.segment_bytes)
        self._memory.append(address)
        return address

    # --- the port

    def submit(self, batch: Batch) -> None:
        """Queue a batch. Raises InvalidArgumentError where it does not fit, UnavailableError once closed."""
        self._check_open()
        if batch.op is Op.FLUSH:
            self._flush(batch)
            return
        with self._lock:
            extents = plan(batch, self._segments)
            for extent in extents:
                extent.segment.batches_in_flight += 1
        result = Result(batch)

        def finish() -> None:
            with self._lock:
                for extent in extents:
                    extent.segment.batches_in_flight -= 1
            self._complete(result.completion())

        job = Job(batch.op, extents, result, finish, collections.deque(extents))
        self._give(self._reads if batch.op is Op.GET else self._writes, job)

    def poll(self) -> list[Completion]:
        """Completions since the last call, in order within a lane; never blocks."""
        return [self._done.popleft() for _ in range(len(self._done))]

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

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError(f"tier {self._spec.name!r} is closed")

    def _give(self, lane: Lane, job: Job) -> None:
        lane.submit(job)
        if self._pumps:
            self._pumps[self._lanes.index(lane)].wake()

    def _flush(self, batch: Batch) -> None:
        waiting = len(self._lanes)

        def pass_by() -> None:
            nonlocal waiting
            with self._lock:
                waiting -= 1
                last = not waiting
            if last:
                self._complete(Completion(batch.id, ()))

        for lane in self._lanes:
            self._give(lane, Job(Op.FLUSH, [], Result(batch), pass_by))

    def _complete(self, completion: Completion) -> None:
        self._done.append(completion)
        self._notify()


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
