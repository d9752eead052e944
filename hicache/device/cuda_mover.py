"""Transfers between an engine's KV on a CUDA device and slots, in host memory or on that device.

    load, layered     strips of some layers of the slots ─► planes; the host hashes the slots meanwhile
    load, whole       pages ─► a bay, hashed there, ─► planes: where nobody waits for layers
    load from slots   slots of the device ─► planes, then hashed where they lie
    pack, layered     planes ─► strips of the slots, layers as they come; then the host hashes what landed
    pack, whole       planes ─► a bay, hashed there, ─► slots

Each direction has a lane (``kv_lane.py``); strips and engines: ``courses.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from hicache.device.courses import Course
from hicache.device.cuda import CudaDevice, Pump
from hicache.device.engines import Choice
from hicache.device.host_mover import HostMover, together
from hicache.device.imports import CudaImports, OpenKv
from hicache.device.kv import PagedKv
from hicache.device.kv_lane import KvLane, Shape
from hicache.device.tasks import Task
from hicache.types import Outcome

LOAD_PRIORITY, PACK_PRIORITY = -1, 0


class CudaMover:
    """``start``, ``step`` and ``close`` from the owner, ``open`` from any thread. ``host``: takes checksums."""

    def __init__(
        self, store: CudaDevice, host: HostMover, now_ns: Callable[[], int], *, threaded: bool
    ) -> None:
        self.store = store
        self._driver = store.driver
        self._host = host
        self._imports = CudaImports(store.driver)
        store.driver.bind()

        def lane(*, pack: bool, priority: int) -> KvLane:
            return KvLane(
                store.driver,
                now_ns,
                self._problem,
                store.patience,
                pack=pack,
                priority=priority,
                engine=store.options.copy_engine,
                bay_bytes=store.options.cuda_staging_bytes,
            )

        self._lanes = {
            False: lane(pack=False, priority=LOAD_PRIORITY),
            True: lane(pack=True, priority=PACK_PRIORITY),
        }
        self._pumps = {
            pack: Pump(f"hicache-kv-{'pack' if pack else 'load'}", each, store.driver.bind, each.pause_s)
            for pack, each in self._lanes.items()
            if threaded
        }

    def _problem(self) -> str:
        """Why the device was given up, by whomever; empty while it serves."""
        return self.store.problem or next((lane.dead for lane in self._lanes.values() if lane.dead), "")

    @property
    def _silent(self) -> bool:
        """It was given up without an answer: what it was given may still happen, so its memory stays as it is."""
        return any(lane.silent for lane in self._lanes.values())

    @property
    def uuid(self) -> bytes:
        """The device's."""
        return self._driver.uuid

    @property
    def choices(self) -> dict[Shape, Choice]:
        """What was measured so far; from any thread."""
        return {shape: choice for lane in self._lanes.values() for shape, choice in lane.choices.items()}

    def open(self, kv: PagedKv) -> OpenKv:
        """Map a region. Raises UnsupportedError."""
        opened = self._imports.open(kv)
        unmap = opened.unmap

        def careful() -> None:
            if not self._silent:  # it would wait, and what was queued may happen
                unmap()

        opened.unmap = careful
        return opened

    def start(self, task: Task) -> None:
        """Begin a task; it ends by ``task.finish``."""
        in_host = task.loan is None and task.shape.pages
        hold = self.store.pins.hold(task.rows, task.transfer.page_bytes) if in_host else None
        lane = self._lanes[task.pack]
        whole = lane.whole(task)

        def finish() -> None:
            if hold is not None and not self._silent:
                self.store.pins.let_go(hold)
            task.finish()

        then = finish
        if task.loan is not None:
            task.fail(np.flatnonzero(~task.loan.still()).tolist(), Outcome.MISS)
        elif not whole and task.pack:
            then = functools.partial(self._host.sum, task, finish)
        elif not whole:
            then = together(2, finish)
            self._host.verify(task, then)
        lane.submit(Course(task, hold, whole, then))
        if task.pack in self._pumps:
            self._pumps[task.pack].wake()

    def step(self) -> bool:
        """Without threads: do what can be done now. True if anything happened."""
        self.store.pins.work()
        return any([lane.step() for lane in self._lanes.values()])

    def end(self) -> None:
        """Packs that wait for a layer fail, and what has not begun; the rest goes on to its end."""
        for lane in self._lanes.values():
            lane.ending = "the sidecar is closing"
        for pack, pump in self._pumps.items():
            if not pump.close(self.store.patience.timeout_ns / 1e9):
                self._lanes[pack].abandon()
        while not all(lane.idle for lane in self._lanes.values()):
            self.step()

    def close(self) -> None:
        """Give the bays back; all is idle."""
        for lane in self._lanes.values():
            lane.close()
