"""Exact reuse distances: how many different blocks were used between two uses of a block.

With ``prev[i]`` the use before use i of the same block, the distance of i is the number of uses j < i with
``prev[j] <= prev[i]``, less ``prev[i] + 1`` (uses up to prev[i] all count, each other block once). First uses
always count; among the others ``prev`` has no two equal, so what is left is to count, for each, the smaller ones
before it. That is done for all at once, by splitting time in halves: an element of a right half counts the smaller
ones of its left half.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import numpy.typing as npt

Longs = npt.NDArray[np.int64]


def smaller_before(values: Longs) -> Longs:
    """For each of some different values, how many of those before it are smaller. O(n log n), no Python loop over n."""
    count = len(values)
    bits = max(count - 1, 1).bit_length()
    size = 1 << bits
    dtype: type[np.signedinteger[Any]] = np.int32 if bits < 31 else np.int64
    times: npt.NDArray[Any] = np.arange(size, dtype=dtype)
    times[:count] = np.argsort(values, kind="stable")  # padding is latest and largest: nobody counts it
    found = np.zeros(size, dtype=np.int64)
    place: npt.NDArray[Any] = np.arange(size, dtype=dtype)
    for bit in range(bits - 1, -1, -1):
        # the table is in groups of 2^(bit+1) consecutive times, each sorted by value; half of each group is "left"
        right = (times >> bit) & 1
        left = 1 - right
        group = place >> (bit + 1)
        lefts_before = np.cumsum(left, dtype=dtype) - left - (group << bit)
        mine = right.astype(bool)
        found[times[mine]] += lefts_before[mine]
        start = group << (bit + 1)
        target = np.where(mine, place - lefts_before + (1 << bit), start + lefts_before)
        moved = np.empty_like(times)
        moved[target] = times
        times = moved
    return found[:count]


class ReuseDistances:
    """Gathers uses, then knows all their distances. Memory: 8 bytes a use, at the end some 15 times that."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._prev = array("q")
        self._distances: Longs | None = None

    def add(self, blocks: array[int]) -> None:
        """Uses, in order."""
        last = self._last
        at = len(self._prev)
        self._prev.extend([last.get(block, -1) for block in blocks])
        if len(set(blocks)) == len(blocks):
            last.update(zip(blocks, range(at, at + len(blocks)), strict=True))
            return
        for offset, block in enumerate(blocks):  # a block twice in one request
            self._prev[at + offset] = last.get(block, -1)
            last[block] = at + offset

    def all(self) -> Longs:
        """The distance of each use that is not a block's first, in order."""
        if self._distances is None:
            prev = np.frombuffer(self._prev, dtype=np.int64) if self._prev else np.zeros(0, np.int64)
            again = prev >= 0
            firsts = np.cumsum(~again)[again]
            mine = prev[again]
            self._distances = firsts + smaller_before(mine) - mine - 1 if len(mine) else mine
        return self._distances

    def curve(self, unique: int) -> tuple[tuple[int, float], ...]:
        """(capacity, share of all uses whose distance is below it): what LRU of so many blocks finds."""
        uses = max(len(self._prev), 1)
        ordered = np.sort(self.all())
        capacities = sorted({max(1, round(unique ** (step / 48))) for step in range(1, 49)}) if unique else []
        return tuple(
            (capacity, float(np.searchsorted(ordered, capacity, side="left")) / uses)
            for capacity in capacities
        )
