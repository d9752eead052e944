"""Counters that a session and the service share: u64, little-endian, in a memfd that the service makes.

The memfd is sealed against shrinking and growing, so that no mapping of it can be torn; both sides write it. What a
session writes there deceives only its own transfers: a counter says when layers may be read or used, never what is
right (the answer of the call does).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading

from hicache.device.kv import FAILED, Counter
from hicache.errors import ExhaustedError, InvalidArgumentError

COUNTER_BYTES = 8
MAX_COUNTERS = 1 << 16
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Timeline:
    """One memfd of counters, mapped here. ``close`` it; counters that were handed out do nothing afterwards."""

    def __init__(self, counters: int) -> None:
        """Raises InvalidArgumentError for a number that cannot be, ExhaustedError without a descriptor or memory."""
        if not 1 <= counters <= MAX_COUNTERS:
            raise InvalidArgumentError(f"a timeline of {counters} counters", hint=f"1 to {MAX_COUNTERS}")
        self.counters = counters
        self.size_bytes = counters * COUNTER_BYTES
        self.fd = -1
        try:
            self.fd = os.memfd_create("hicache-timeline", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            os.ftruncate(self.fd, self.size_bytes)
            self._map = mmap.mmap(self.fd, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        except OSError as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise ExhaustedError(f"no memory for {counters} counters: {error}") from error
        self._values = memoryview(self._map).cast("Q")
        self._fence = threading.Lock()
        self._closed = False

    def counter(self, number: int) -> SharedCounter:
        """One of them. Raises InvalidArgumentError for one that there is not."""
        if not 0 <= number < self.counters:
            raise InvalidArgumentError(f"counter {number} of a timeline of {self.counters}")
        return SharedCounter(self, number)

    def get(self, number: int) -> int:
        """A counter as it stands; FAILED once closed. From any thread."""
        with self._fence:
            return FAILED if self._closed else self._values[number]

    def set(self, number: int, value: int) -> None:
        """Write a counter. From any thread.

        Taking the lock twice is a release and an acquire: on processors that reorder stores, too, what was written
        before is seen by whoever sees the value.
        """
        with self._fence:
            pass
        with self._fence:
            if not self._closed:
                self._values[number] = value

    def close(self) -> None:
        """Unmap it and close the descriptor; a session that mapped it keeps its mapping. Idempotent."""
        with self._fence:
            if self._closed:
                return
            self._closed = True
            self._values.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1


class SharedCounter:
    """A counter of a timeline, as ``device.kv.Counter`` has it."""

    __slots__ = ("_number", "_timeline")

    def __init__(self, timeline: Timeline, number: int) -> None:
        self._timeline = timeline
        self._number = number

    def get(self) -> int:
        """See Counter."""
        return self._timeline.get(self._number)

    def set(self, value: int) -> None:
        """See Counter."""
        self._timeline.set(self._number, value)


class Gate:
    """A counter that a transfer out of an engine waits for, until nobody is there any more to count on.

    Once ``cut``, every layer may pass: the transfer ends soon, with bytes that mean nothing. ``sound`` tells whether
    all layers were counted before that.
    """

    def __init__(self, counter: Counter, layers: int) -> None:
        self._counter = counter
        self._layers = layers
        self._whole = False
        self.reason = ""

    @property
    def sound(self) -> bool:
        """Whether what the transfer took is what the engine computed."""
        return self._whole or not self.reason

    def cut(self, reason: str) -> None:
        """Wait no longer. The first reason stays."""
        self.reason = self.reason or reason

    def get(self) -> int:
        """See Counter."""
        if self.reason:
            return FAILED
        value = self._counter.get()
        if value >= FAILED:
            self.cut("its engine gave it up")
        elif value >= self._layers:
            self._whole = True
        return value

    def set(self, value: int) -> None:
        """See Counter; nobody sets the counter of such a transfer but its engine."""
        self._counter.set(value)
