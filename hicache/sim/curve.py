"""The exact hit curve of LRU for every capacity at once, in one pass (Mattson's stack distances), with numpy.

A request looks up its blocks before it touches any, then touches them deepest first: that is what leaf-first LRU over a
tree of prefixes does, as long as one request fits into the cache. The distance of a block is the number of other
blocks used since its last use; it is found in every cache that holds more than that. Distances of all blocks are
counted together, as inversions between each access and the place of the access before it.

Source: Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


class Curve:
    """Hits of every capacity. ``counts[d]``: accesses at distance d; all others were never seen before."""

    def __init__(self, counts: Ints, asked: int) -> None:
        self.asked = asked
        self._hits = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def hits(self, pages: int) -> int:
        """With room for so many pages."""
        return int(self._hits[min(max(pages, 0), len(self._hits) - 1)])

    def ratio(self, pages: int) -> float:
        """Hits over everything asked for."""
        return self.hits(pages) / self.asked if self.asked else 0.0

    @property
    def bound(self) -> float:
        """Of a cache without end."""
        return self.ratio(len(self._hits) - 1)

    def pages_for(self, ratio: float) -> int:
        """The fewest pages that reach a hit ratio; -1 where none do."""
        wanted = np.searchsorted(self._hits, ratio * self.asked - 1e-9)
        return int(wanted) if wanted < len(self._hits) else -1

    def points(self, capacities: Sequence[int]) -> list[tuple[int, float]]:
        """(pages, hit ratio) of some capacities."""
        return [(pages, self.ratio(pages)) for pages in capacities]


def lru_curve(requests: Iterable[Sequence[int]], *, counted_from: int = 0) -> Curve:
    """The curve of a trace; the first ``counted_from`` requests only warm the cache.

    ``requests``: block ids of each request in prompt order, prefix-chained.
    """
    parts: list[Any] = []
    sizes: list[int] = []
    for blocks in requests:
        parts.append(np.asarray(blocks, np.int64)[::-1])
        sizes.append(len(blocks))
    ids = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    ends = np.cumsum(np.asarray(sizes, np.int64))
    starts = np.repeat(ends - sizes, sizes) if sizes else ids
    before = previous(ids)
    seen = before >= 0
    distances = starts[seen] - before[seen] - 1 - inversions(before)[seen]
    first = int(ends[counted_from - 1]) if counted_from else 0
    kept = distances[np.flatnonzero(seen) >= first]
    return Curve(np.bincount(kept).astype(np.int64) if len(kept) else np.zeros(0, np.int64), len(ids) - first)


def previous(ids: Ints) -> Ints:
    """The place of each entry's last occurrence before it, -1 where there is none."""
    order = np.argsort(ids, kind="stable")
    found = np.full(len(ids), -1, np.int64)
    same = ids[order[1:]] == ids[order[:-1]]
    found[order[1:][same]] = order[:-1][same]
    return found


def inversions(before: Ints) -> Ints:
    """For each entry, how many earlier ones are greater. Entries other than -1 are different from each other.

    From the highest bit down, entries that agree in the bits above stand together in their order; one with the bit
    clear counts those with the bit set that stand before it. O(n log n), all in numpy.
    """
    count = len(before)
    found = np.zeros(count, np.int64)
    places = np.flatnonzero(before >= 0)  # -1 is less than all: it inverts nothing that we ask for
    values = before[places]
    for bit in range(int(count).bit_length() - 1, -1, -1):
        ones = (values >> bit) & 1
        group = values >> (bit + 1)
        starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]])) if len(group) else group
        running = np.cumsum(ones)
        base = np.repeat((running - ones)[starts], np.diff(np.append(starts, len(values))))
        clear = ones == 0
        found[places[clear]] += (running - base)[clear]
        # Within its group each clear entry moves before each set one, in the same order.
        order = np.argsort((values >> bit), kind="stable")
        values, places = values[order], places[order]
    return found
