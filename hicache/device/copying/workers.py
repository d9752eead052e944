"""Threads that do what they are given."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from hicache.errors import UnavailableError


class Workers:
    """Daemon threads that do what they are given, in order of arrival."""

    def __init__(self, name: str, threads: int, begin: Callable[[], None] = lambda: None) -> None:
        self._begin = begin  # what each thread does first
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"hicache-{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        self.closed = False
        for thread in self._threads:
            thread.start()

    def put(self, work: Callable[[], None]) -> None:
        """Queue some work, which must not raise. Raises UnavailableError once closed."""
        if self.closed:
            raise UnavailableError("the copier is closed")
        self._work.put(work)

    def close(self) -> None:
        """Do what was queued, end the threads. Idempotent."""
        if not self.closed:
            self.closed = True
            for _ in self._threads:
                self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        self._begin()
        while (work := self._work.get()) is not None:
            work()
            del work  # what it refers to may be memory that is to be unmapped
