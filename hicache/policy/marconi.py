"""Recency and compute saved per byte, after Marconi.

Pan et al., "Marconi: prefix caching for the era of hybrid LLMs", MLSys 2025: a node's utility is its recency plus
``alpha`` times the FLOPs that reusing it saves for each byte it takes, both scaled to [0, 1]. Here recency is the
time of the last use in turnovers of the pool; the FLOPs of a page grow with its depth by attention, and saved FLOPs
per byte are scaled by ``d / (d + attention)``, ``attention`` being the depth in pages at which attention costs as
much as the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.segments import SegmentedPolicy, Tally

_TICK_BITS = 48


class MarconiPolicy(SegmentedPolicy):
    """Ranks by the last use and the depth."""

    def __init__(self, alpha: float = 0.5, attention: float = 64.0) -> None:
        super().__init__()
        self.alpha, self.attention = alpha, attention

    def rank(self, record: Tally) -> int:
        """Time and savings, and the tick below them."""
        saved = record.depth / (record.depth + self.attention)
        return self.clock + int(self.alpha * self.full * saved) << _TICK_BITS | record.last

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        record.place(self.rank(record))

    def hit(self, run: int, now: int) -> None:
        """Used now. O(log n) amortised."""
        record = self.find(run)
        record.last = max(now, record.last)
        self.move(record, 0, self.rank(record))
