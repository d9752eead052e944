"""A ring of bays: the buffers and tables of copies in flight between engines' planes and slots.

A bay is used again only when the event behind its copies is ready. They are made when the first copy needs one, and
made larger, once none is in flight, for one that needs more.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses

import numpy as np

from hicache.device.driver import Addresses, Bytes, Driver, DriverError

#: In flight at a time: one is filled or emptied by the host while one is copied and one waits.
BAYS = 3
#: Entries of a bay's table: addresses of planes and rows, places of units, hashes.
WORDS = 1 << 16
LEAST_ROW_BYTES = 512


@dataclasses.dataclass(slots=True)
class Bay:
    """``host`` and ``table`` are pinned, the rest are addresses on the device. Events: begun, and over."""

    host: Bytes
    device: int
    table: Addresses
    device_table: int
    scratch: int
    begun: int
    over: int
    size_bytes: int
    used_words: int = 0

    def clear(self) -> None:
        """The table is empty."""
        self.used_words = 0

    def put(self, words: Addresses) -> int:
        """Write entries; where the device finds them once the table was sent."""
        start = self.used_words
        self.used_words += len(words)
        self.table[start : self.used_words] = words
        return self.device_table + 8 * start

    def send(self, driver: Driver, stream: int, start: int) -> None:
        """Queue the copy of the entries from ``start`` on."""
        at = 8 * start
        size = 8 * self.used_words - at
        driver.copy(stream, [self.device_table + at], [self.table_address + at], [size])

    @property
    def table_address(self) -> int:
        """Where the table lies on the host."""
        return int(self.table.ctypes.data)


class Bays:
    """The bays of one stream; its thread owns them."""

    def __init__(self, driver: Driver, size_bytes: int) -> None:
        self._driver = driver
        self._size_bytes = size_bytes
        self._free: collections.deque[Bay] = collections.deque()
        self._all: list[Bay] = []

    @property
    def size_bytes(self) -> int:
        """What a bay has room for, unless a row needs more."""
        return self._all[0].size_bytes if self._all else self._size_bytes

    def take(self, least_bytes: int) -> Bay | None:
        """A free bay of at least so many bytes; None: wait until others are given back. Raises DriverError."""
        flying = len(self._free) < len(self._all)
        if self._all and self._all[0].size_bytes < least_bytes:
            if flying:
                return None
            self.close()
            self._size_bytes = least_bytes
        if not self._free and len(self._all) < BAYS:
            try:
                self._free.append(self._make())
            except DriverError:
                if not flying:
                    raise
        if not self._free:
            return None
        bay = self._free.popleft()
        bay.clear()
        return bay

    def give_back(self, bay: Bay) -> None:
        """Nothing reads or writes it any more."""
        self._free.append(bay)

    def close(self) -> None:
        """Give the memory back; no bay is taken. A device that was lost has taken it with it."""
        for bay in self._all:
            with contextlib.suppress(DriverError):
                self._driver.release_host(bay.host)
                self._driver.release_host(bay.table.view(np.uint8))
                for address in (bay.device, bay.device_table, bay.scratch):
                    self._driver.release(address)
        self._all.clear()
        self._free.clear()

    def _make(self) -> Bay:
        size, driver = self._size_bytes, self._driver
        made: list[int] = []
        hosts: list[Bytes] = []
        try:
            for host_bytes in (size, 8 * WORDS):
                hosts.append(driver.allocate_host(host_bytes))
            for device_bytes in (size, 8 * WORDS, size // 16 + 64 * max(1, size // LEAST_ROW_BYTES)):
                made.append(driver.allocate(device_bytes))
            bay = Bay(
                hosts[0],
                made[0],
                hosts[1].view(np.int64),
                made[1],
                made[2],
                driver.event(),
                driver.event(),
                size,
            )
        except DriverError:
            for address in made:
                driver.release(address)
            for host in hosts:
                driver.release_host(host)
            raise
        self._all.append(bay)
        return bay
