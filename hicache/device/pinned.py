"""Host memory that the device reaches: the host tier's segments, registered in the background.

Registering faults in and pins memory, about a second for 10 GiB, so a thread does it; until a segment is registered
its pages go through a pinned buffer (*bounce*), which costs the host one copy more. Pieces are at most 64 GiB. What
the runtime refuses stays on the bounce path, and one warning says what to change.
"""

from __future__ import annotations

import bisect
import collections
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hicache.device.driver import DriverError

_log = logging.getLogger(__name__)

PIECE_BYTES = 64 << 30
ADVICE = (
    "pages there are copied once more on the host; to change that raise the limit of locked memory"
    " (`ulimit -l unlimited`, LimitMEMLOCK=infinity, docker --ulimit memlock=-1) or lower the host tier's size"
)


class Registrar(Protocol):
    """Who registers: a Driver, or a part of one."""

    def bind(self) -> None:
        """See Driver."""

    def register(self, address: int, size_bytes: int) -> None:
        """See Driver."""

    def unregister(self, address: int) -> None:
        """See Driver."""


#: Registered pieces that somebody copies from or to, which are not unregistered before they are let go.
Hold = tuple[int, ...]


class Pins:
    """Registered host memory. ``add``, ``remove`` and ``hold`` from the owner, the rest from any thread."""

    def __init__(
        self,
        driver: Registrar,
        *,
        threaded: bool = True,
        piece_bytes: int = PIECE_BYTES,
        advice: str = ADVICE,
    ) -> None:
        self._driver = driver
        self._advice = advice
        self.piece_bytes = piece_bytes
        self._pieces: tuple[tuple[int, int], ...] = ()  # (start, end), sorted; replaced whole
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._warned = False
        self._closed = self._left = False
        self._lock = threading.Lock()  # _pieces as they change, and the two below
        self._held: collections.Counter[int] = collections.Counter()
        self._waiting: list[Callable[[], None]] = []  # until something is let go
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="hicache-pin", daemon=True)
            self._thread.start()

    @property
    def registered_bytes(self) -> int:
        """Bytes that copies reach without a bounce."""
        return sum(end - start for start, end in self._pieces)

    def add(self, address: int, size_bytes: int) -> None:
        """Register memory in the background."""
        self._work.put(lambda: self._register(address, size_bytes))

    def remove(self, address: int, size_bytes: int, then: Callable[[], None]) -> None:
        """Forget memory at once; unregister it in the background, then call ``then``, which may unmap it.

        No batch with pages there may be in flight.
        """
        if self._closed:
            if not self._left:
                then()
            return
        gone = self._take(address, size_bytes)
        self._work.put(lambda: self._unregister(address, size_bytes, gone, then))

    def later(self, task: Callable[[], None]) -> None:
        """Have something done in the background that may wait for the device."""
        self._work.put(lambda: _try(task))

    def cover(self, pages: Sequence[npt.NDArray[np.uint8]]) -> bool:
        """Whether every page lies in one registered piece."""
        pieces = self._pieces
        for page in pages:
            start = page.ctypes.data
            at = bisect.bisect_right(pieces, (start, 1 << 63)) - 1
            if at < 0 or start + page.nbytes > pieces[at][1]:
                return False
        return bool(pieces)

    def hold(self, addresses: npt.NDArray[np.int64], page_bytes: int) -> Hold | None:
        """Have the pages' memory stay registered until ``let_go``, whatever ``remove`` says. None: it is not."""
        pieces = np.array(self._pieces, np.int64).reshape(-1, 2)
        at = np.searchsorted(pieces[:, 0], addresses, side="right") - 1
        if (at < 0).any() or (addresses + page_bytes > pieces[at, 1]).any():
            return None
        found = tuple(pieces[np.unique(at), 0].tolist())
        with self._lock:
            self._held.update(found)
        return found

    def let_go(self, hold: Hold) -> None:
        """Undo one ``hold``. From any thread."""
        with self._lock:
            self._held.subtract(hold)
            waiting, self._waiting = self._waiting, []
        for task in waiting:
            self._work.put(task)

    def work(self) -> None:
        """Do what is queued, on this thread; for owners without one."""
        while not self._work.empty():
            task = self._work.get()
            if task is not None:
                task()

    def close(self, *, leave: bool = False) -> None:
        """Unregister everything. No copies are in flight, nothing is held.

        ``leave``: a device may still copy: nothing is given back, and ``remove`` does not say that it may be.
        """
        self._closed, self._left = True, leave
        if leave:
            self._work.put(None)
            return
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
        self.work()
        for start, end in self._pieces:
            self._unregister(start, end - start, [(start, end)], lambda: None)
        self._pieces = ()

    def _run(self) -> None:
        self._driver.bind()
        while (task := self._work.get()) is not None:
            task()
            del task  # it may be what keeps memory mapped

    def _register(self, address: int, size_bytes: int) -> None:
        for start in range(address, address + size_bytes, self.piece_bytes):
            end = min(start + self.piece_bytes, address + size_bytes)
            try:
                self._driver.register(start, end - start)
            except DriverError as error:
                if not self._warned:
                    _log.warning(
                        "host memory was not registered with the device (%s): %s", error, self._advice
                    )
                self._warned = True
                return
            with self._lock:
                self._pieces = tuple(sorted((*self._pieces, (start, end))))

    def _take(self, address: int, size_bytes: int) -> list[tuple[int, int]]:
        """Forget the pieces there; answers them."""
        with self._lock:
            gone = [piece for piece in self._pieces if address <= piece[0] < address + size_bytes]
            self._pieces = tuple(piece for piece in self._pieces if piece not in gone)
        return gone

    def _unregister(
        self, address: int, size_bytes: int, gone: Sequence[tuple[int, int]], then: Callable[[], None]
    ) -> None:
        # what ``add`` had queued may have been registered since ``remove`` looked
        gone = [*{*gone, *self._take(address, size_bytes)}]
        with self._lock:
            if any(self._held[start] for start, _ in gone):
                self._waiting.append(lambda: self._unregister(address, size_bytes, gone, then))
                return
        for start, _ in gone:
            try:
                self._driver.unregister(start)
            except DriverError as error:
                _log.warning("host memory was not unregistered: %s", error)
        then()


def _try(task: Callable[[], None]) -> None:
    try:
        task()
    except DriverError as error:
        _log.warning("device memory was not given back: %s", error)
