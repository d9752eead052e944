"""Copies between pages in host memory and planes on a GPU, on streams of their own.

    load   lane's thread: behind the engine's mark, layer by layer, a fence each  ─► event ─► checksums ─► lease ─► end
    store  lane's thread: each layer behind its mark, checksums on the device     ─► event ─► end

Loads and stores have a stream, a thread and a stage each; a job at a time. Pages in registered memory are read and
written there by the device; others pass through a pinned buffer, a stage's size at a time.

Where a page is proved: a load's plain pages are packed again out of the planes and hashed on the device, so what is
compared is what arrived; quantised pages are hashed in the stage. Pages of which some layers, or not all units, are
loaded are hashed on the host, as they lie there. A store's checksum is fixed on the device before the page leaves it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hicache.device import kernels
from hicache.device.copying import mapped
from hicache.device.copying.cuda_lane import Addresses, Lane, Spot, scratch_bytes
from hicache.device.copying.cuda_seam import READ_ONLY_ADVICE, CopyDriver, ReadOnly
from hicache.device.copying.cuda_slabs import Transfer, slabs
from hicache.device.copying.jobs import Handle, LoadJob, StoreJob, hash_spans
from hicache.device.copying.kv import EngineKv
from hicache.device.copying.mapped import Mapped, Memory, Using
from hicache.device.copying.ways import Choice, Ways
from hicache.device.copying.workers import Workers
from hicache.device.driver import DriverError
from hicache.device.pinned import PIECE_BYTES, Pins
from hicache.errors import UnavailableError, UnsupportedError

LOAD_PRIORITY, STORE_PRIORITY = -1, 0


class CudaCopies:
    """The Copies of planes on a GPU, or on anything that has its shape."""

    def __init__(
        self,
        kv: EngineKv,
        driver: CopyDriver,
        *,
        stage_bytes: int,
        way: str = "auto",
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        if not driver.has_kernels:
            raise UnsupportedError(f"{driver.name}: a copier needs triton", hint="pip install triton")
        self.kv = kv
        self._driver = driver
        self.mapped = Mapped(
            Pins(ReadOnly(driver), piece_bytes=piece_bytes, advice=READ_ONLY_ADVICE),
            Pins(driver, piece_bytes=piece_bytes),
        )
        make = functools.partial(Lane, kv, driver, stage_bytes=stage_bytes)
        self._load = _Loads(driver, self.mapped, functools.partial(make, priority=LOAD_PRIORITY), Ways(way))
        self._store = _Stores(
            driver, self.mapped, functools.partial(make, priority=STORE_PRIORITY), Ways(way)
        )
        self._open: weakref.WeakSet[Handle] = weakref.WeakSet()
        self._closed = False

    @property
    def choices(self) -> dict[str, dict[str, Choice]]:
        """Direction -> few or many pages -> the way they take, and its speed."""
        return {"load": self._load.ways.choices, "store": self._store.ways.choices}

    def mark(self, stream: object) -> Any:
        """See Copies. Raises UnavailableError."""
        try:
            return self._driver.mark(stream)
        except DriverError as error:
            raise UnavailableError(f"the engine's stream cannot be followed: {error}") from error

    def hold(self, stream: Any, fence: Any) -> None:
        """What an engine's stream is given from now on comes behind a fence. Raises UnavailableError."""
        try:
            self._driver.hold(stream, fence)
        except DriverError as error:
            raise UnavailableError(f"the engine's stream cannot be held: {error}") from error

    def load(self, job: LoadJob) -> None:
        """See Copies."""
        self._open.add(job.handle)
        self._load.put(job, functools.partial(job.handle.settle, job.check))

    def store(self, job: StoreJob) -> None:
        """See Copies."""
        self._open.add(job.handle)
        self._store.put(job, job.handle.go_on)

    def forget(self, memory: Memory) -> None:
        """See Copies."""
        self.mapped.forget(memory)

    def close(self) -> None:
        """See Copies."""
        if self._closed:
            return
        self._closed = True
        for handle in list(self._open):
            handle.cancel()
        self._load.close()
        self._store.close()
        self.mapped.close()
        end = threading.Thread(
            target=self._driver.close
        )  # not the engine's: it makes the device the thread's
        end.start()
        end.join()


class _Jobs:
    """One direction: a thread that does its jobs one after another."""

    def __init__(
        self, driver: CopyDriver, reached: Mapped, make_lane: Callable[[], Lane], ways: Ways
    ) -> None:
        self.ways = ways
        self._mapped = reached
        self._make_lane = make_lane
        self._made: Lane | None = None
        self._workers = Workers(type(self).__name__.strip("_").lower(), 1, begin=driver.bind)

    def put(self, job: Any, settle: Callable[[], None]) -> None:
        """Queue a job."""
        self._workers.put(functools.partial(job.handle.run, functools.partial(self._do, job), settle))

    def close(self) -> None:
        """Do what was queued, give everything back."""
        if not self._workers.closed:
            self._workers.put(lambda: self._made.close() if self._made is not None else None)
        self._workers.close()

    @property
    def _lane(self) -> Lane:
        if self._made is None:
            self._made = self._make_lane()
        return self._made

    def _do(self, job: Any) -> None:
        """A job to its end: when this returns or raises, nothing of it is under way."""
        using, clean = None, False
        try:
            lane = self._lane
            if lane.dead:
                raise UnavailableError(lane.dead)
            using = self._mapped.use(job.spans, writes=isinstance(job, StoreJob))
            self._copy(lane, job, using)
            clean = True
        except DriverError as error:
            raise UnavailableError(f"copying pages failed on the device: {error}") from error
        finally:
            if not clean and self._made is not None and not self._made.quiet():
                self._mapped.abandon()
            elif using is not None:
                self._mapped.done(using)

    def _copy(self, lane: Lane, job: Any, using: Using) -> None:
        """Queue it, wait for it, compare."""
        raise AssertionError(f"{type(self).__name__} copies nothing")

    def _way(self, lane: Lane, job: LoadJob | StoreJob, *, timed: bool) -> tuple[str, bool]:
        """The way of a plain job, and whether its time is taken: where nothing but the device is in the way."""
        timed = timed and job.pages > 0 and self.ways.measuring(job.pages)
        if timed:
            lane.start_clock()
        return self.ways.way(job.pages), timed

    def _note(self, lane: Lane, job: LoadJob | StoreJob, way: str, layers: int) -> None:
        moved_bytes = job.pages * layers * lane.kv.plane_bytes * lane.kv.planes_per_layer
        self.ways.note(job.pages, way, moved_bytes / lane.stop_clock())


class _Loads(_Jobs):
    """Pages to planes."""

    def _copy(self, lane: Lane, job: LoadJob, using: Using) -> None:
        job.check()
        pages = job.pages
        lane.begin(job.places.size + (len(job.layers) + 4) * pages + 64, _hashing(lane, pages))
        lane.follow(job.after)
        on_device, found = self._on_device(lane, job), []
        if lane.kv.codec:
            found = self._quantised(lane, job, using)
        else:
            spot = self._plain(lane, job, using)
            for first, end in _spells(on_device):
                found += _hash_planes(lane, spot.part(first, end - first))
        lane.drain()
        if job.verify:
            sums = np.zeros(pages, np.uint64)
            if on_device.any():
                sums[on_device] = np.concatenate(found).view(np.uint64)
            for first, end in _spells(~on_device):
                sums[first:end] = hash_spans(mapped.parts(job.spans, first, end - first))
            job.handle.note((np.flatnonzero(sums != job.checksums) + job.number).tolist())

    def _on_device(self, lane: Lane, job: LoadJob) -> npt.NDArray[np.bool_]:
        """Which pages' checksums are compared as they arrived."""
        fits = job.verify and kernels.can_hash(lane.kv.page_bytes)
        if lane.kv.codec or not fits:
            return np.full(job.pages, fits)
        return np.asarray((job.places >= 0).all(1) & (len(job.layers) == lane.kv.layers))

    def _plain(self, lane: Lane, job: LoadJob, using: Using) -> Spot:
        """Layer by layer. Answers where the pages lie in the planes."""
        way, timed = self._way(lane, job, timed=using.ready)
        spot = lane.spot(job.places)
        for slab in slabs(lane, job, using):
            transfer = Transfer(lane, way, spot, slab, job.layers)
            for layer in job.layers:
                job.handle.go_on()
                transfer.layer(layer, pack=False)
                if slab.end == job.pages:
                    job.handle.pass_layer(layer, lane.driver.fence(lane.stream))
        if timed:
            self._note(lane, job, way, len(job.layers))
        return spot

    def _quantised(self, lane: Lane, job: LoadJob, using: Using) -> list[Addresses]:
        """Whole pages through the stage. Answers their checksums, to be read once drained."""
        found, spot = [], lane.spot(job.places)
        size = lane.kv.page_bytes
        for slab in slabs(lane, job, using, lane.stage_bytes // size):
            job.handle.go_on()
            stage = lane.stage_rows(len(slab.at), size)
            lane.strips(stage, slab.at, size, slab.pieces)
            if job.verify and kernels.can_hash(size):
                found.append(lane.hash(stage))
            rows = lane.rows(stage)
            for layer in job.layers:
                lane.code(layer, slab.part(spot), rows, None)
                if slab.end == job.pages:
                    job.handle.pass_layer(layer, lane.driver.fence(lane.stream))
        return found


class _Stores(_Jobs):
    """Planes to pages."""

    def _copy(self, lane: Lane, job: StoreJob, using: Using) -> None:
        pages, handle = job.pages, job.handle
        lane.begin(job.places.size + (len(handle.layers) + 5) * pages + 64, _hashing(lane, pages))
        lane.follow(job.after)
        on_device = job.verify and kernels.can_hash(lane.kv.page_bytes)
        refused: list[npt.NDArray[np.int32]] = []
        if lane.kv.codec:
            found, refused = self._quantised(lane, job, using)
        else:
            spot = self._plain(lane, job, using)
            found = _hash_planes(lane, spot) if on_device else []
        lane.drain()
        if refused:
            handle.refused[:] = np.concatenate(refused) != 0
        if job.verify and pages:
            handle.checksums[:] = (
                np.concatenate(found).view(np.uint64) if on_device else hash_spans(job.spans)
            )

    def _plain(self, lane: Lane, job: StoreJob, using: Using) -> Spot:
        """Layer by layer, each when it may be read. Answers where the pages lie in the planes."""
        handle = job.handle
        way, timed = self._way(lane, job, timed=using.ready and not handle.layered)
        spot = lane.spot(job.places)
        for slab in slabs(lane, job, using):
            transfer = Transfer(lane, way, spot, slab, handle.layers)
            for layer in handle.layers:
                handle.go_on()
                lane.follow(handle.await_layer(layer))
                transfer.layer(layer, pack=True)
        if timed:
            self._note(lane, job, way, len(handle.layers))
        return spot

    def _quantised(
        self, lane: Lane, job: StoreJob, using: Using
    ) -> tuple[list[Addresses], list[npt.NDArray[np.int32]]]:
        """Whole pages through the stage. Answers checksums and which are refused, to be read once drained."""
        found: list[Addresses] = []
        refused: list[npt.NDArray[np.int32]] = []
        size, handle, spot = lane.kv.page_bytes, job.handle, lane.spot(job.places)
        for slab in slabs(lane, job, using, lane.stage_bytes // size):
            count = len(slab.at)
            stage = lane.stage_rows(count, size)
            rows, words = lane.rows(stage), -(-count // 2)
            said = lane.put(np.zeros(words, np.int64))
            for layer in handle.layers:
                handle.go_on()
                lane.follow(handle.await_layer(layer))
                lane.code(layer, slab.part(spot), rows, said)
            if job.verify and kernels.can_hash(size):
                found.append(lane.hash(stage))
            lane.strips(slab.at, stage, size, slab.pieces)
            refused.append(lane.fetch(said, words).view(np.int32)[:count])
        return found, refused


def _hashing(lane: Lane, pages: int) -> int:
    """Device memory that hashing so many pages takes, a stage's at a time."""
    size = lane.kv.page_bytes
    return scratch_bytes(min(pages, lane.stage_bytes // size), size) if kernels.can_hash(size) else 0


def _hash_planes(lane: Lane, spot: Spot) -> list[Addresses]:
    """Checksums of whole pages as they lie in the planes; to be read once drained."""
    found, size = [], lane.kv.page_bytes
    rows = lane.stage_bytes // size
    for begin in range(0, spot.pages, rows):
        stage = lane.stage_rows(min(rows, spot.pages - begin), size)
        lane.move(range(lane.kv.layers), spot.part(begin, len(stage)), lane.rows(stage), pack=True)
        found.append(lane.hash(stage))
    return found


def _spells(chosen: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of chosen pages."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    yield from ((int(first), int(end)) for first, end in edges.reshape(-1, 2))
