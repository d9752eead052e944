"""A stage as transfers use it: its table filled from the front, whatever for."""

from __future__ import annotations

import dataclasses

from hicache.device.driver import Addresses, Driver
from hicache.device.engines import Stage

#: Entries of a bay's table: addresses of planes and rows, places of units, hashes.
WORDS = 1 << 16


@dataclasses.dataclass(slots=True)
class Bay:
    """Where the copies of one chunk in flight lie. The table has ``used_words`` entries."""

    stage: Stage
    used_words: int = 0

    def put(self, words: Addresses) -> int:
        """Write entries; where the device finds them once the table was sent."""
        start = self.used_words
        self.used_words += len(words)
        self.stage.table[start : self.used_words] = words
        return self.stage.device_table + 8 * start

    def send(self, driver: Driver, stream: int, start: int) -> None:
        """Queue the copy of the entries from ``start`` on."""
        at, size = 8 * start, 8 * (self.used_words - start)
        driver.copy(stream, [self.stage.device_table + at], [self.table_address + at], [size])

    @property
    def table_address(self) -> int:
        """Where the table lies on the host."""
        return int(self.stage.table.ctypes.data)

    @property
    def host_address(self) -> int:
        """Where the pinned half lies."""
        return int(self.stage.host.ctypes.data)
