"""Transfers between host memory and host memory: slots, or rows of the ``cpu`` device's pool, and mapped memfds.

A transfer is *works*, generators that do a little and yield: whether they did something (True), or wait for a layer of
the engine's (False). A few threads step through all works in turn, so that a pack which waits, or a long load, holds
nothing else up, and the checksums of one transfer are taken while its layers are copied. Works that wait are kept
apart and looked at a few at a time, so that even thousands of them cost the others little.

    load: layer after layer over all pages | hash of every page           the transfer ends with the last of its works
    pack: layer after layer as they come, then hash of every page
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator

import numpy as np
import xxhash

from hicache.device.tasks import Indices, Task, memory_at
from hicache.device.units import CHUNK_BYTES, UnitView
from hicache.types import Outcome

THREADS = 2
#: How long a thread sleeps when all works wait for engines.
POLL_S = 500e-6
#: Of the works that wait, how many are looked at between two sleeps; and for one step of a work that does not wait.
LOOKS_A_POLL, LOOKS_A_STEP = 32, 8

Steps = Iterator[bool]


class Work:
    """One thread at a time runs it; ``done`` when it has ended."""

    __slots__ = ("done", "steps", "task")

    def __init__(self, task: Task, steps: Steps, done: Callable[[], None]) -> None:
        self.task, self.steps, self.done = task, steps, done


class HostMover:
    """``start`` and ``close`` from the owner. ``threads=0``: ``step`` does the work (tests)."""

    def __init__(self, now_ns: Callable[[], int], *, threads: int = THREADS) -> None:
        self._now_ns = now_ns
        self._works: collections.deque[Work] = collections.deque()
        self._waiting: collections.deque[Work] = collections.deque()  # whose last step found nothing to do
        self._looked = 0  # at those that wait, since another had its turn
        self._changed = threading.Condition()
        self._ending = False
        self._running = 0  # works that a thread has in hand
        self._threads = [
            threading.Thread(target=self._run, name=f"hicache-kv-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, task: Task) -> None:
        """Begin a task; it ends by ``task.finish``."""
        if task.loan is not None:
            task.fail(np.flatnonzero(~task.loan.still()).tolist(), Outcome.MISS)
        if task.pack:
            self._add(task, self._pack(task), task.finish)
            return
        done = together(2, task.finish)
        self._add(task, self._copy(task), done)
        self._add(task, self._verify(task), done)

    def verify(self, task: Task, done: Callable[[], None]) -> None:
        """Only compare a load's pages with their checksums."""
        self._add(task, self._verify(task), done)

    def sum(self, task: Task, done: Callable[[], None]) -> None:
        """Only take the checksums of a pack's pages."""
        self._add(task, self._sum(task), done)

    def _add(self, task: Task, steps: Steps, done: Callable[[], None]) -> None:
        with self._changed:
            self._works.append(Work(task, steps, done))
            self._changed.notify()

    def step(self) -> bool:
        """Take a work a little further. True if anything happened."""
        with self._changed:
            work = self._next()
            if work is None:
                return False
            self._running += 1
        going, happened = self._advance(work)
        with self._changed:
            self._running -= 1
            if going:
                (self._works if happened else self._waiting).append(work)
                self._changed.notify()
            elif not self._left:
                self._changed.notify_all()
        return happened

    def _next(self) -> Work | None:
        if self._works and (self._looked >= LOOKS_A_STEP or not self._waiting):
            self._looked = 0
            return self._works.popleft()
        self._looked += 1
        return self._waiting.popleft() if self._waiting else None

    @property
    def _left(self) -> int:
        return len(self._works) + len(self._waiting)

    def close(self) -> None:
        """End every task: those that wait for an engine, or have not begun, fail. Idempotent."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        while self._left:
            self.step()

    def _run(self) -> None:
        waits = 0
        while True:
            with self._changed:
                while not self._left:
                    if self._ending and not self._running:
                        return
                    self._changed.wait()
                if waits >= LOOKS_A_POLL or waits > self._left:
                    self._changed.wait(POLL_S)
                    waits = 0
            waits = 0 if self.step() else waits + 1

    def _advance(self, work: Work) -> tuple[bool, bool]:
        """One step: whether there are more, and whether anything happened."""
        try:
            return True, next(work.steps)
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001  a counter of somebody else's: the transfer fails, no more
            work.task.fault(f"{type(error).__name__}: {error}")
        work.done()
        return False, True

    # --- the works

    def _copy(self, task: Task) -> Steps:
        """Slots to planes."""
        if self._refused(task):
            return
        move = _Units(task, task.live())
        for layer in range(task.shape.layers):
            yield from move.layer(layer)
            task.arrived(layer + 1)

    def _verify(self, task: Task) -> Steps:
        """The pages' own bytes against their checksums; without any to compare, what they hash to."""
        if self._refused(task):
            return
        expected, rows = task.expected, task.rows
        if task.loan is not None and expected is None:
            return
        for page in task.live().tolist():
            found = _hash(task, int(rows[page]), page)
            task.checksums[page] = found
            if expected is not None and found != int(expected[page]):
                task.rotten(np.array([page]))
            yield True

    def _pack(self, task: Task) -> Steps:
        """Planes to host pages, each layer when the engine says so."""
        if self._refused(task):
            return
        move = _Units(task, np.arange(task.shape.pages, dtype=np.int64))
        for layer in range(task.shape.layers):
            while not task.ready_layer(task.shape.first + layer):
                why = self._why_ending() or task.late(self._now_ns())
                if why:
                    task.fault(why)
                    return
                yield False
            yield from move.layer(layer)
        yield from self._sum(task)

    def _sum(self, task: Task) -> Steps:
        """The checksums of pages that have landed."""
        rows = task.rows
        for page in task.live().tolist():
            task.checksums[page] = _hash(task, int(rows[page]), page)
            yield True

    def _refused(self, task: Task) -> bool:
        why = self._why_ending()
        if why:
            task.fault(why)
        return bool(why)

    def _why_ending(self) -> str:
        return "the sidecar is closing" if self._ending else ""


class _Units:
    """The units of a task: where they lie in any plane and in its page."""

    def __init__(self, task: Task, pages: Indices) -> None:
        kv, shape, rows = task.kv.kv, task.shape, task.rows
        self._task = task
        self._view = UnitView.of(kv, shape.unit_tokens)
        places = task.transfer.places[pages]
        page, unit = np.nonzero(places >= 0)
        place = places[page, unit]
        block_bytes, token_bytes = kv.strides[0] * kv.element_bytes, kv.strides[1] * kv.element_bytes
        self._engine = place // kv.block_tokens * block_bytes + place % kv.block_tokens * token_bytes
        self._page = rows[pages][page] + kv.page_offset + unit * shape.unit_bytes
        self._chunk = max(1, CHUNK_BYTES // shape.unit_bytes)

    def layer(self, layer: int) -> Steps:
        """Move one layer of the transfer, a chunk a step."""
        kv, shape = self._task.kv, self._task.shape
        per_layer, plane_bytes = kv.kv.planes_per_layer, shape.units * shape.unit_bytes
        first = (shape.first + layer) * per_layer
        for plane in range(first, first + per_layer):
            for start in range(0, len(self._page), self._chunk):
                chunk = slice(start, start + self._chunk)
                engine = self._engine[chunk] + int(kv.planes[plane])
                page = self._page[chunk] + plane * plane_bytes
                self._view.move(engine, page, pack=self._task.pack)
                yield True


def _hash(task: Task, address: int, page: int) -> int:
    if task.host:
        return int(xxhash.xxh3_64_intdigest(task.host[page].data))
    return int(xxhash.xxh3_64_intdigest(memory_at(address, task.transfer.page_bytes).data))


def together(parts: int, then: Callable[[], None]) -> Callable[[], None]:
    """To be called by each of so many parts when it has ended; calls ``then`` with the last."""
    lock = threading.Lock()

    def done() -> None:
        nonlocal parts
        with lock:
            parts -= 1
            last = not parts
        if last:
            then()

    return done
