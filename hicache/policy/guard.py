"""Whether a learned order is worth following: what it would have hit next to what LRU would have, on new data.

Between two refreshes of the hazard table nothing that was counted is known to the order that was followed. So those
counts judge it. Lifetimes that go on, of residents and ghosts alike, say how many pages stand in each cell (kind and
age) at a time; the reuses say how many hits a rule gets that keeps a cell. Both rules fill the same pool with cells:
the learned one those that are worth most, and no cell behind one that it does not keep; LRU the youngest. The hits
that follow are compared, so what the estimate gets wrong it gets wrong for both.

The learned order leads only while it is ahead by a margin; from the start, and wherever there is nothing to learn,
LRU does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

_KEEP = 0.97  # of what was seen, from one judgement to the next
_AHEAD = 1.02  # of LRU's hits, to take over
_BEHIND = 1.005  # to stay
_PAGES_MIN = 300.0  # hits ahead at the least, to take over

#: A cell of the table in one number.
CELL_BITS = 8
_WIDE = 16  # bits for a cell


class Guard:
    """Decayed hits of both rules, and which of them leads."""

    def __init__(self) -> None:
        self.learned = 0.0
        self.lru = 0.0
        self.leads = False  # the learned one

    def judge(
        self,
        floors: Sequence[Sequence[int]],
        standing: Mapping[int, float],
        reused: Mapping[int, float],
        pages: int,
    ) -> Iterator[None]:
        """Weigh what was seen since the last time, in steps. O(cells log cells).

        ``floors``: for each kind the least worth up to each age, by the order that was followed; ``standing`` and
        ``reused``: pages by cell; ``pages``: what the pool holds.
        """
        mask = (1 << CELL_BITS) - 1
        reused = dict(reused)
        cells = standing.keys() | reused.keys()
        young = sorted((cell & mask) << _WIDE | cell for cell in cells)
        lru = _hits(young, standing, reused, pages)
        yield
        best = sorted(
            -floors[cell >> CELL_BITS][cell & mask] << 2 * _WIDE | (cell & mask) << _WIDE | cell
            for cell in cells
        )
        yield
        self.lru = self.lru * _KEEP + lru
        self.learned = self.learned * _KEEP + _hits(best, standing, reused, pages)
        if self.leads:
            self.leads = self.learned > _BEHIND * self.lru
        else:
            self.leads = self.learned > max(_AHEAD * self.lru, self.lru + _PAGES_MIN)


def _hits(
    order: Sequence[int], standing: Mapping[int, float], reused: Mapping[int, float], pages: float
) -> float:
    """Hits of a pool that holds cells in this order, as far as there is room; a part of the last one."""
    hits, left = 0.0, float(pages)
    for place in order:
        cell = place & (1 << _WIDE) - 1
        room = standing.get(cell, 0.0)
        if room > left:
            return hits + reused.get(cell, 0.0) * left / room
        left -= room
        hits += reused.get(cell, 0.0)
    return hits
