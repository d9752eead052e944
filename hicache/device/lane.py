"""One direction of a CUDA device: batches in, chunks through a ring of stages, completions out in order.

    submit ─► waiting ─► launch: into a free stage, copies queued, event recorded ─► in flight ─► land: event
    ready, checksums compared, slots accepted or buffers filled ─► completion

``step`` does what can be done now and never waits; a thread (``pump``) or a test calls it. Nothing here runs on the
owner's thread but ``submit``. Steps that change slots (PUT, DELETE) share a lane, so they take effect in order.

Where a page's bytes are proved: on the device, by the kernel, while they lie in the slot (where the device can), and
on the host after they landed there, by the same xxh3-64. A PUT's checksum is that of what lies in the slot.
A stage is used again only when its event is ready; if the runtime will not even record one, the device is given up.
"""

from __future__ import annotations

import collections
import logging
import threading

import numpy as np
import xxhash

from hicache.device import engines
from hicache.device.chores import Chore
from hicache.device.driver import Driver, DriverError
from hicache.device.engines import MANY_ROWS, Chooser, Rows, Stage
from hicache.device.jobs import Array, Chunk, Counts, Fate, Job
from hicache.device.patience import Patience, Unanswered
from hicache.device.pinned import Pins
from hicache.device.plan import Extent
from hicache.device.segment import DeviceSegment, Sums
from hicache.device.stages import Stages
from hicache.types import Op, Outcome, slot_stride

_log = logging.getLogger(__name__)


class Lane:
    """A stream with its stages. ``lock`` guards the segments' columns; it is never held during a copy."""

    def __init__(
        self,
        driver: Driver,
        pins: Pins,
        lock: threading.Lock,
        *,
        priority: int,
        to_host: bool,
        engine: str,
        stage_bytes: int,
        patience: Patience,
        fate: Fate,
    ) -> None:
        self._fate = fate
        self._driver = driver
        self._patience = patience
        self._pins = pins
        self._lock = lock
        self.stream = driver.stream(priority)
        self.stages = Stages(driver, stage_bytes)
        self.to_host = to_host
        self._waiting: collections.deque[Job] = collections.deque()
        self._launched: collections.deque[Job] = collections.deque()  # of these nothing is left to launch
        self._flying: collections.deque[Chunk] = collections.deque()
        self._landed_ns = 0
        self.chooser = Chooser(driver, self.stream, engine, patience)
        self.counts = Counts()
        self.steps = 0
        self._lost = ""  # why this lane's own events tell nothing any more
        self._abandoned = False

    # --- from the owner

    def submit(self, job: Job) -> None:
        """Queue a job; returns at once."""
        self._waiting.append(job)

    @property
    def dead(self) -> str:
        """Why nothing is launched any more; empty while it is."""
        return self._lost or self._fate.reason

    @property
    def idle(self) -> bool:
        """Nothing is waiting or in flight."""
        return not self._waiting and not self._launched

    # --- from the lane's thread

    def step(self) -> bool:
        """Land and launch what can be. True if anything happened."""
        self.steps += 1
        landed = self._land()
        finished = self._finish()
        return self._launch() or landed or finished

    def abandon(self) -> None:
        """The lane's thread does not come back from a call of the driver: end what there is, from another thread."""
        self._give_up(Unanswered(self._patience.timeout_ns))
        self._abandoned = True
        jobs = [*self._launched, *self._waiting]
        for queue in (self._launched, self._waiting, self._flying):
            queue.clear()
        for job in jobs:
            job.result.fault(self.dead)
            job.finish()

    # --- launching

    def _launch(self) -> bool:
        happened = False
        while self._waiting:
            job = self._waiting[0]
            moved = self._move_on(job)
            if not moved or self._abandoned:
                break
            if not job.left:
                self._launched.append(self._waiting.popleft())
            happened = True
        return self._finish() or happened

    def _move_on(self, job: Job) -> bool:
        """Launch some of what is left of the job in front; False where it must wait."""
        if job.op in {Op.PUT, Op.GET}:
            if job.left and self.dead:
                job.result.fault(self.dead)
                job.left.clear()
            return not job.left or self._start(job)
        if self._flying:
            return False  # in its turn: what it follows must have landed
        if job.chore is not None:
            return self._do(job.chore)
        if job.op is Op.DELETE:
            self._delete(job)
            job.left.clear()
        return True

    def _finish(self) -> bool:
        """Complete the jobs whose pages are all settled, in order."""
        happened = False
        while self._launched and not self._launched[0].flying:
            self._launched.popleft().finish()
            happened = True
        return happened

    def _do(self, chore: Chore) -> bool:
        """A step of it; True when it is over."""
        try:
            return bool(self.dead) or chore.step()
        except DriverError as error:
            self._give_up(error)
            return True

    def calibrate(self, row_bytes: int) -> bool:
        """Find the engines for pages of a size; False where no stage is free. Raises DriverError as a chore does."""
        stage = self._stage(row_bytes)
        if stage is None:
            return bool(self.dead)
        for count in (1, MANY_ROWS):
            self.chooser.engine(count, row_bytes, stage, to_host=self.to_host)
        self.stages.give(stage)
        return True

    def _start(self, job: Job) -> bool:
        """Launch some of the job's pages; False where no stage is free."""
        if job.left[0].segment.problem:
            job.result.fault(job.left.popleft().segment.problem)
            return True
        row_bytes = job.left[0].segment.page_bytes
        stage = self._stage(row_bytes)
        if stage is None:
            return False
        extent = job.left.popleft()
        room = min(stage.size_bytes // row_bytes, len(stage.table) // 4)
        if len(extent.indices) > room:
            first, *rest = extent.chunks(room)
            job.left.extendleft(reversed(rest))
            extent = first
        chunk = self._begin(job, extent, stage)
        try:
            self._queue(chunk)
        except DriverError as error:
            self._fail(chunk, error)
        except (ValueError, BufferError) as error:  # a buffer that was released too early
            chunk.problem = f"{type(error).__name__}: {error}"
        self._record(chunk)
        return True

    def _begin(self, job: Job, extent: Extent[DeviceSegment], stage: Stage) -> Chunk:
        """Take the slots' state down; a PUT empties them, a GET leaves out those that hold nothing."""
        segment = extent.segment
        with self._lock:
            if job.op is Op.PUT:
                segment.empty(extent.indices)
            else:
                held = segment.held[extent.indices]
                job.result.settle(extent.positions[~held], Outcome.MISS)
                extent = extent.taken(held)
            writes, recorded = segment.writes[extent.indices], segment.checksums[extent.indices]
        hashed = self._driver.has_kernels and segment.hashable
        job.flying += 1
        return Chunk(job, extent, stage, hashed, writes, recorded)

    def _queue(self, chunk: Chunk) -> None:
        segment, stage, count = chunk.extent.segment, chunk.stage, len(chunk.extent.positions)
        if not count:
            return
        row_bytes, to_host = segment.page_bytes, chunk.job.op is Op.GET
        buffers = chunk.job.result.batch.buffers
        chunk.pages = [np.frombuffer(buffers[at], np.uint8) for at in chunk.extent.positions.tolist()]
        # without a hash on the device, a copy of our own is what is hashed: the buffer may change
        chunk.direct = (chunk.hashed or to_host) and self._pins.cover(chunk.pages)
        engine = self.chooser.engine(count, row_bytes, stage, to_host=to_host)
        slots = segment.address + chunk.extent.indices * slot_stride(row_bytes)
        if chunk.direct:
            host = np.array([page.ctypes.data for page in chunk.pages], np.int64)
            self.counts.direct_bytes += count * row_bytes
        else:
            host = stage.host.ctypes.data + np.arange(count, dtype=np.int64) * row_bytes
            self.counts.bounced_bytes += count * row_bytes
            if not to_host:
                for row, page in zip(_rows(stage, count, row_bytes), chunk.pages, strict=True):
                    np.copyto(row, page)
        ends = (host, slots) if to_host else (slots, host)
        rows = Rows(ends[0], ends[1], row_bytes, to_host)
        engines.copy_rows(engine, self._driver, self.stream, rows, stage)
        if chunk.hashed:
            engines.hash_rows(self._driver, self.stream, slots, row_bytes, stage)

    def _record(self, chunk: Chunk) -> None:
        """Put the chunk in flight. Without an event nobody knows when its memory is free: the device is given up."""
        try:
            self._driver.record(chunk.stage.event, self.stream)
        except DriverError as error:
            self._fail(chunk, error)
            self._give_up(error)
        chunk.since_ns = self._patience.now_ns()
        self._flying.append(chunk)

    def _stage(self, row_bytes: int) -> Stage | None:
        try:
            return self.stages.take(row_bytes, idle=not self._flying)
        except DriverError as error:
            self._lost = self._lost or f"no memory for copies: {error}"
            return None

    # --- landing

    def _land(self) -> bool:
        happened = False
        while self._flying:
            chunk = self._flying[0]
            try:
                if not self._lost and not self._driver.ready(chunk.stage.event):
                    self._patience.check(max(chunk.since_ns, self._landed_ns))
                    return happened
            except DriverError as error:
                self._fail(chunk, error)
            if self._abandoned:
                return False
            self._flying.popleft()
            self._settle(chunk)
            self._landed_ns = self._patience.now_ns()
            self.stages.give(chunk.stage)
            chunk.job.flying -= 1
            happened = True
        return happened

    def _settle(self, chunk: Chunk) -> None:
        if chunk.problem or self._lost:
            chunk.job.result.fault(self._lost or chunk.problem)
        elif chunk.job.op is Op.PUT:
            self._accept(chunk)
        else:
            self._deliver(chunk)

    def _accept(self, chunk: Chunk) -> None:
        """The pages lie in their slots: hold those whose bytes are right and whose slots were not taken."""
        extent, result = chunk.extent, chunk.job.result
        sums = _sums(chunk)
        sound = np.ones(len(sums), np.bool_)
        if result.batch.checksums:
            given = [result.batch.checksums[position] for position in extent.positions.tolist()]
            sound = sums == np.array(given, np.uint64)
            result.settle(extent.positions[~sound], Outcome.CORRUPT)
        segment = extent.segment
        with self._lock:
            kept = sound & (segment.frees[extent.indices] == extent.frees)
            # a slot that a later PUT has begun to write is that one's: this page was there, and is gone again
            ours = kept & (segment.writes[extent.indices] == chunk.writes)
            segment.accept(extent.indices[ours], sums[ours])
        if (sound & ~kept).any():
            result.fault("a slot was freed before its page arrived")
        result.moved(extent.positions[kept], sums[kept])

    def _deliver(self, chunk: Chunk) -> None:
        """The pages lie on the host: hand over those whose bytes are the recorded ones."""
        extent, result, segment = chunk.extent, chunk.job.result, chunk.extent.segment
        count = len(chunk.pages)
        landed = chunk.pages if chunk.direct else list(_rows(chunk.stage, count, segment.page_bytes))
        arrived: Sums = np.array([xxhash.xxh3_64_intdigest(page.data) for page in landed], np.uint64)
        sound = arrived == chunk.recorded
        left = engines.hashes(chunk.stage, count) == chunk.recorded if chunk.hashed else sound
        if not sound.all():
            with self._lock:  # a page that was overwritten meanwhile is not corrupt, only gone
                still = segment.writes[extent.indices] == chunk.writes
                rotten = ~left & ~sound & still
                segment.empty(extent.indices[rotten])
            result.settle(extent.positions[~sound & ~still], Outcome.MISS)
            result.settle(extent.positions[rotten], Outcome.CORRUPT)
            if (~sound & left & still).any():
                result.fault("a page left the device whole and did not arrive so")
        if not chunk.direct:
            for row in np.flatnonzero(sound).tolist():
                np.copyto(chunk.pages[row], landed[row])
        result.moved(extent.positions[sound], arrived[sound])

    def _delete(self, job: Job) -> None:
        for extent in job.extents:
            with self._lock:
                held = extent.segment.held[extent.indices]
                extent.segment.empty(extent.indices)
            job.result.settle(extent.positions[held], Outcome.OK)
            job.result.settle(extent.positions[~held], Outcome.MISS)

    def _fail(self, chunk: Chunk, error: DriverError) -> None:
        chunk.problem = chunk.problem or str(error)
        self.counts.faults += 1
        if error.fatal:
            self._give_up(error)

    def _give_up(self, error: DriverError) -> None:
        self._lost = self._lost or f"the device was given up: {error}"
        self._fate.silent = self._fate.silent or isinstance(error, Unanswered)
        if not self._fate.reason:
            self._fate.reason = self._lost
            _log.error("%s: %s; its pages are lost, and it gets no new ones", self._driver.name, self._lost)


def _rows(stage: Stage, count: int, row_bytes: int) -> Array:
    return stage.host[: count * row_bytes].reshape(count, row_bytes)


def _sums(chunk: Chunk) -> Sums:
    """Checksums of what lies in the slots."""
    count = len(chunk.pages)
    if chunk.hashed:
        return engines.hashes(chunk.stage, count)
    rows = _rows(chunk.stage, count, chunk.extent.segment.page_bytes)
    return np.array([xxhash.xxh3_64_intdigest(row.data) for row in rows], np.uint64)
