"""A copy stream: one thread that runs what it is given, in order; the stand-in for a CUDA side stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Work = Callable[[], None]


class CopyStream:
    """Runs work in submission order on one thread of its own.

    Args:
        name: the thread's name.
        prepare: runs first on the thread; construction waits for it.

    Work must not raise: it reports through its own result.
    """

    def __init__(self, name: str, prepare: Work) -> None:
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        # A daemon, so that a process that forgets close() still ends.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        prepared = threading.Event()
        self._queue.put(prepare)
        self._queue.put(prepared.set)
        prepared.wait()

    def launch(self, work: Work) -> None:
        """Queue work; returns at once."""
        self._queue.put(work)

    def close(self) -> None:
        """Run what was launched, then end the thread. Called once, not from the thread itself."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            if work is None:
                return
            work()
            del work  # it holds the tensors of its segment, whose memory close_segment gives back
