"""Transfers under way, and who waits for each: the loop's side of ``device.transfers``.

What ``Transfers`` tells from its own threads (an end, memory that is unmapped) is handed on by ``poll``, on the loop's
thread, each once. A transfer whose end never came ends when the desk closes.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable

from hicache.device.kv import MemoryKind, PagedKv
from hicache.device.transfers import KvHandle, Transfer, TransferDone, Transfers
from hicache.errors import HicacheError, UnavailableError
from hicache.runtime.workers import Workers
from hicache.types import Outcome

_log = logging.getLogger(__name__)

Ended = Callable[[TransferDone], None]
Opened = Callable[[KvHandle | HicacheError], None]


class TransferDesk:
    """The loop's thread owns it. ``ring``: from any thread, has ``poll`` called soon."""

    def __init__(self, transfers: Transfers, workers: Workers, ring: Callable[[], None]) -> None:
        self.transfers = transfers
        self._workers = workers
        self._ring = ring
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[int, Ended]] = {}  # transfer -> (pages, who waits)
        self._closing: dict[int, Callable[[], None]] = {}
        self._unmapped: deque[int] = deque()  # filled by any thread
        self._later: deque[Callable[[], None]] = deque()
        self._closed = False

    @property
    def in_flight(self) -> int:
        """Transfers that have not ended."""
        return len(self._waiting)

    # --- memory of engines

    def open(self, kv: PagedKv, then: Opened) -> None:
        """Map an engine's memory on a worker; its descriptors are taken over. ``then`` gets the handle, or why not."""
        begun = False

        def work() -> KvHandle | HicacheError:
            nonlocal begun
            begun = True
            try:
                return self.transfers.open_kv(kv)
            except HicacheError as error:
                return error

        def opened(result: KvHandle | HicacheError | None) -> None:
            if result is None and not begun:
                close_memories(kv)
            then(result if result is not None else UnavailableError("the memory could not be mapped"))

        self._workers.run(work, opened)

    def close_kv(self, handle: KvHandle, then: Callable[[], None]) -> None:
        """Unmap once no transfer uses it, then ``then``, on the loop's thread."""
        if self._closed:  # unmapped with everything else
            then()
            return
        number = next(self._ids)
        self._closing[number] = then

        def unmapped() -> None:
            self._unmapped.append(number)
            self._ring()

        try:
            self.transfers.close_kv(handle, unmapped)
        except HicacheError:  # they are being closed, on another thread: it goes with everything else
            self._unmapped.append(number)
            self._ring()

    # --- transfers

    def number(self) -> int:
        """For the next transfer."""
        return next(self._ids)

    def load(self, transfer: Transfer, then: Ended) -> None:
        """Start a transfer to an engine; ``then`` gets its end, later, whatever happens."""
        self._start(self.transfers.load, transfer, then)

    def pack(self, transfer: Transfer, then: Ended) -> None:
        """Start a transfer from an engine; ``then`` gets its end, later, whatever happens."""
        self._start(self.transfers.pack, transfer, then)

    def _start(self, start: Callable[[Transfer], None], transfer: Transfer, then: Ended) -> None:
        self._waiting[transfer.id] = (len(transfer.places), then)
        try:
            start(transfer)
        except HicacheError as error:
            done = _failed(transfer.id, len(transfer.places), str(error))
            self.later(lambda: self._end(done))

    def later(self, call: Callable[[], None]) -> None:
        """Have a call made by the next ``poll``."""
        self._later.append(call)
        self._ring()

    def _end(self, done: TransferDone) -> None:
        pages, then = self._waiting.pop(done.id)
        assert len(done.outcomes) == pages, "a transfer ended with other pages than it began with"
        then(done)

    def poll(self) -> int:
        """Hand out what has ended; returns how much that was."""
        ended = self.transfers.poll()
        for done in ended:
            self._end(done)
        found = len(ended)
        for _ in range(len(self._later)):
            found += 1
            self._later.popleft()()
        while self._unmapped:
            then_unmapped = self._closing.pop(self._unmapped.popleft(), None)
            found += 1
            if then_unmapped is not None:  # else told when the desk closed
                then_unmapped()
        return found

    # --- the end

    def finish(self) -> None:
        """End every transfer, unmap everything. May run on another thread while the owner does nothing with it."""
        self.transfers.close()

    def close(self) -> None:
        """After ``finish``: what has not been told is told now."""
        self._closed = True
        self.poll()
        for ident, (pages, _) in list(self._waiting.items()):
            _log.error("transfer %d did not end by itself", ident)
            self._end(_failed(ident, pages, "the service has stopped"))
        closing, self._closing = self._closing, {}
        for then in closing.values():
            then()


def close_memories(kv: PagedKv) -> None:
    """Close the descriptors of memory that nobody has mapped."""
    for memory in kv.memories:
        if memory.kind is not MemoryKind.CUDA_IPC:
            os.close(memory.fd)


def _failed(ident: int, pages: int, why: str) -> TransferDone:
    return TransferDone(ident, (Outcome.FAULT,) * pages, (0,) * pages, why)
