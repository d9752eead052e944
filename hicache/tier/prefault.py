"""Make segments ahead of need and fault their memory in, on a thread that gets out of everybody's way.

First touch costs about 0.9 CPU seconds a GiB; paid here, not by the first store. Nothing ever waits for this
thread: a segment can be taken while it is still being populated (MADV_POPULATE_WRITE changes no content).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import deque

from hicache.errors import HicacheError
from hicache.tier.segment import Memory

_log = logging.getLogger(__name__)

# <linux/mman.h>. Python's mmap.madvise holds the GIL, so the call goes through ctypes.
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23
_PIECE_BYTES = 16 << 20
_NICE_LOWEST = 19


class SparePool:
    """Segments of one size: ``take`` one, ``give_back`` its budget. At most ``limit`` exist at a time."""

    def __init__(self, size_bytes: int, limit: int, *, prefault: bool) -> None:
        self._size_bytes = size_bytes
        self._limit = limit
        self._made = 0
        self._spares: deque[Memory] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        if prefault:
            self._thread = threading.Thread(target=self._run, name="hicache-prefault", daemon=True)
            self._thread.start()

    def take(self) -> Memory:
        """A spare, populated ones first; a new one when there is none. Raises ExhaustedError."""
        with self._wake:
            for spare in self._spares:
                if spare.populated:
                    self._spares.remove(spare)
                    return spare
            if self._spares:
                return self._spares.popleft()
            self._made += 1
        try:
            return Memory(self._size_bytes)
        except HicacheError:
            self._forget_one()
            raise

    def give_back(self, memory: Memory) -> None:
        """Close a taken segment; a fresh one may be made in its place."""
        memory.close()
        self._forget_one()

    def _forget_one(self) -> None:
        with self._wake:
            self._made -= 1
            self._wake.notify()

    @property
    def populated_bytes(self) -> int:
        """Bytes of spare segments that are faulted in (for tests and gauges)."""
        with self._wake:
            return sum(spare.size_bytes for spare in self._spares if spare.populated)

    def close(self) -> None:
        """Stop the thread, close the spares. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        while self._spares:
            self._spares.popleft().close()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE_LOWEST)
        libc = ctypes.CDLL(None, use_errno=True)
        while True:
            with self._wake:
                while not self._stopping and self._made >= self._limit:
                    self._wake.wait()
                if self._stopping:
                    return
                self._made += 1
            try:
                memory = Memory(self._size_bytes)
            except HicacheError as exc:
                _log.warning("prefault stopped: %s", exc)
                self._forget_one()
                return
            with self._wake:
                self._spares.append(memory)
            if not self._populate(libc, memory):
                return

    def _populate(self, libc: ctypes.CDLL, memory: Memory) -> bool:
        """Fault a segment in, in pieces; False when it had to stop."""
        held = memory.bytes  # keeps the mapping while we work on it
        address = held.ctypes.data
        # Huge pages where shmem allows them; a refusal costs nothing.
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(memory.size_bytes), _MADV_HUGEPAGE)
        for offset in range(0, len(held), _PIECE_BYTES):
            if self._stopping:
                return False
            piece = min(_PIECE_BYTES, len(held) - offset)
            if libc.madvise(ctypes.c_void_p(address + offset), ctypes.c_size_t(piece), _MADV_POPULATE_WRITE):
                code = ctypes.get_errno()
                _log.warning("prefault stopped, memory is faulted in on use: %s", os.strerror(code))
                return False
        memory.populated = True
        return True
