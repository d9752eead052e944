"""How often an id was seen, about: a count-min sketch of one byte a counter.

Cormode and Muthukrishnan, "An improved data stream summary: the count-min sketch and its applications", J.
Algorithms 55(1), 2005, with the conservative update (only the smallest counters grow) and the halving of TinyLFU.
An estimate is never below the true count since the last halvings, short of the ceiling of 255.
"""

from __future__ import annotations

_ROWS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_WORD = (1 << 64) - 1
_HALVES = bytes(count >> 1 for count in range(256))


class CountMin:
    """Four rows of ``counters`` bytes (rounded up to a power of two)."""

    __slots__ = ("_rows", "_shift")

    def __init__(self, counters: int) -> None:
        bits = max(4, (counters - 1).bit_length())
        self._shift = 64 - bits
        self._rows = [bytearray(1 << bits) for _ in _ROWS]

    def estimate(self, ghost: int) -> int:
        """How often it was seen, at least."""
        shift = self._shift
        least = 255
        for row, mix in zip(self._rows, _ROWS, strict=True):
            count = row[(ghost * mix & _WORD) >> shift]
            if count < least:
                if not count:
                    return 0  # most that are asked for are new
                least = count
        return least

    def raise_to(self, ghost: int, count: int) -> None:
        """It was seen that often, at least."""
        if count > 255:
            count = 255
        shift = self._shift
        for row, mix in zip(self._rows, _ROWS, strict=True):
            at = (ghost * mix & _WORD) >> shift
            if row[at] < count:
                row[at] = count

    def add(self, ghost: int) -> int:
        """It was seen once more; the new estimate."""
        count = self.estimate(ghost) + 1
        self.raise_to(ghost, count)
        return count

    def halve(self) -> None:
        """All counts by two. O(counters)."""
        self._rows = [row.translate(_HALVES) for row in self._rows]

    def nbytes(self) -> int:
        """What the counters take."""
        return sum(len(row) for row in self._rows)
