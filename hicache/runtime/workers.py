"""Threads that copy and hash for the loop, and the way their results come back to it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from hicache.runtime.turns import Turn
from hicache.tier.priority import background

T = TypeVar("T")

_log = logging.getLogger(__name__)


def resolve(future: asyncio.Future[T], result: T) -> None:
    """Give a future its result, unless who waited has gone."""
    if not future.done():
        future.set_result(result)


class Wake:
    """Runs ``call`` on the loop's thread soon after somebody rang, once for many rings."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.call: Callable[[], object] = lambda: None
        self._rung = False
        self._lock = threading.Lock()
        self._closed = False

    def ring(self) -> None:
        """From any thread."""
        with self._lock:
            if self._rung or self._closed:
                return
            self._rung = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        with self._lock:
            self._rung = False  # before the call: what is published from now on rings again
            if self._closed:
                return
        self.call()

    def close(self) -> None:
        """No more calls; rings are ignored. The loop may be closed afterwards."""
        with self._lock:
            self._closed = True


class Workers:
    """A few threads of low priority. Work releases the GIL in its heavy parts."""

    def __init__(self, count: int, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._done: deque[Callable[[], None]] = deque()
        self._pool = concurrent.futures.ThreadPoolExecutor(count, "hicache-copy", initializer=background)
        self._closed = False
        self.running = 0

    def run(self, work: Callable[[], T], then: Callable[[T | None], None]) -> None:
        """Do ``work`` on a worker, then ``then`` with its result on the loop's thread.

        None instead of a result: it raised, or came after ``close``.
        """
        self.running += 1
        if self._closed:
            self.deliver(lambda: then(None))
            return
        delivery: _Delivery[T] = _Delivery(self, then)
        self._pool.submit(work).add_done_callback(delivery)

    def deliver(self, call: Callable[[], None]) -> None:
        """From a worker: a result for the loop."""
        self._done.append(call)
        self._ring()

    def poll(self, turn: Turn | None = None) -> int:
        """Hand out the results that are there, or as many as a turn takes; returns how many. On the loop's thread."""
        found = 0
        while self._done:
            call = self._done.popleft()
            self.running -= 1
            found += 1
            call()
            if turn is not None and turn.over():
                break
        return found

    def close(self) -> None:
        """Finish what was given; the last results are there for ``poll``. What comes later is not done."""
        self._closed = True
        self._pool.shutdown(wait=True)


class _Delivery(Generic[T]):
    def __init__(self, workers: Workers, then: Callable[[T | None], None]) -> None:
        self._workers = workers
        self._then = then

    def __call__(self, future: concurrent.futures.Future[T]) -> None:
        error = future.exception()
        if error is not None:
            _log.error("a copy failed: %r", error, exc_info=error)
        result = None if error is not None else future.result()
        self._workers.deliver(lambda: self._then(result))
