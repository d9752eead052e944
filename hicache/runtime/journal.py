"""What happened lately, under revisions: a ring that watchers read at their own pace.

A watcher that follows is a number, the next revision that it wants, and costs nothing. One that falls behind the ring
is told so and starts again with a survey; nobody ever waits for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator

from hicache.engine.actions import Announce
from hicache.errors import StaleError
from hicache.keys import KEY_BYTES

#: An entry has at most so many pages, and about so many bytes.
ENTRY_PAGES = 512
ENTRY_BYTES = 256 << 10
#: What an entry takes besides its content, about.
OVERHEAD_BYTES = 320


@dataclasses.dataclass(slots=True)
class Entry:
    """Consecutive pages that became readable in a tier, or are so no longer. ``revision`` 0: of a survey."""

    revision: int
    stored: bool
    namespace: int
    tier: int
    parent: bytes
    keys: bytes
    symbols: bytes

    @property
    def held_bytes(self) -> int:
        """What it takes in memory, about."""
        return len(self.keys) + len(self.symbols) + OVERHEAD_BYTES


class Journal:
    """The changes of one tenant's pages. ``first``: the first revision that it gives."""

    def __init__(self, first: int, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._ring: deque[Entry] = deque()
        self._held_bytes = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self.last = first - 1  # revision

    @property
    def first(self) -> int:
        """The oldest revision that is still here, or the next one."""
        return self._ring[0].revision if self._ring else self.last + 1

    def append(self, announce: Announce) -> None:
        """Write an announcement down; the oldest go. O(pages)."""
        for entry in cut(announce):
            self.last += 1
            entry.revision = self.last
            self._ring.append(entry)
            self._held_bytes += entry.held_bytes
        while self._held_bytes > self._limit_bytes and len(self._ring) > 1:
            self._held_bytes -= self._ring.popleft().held_bytes
        if self._waiting:
            self.wake()

    def since(self, revision: int, most_bytes: int) -> list[Entry]:
        """Entries from a revision on, at least one where there are any, and about ``most_bytes`` of them.

        Raises StaleError where the ring begins later, or has never come so far.
        """
        first = self.first
        if not first <= revision <= self.last + 1:
            raise StaleError(f"revision {revision} is not kept any more, or not yet there: {first} is")
        found: list[Entry] = []
        for entry in itertools.islice(self._ring, revision - first, None):
            found.append(entry)
            most_bytes -= entry.held_bytes
            if most_bytes <= 0:
                break
        return found

    async def changed(self, timeout_s: float) -> None:
        """Return when something was written, or in time."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        finally:
            self._waiting.discard(waiter)

    def wake(self) -> None:
        """Let those look who wait."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()


def cut(announce: Announce) -> Iterator[Entry]:
    """An announcement in entries of bounded size, in page order."""
    pages = len(announce.keys) // KEY_BYTES
    width = len(announce.symbols) // pages
    step = max(1, min(ENTRY_PAGES, ENTRY_BYTES // (KEY_BYTES + width)))
    parent = announce.parent
    for first in range(0, pages, step):
        keys = announce.keys[first * KEY_BYTES : (first + step) * KEY_BYTES]
        symbols = announce.symbols[first * width : (first + step) * width]
        yield Entry(0, announce.stored, announce.namespace, announce.tier, parent, keys, symbols)
        parent = keys[-KEY_BYTES:] if announce.stored else b""
