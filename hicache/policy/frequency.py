"""Recency plus log-frequency, with ghosts.

The idea of LRFU (Lee et al., "LRFU: a spectrum of policies that subsumes the LRU and LFU policies", IEEE ToC
50(12), 2001), one value that weighs both, in a form that needs no re-ranking: the time of the last use plus
``weight`` turnovers of the pool for each doubling of the uses. Time is counted in pages that arrive. Ghosts
(``ghosts`` times the pool's pages) keep the uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

from hicache.policy.base import RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.segments import GHOSTS_MAX, GHOSTS_MIN, SegmentedPolicy, Tally

_TICK_BITS = 48


class FrequencyPolicy(SegmentedPolicy):
    """Ranks by the last use and the logarithm of the number of uses."""

    wants_ghosts = True

    def __init__(self, weight: float = 1.0, ghosts: float = 4.0) -> None:
        super().__init__()
        self.weight, self.share = weight, ghosts
        self.out = GhostTable(GHOSTS_MIN)

    def known(self, ghosts: Sequence[int]) -> int:
        """How many, from the first on, it remembers."""
        return self.out.leading(ghosts)

    def next_known(self, ghosts: Sequence[int], start: int) -> int:
        """Where the first page from ``start`` on stands that is known; the end if none is."""
        return self.out.missing(ghosts, start)

    def rank(self, record: Tally) -> int:
        """Time and uses, and the tick below them."""
        bonus = int(self.weight * self.full * log2(record.hits))
        return self.clock + bonus << _TICK_BITS | record.last

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        record.hits = max(0, self.out.recall(ghosts)) + 1
        record.place(self.rank(record))

    def hit(self, run: int, now: int) -> None:
        """One use more. O(log n) amortised."""
        record = self.find(run)
        record.hits += 1
        record.last = max(now, record.last)
        self.move(record, 0, self.rank(record))

    def remember(self, record: Tally, ghosts: Sequence[int]) -> None:
        """Keep the number of uses."""
        self.out.resize(self.ghost_limit(self.share, GHOSTS_MAX))
        self.out.add_all(ghosts, record.hits)
