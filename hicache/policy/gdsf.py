"""GDSF over runs, and PGDSF, whose cost knows the depth.

GDSF: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs
HPL-98-69R1: the key is uses times cost over size, plus the key of the last object evicted. A run's cost grows with
its pages as its size does, so what counts is the cost of one page. PGDSF: Jin et al., "RAGCache", 2024, where it is
the prefill time of a node after its prefix: here 1 + depth / ``attention`` times what the caller said,
``attention`` being the depth in pages at which attention costs as much as the rest. ``ghosts`` (pages, as a
multiple of the pool) keep the uses of what left; the papers have none.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.segments import GHOSTS_MAX, GHOSTS_MIN, SegmentedPolicy, Tally

_TICK_BITS = 48
_UNIT = 1 << 16


class GdsfPolicy(SegmentedPolicy):
    """Ranks by uses times the cost of a page, plus age; then by the last use."""

    def __init__(self, attention: float = 0.0, ghosts: float = 0.0) -> None:
        super().__init__()
        self.attention, self.share = attention, ghosts
        self.wants_ghosts = ghosts > 0
        self.out = GhostTable(GHOSTS_MIN)
        self.age = 0

    def known(self, ghosts: Sequence[int]) -> int:
        """How many, from the first on, it remembers."""
        return self.out.leading(ghosts)

    def rank(self, record: Tally) -> int:
        """Uses times cost, and age, and the tick below them."""
        return self.age + record.hits * record.note << _TICK_BITS | record.last

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        deep = 1.0 + info.depth / self.attention if self.attention else 1.0
        record.note = int(_UNIT * (info.cost or 1.0) * deep)
        record.hits = max(0, self.out.recall(ghosts)) + 1
        record.place(self.rank(record))

    def hit(self, run: int, now: int) -> None:
        """One use more, at the age of now. O(1): a queued entry moves when it is met."""
        record = self.find(run)
        record.hits += 1
        record.last = max(now, record.last)
        self.move(record, 0, self.rank(record))

    def remember(self, record: Tally, ghosts: Sequence[int]) -> None:
        """Keep the number of uses."""
        self.out.resize(self.ghost_limit(self.share, GHOSTS_MAX))
        self.out.add_all(ghosts, record.hits)

    def left(self, records: list[Tally]) -> None:
        """The cache is as old as what it evicts."""
        self.age = max(self.age, *(record.rank >> _TICK_BITS for record in records))


class PgdsfPolicy(GdsfPolicy):
    """GDSF with the cost of depth."""

    def __init__(self, attention: float = 64.0, ghosts: float = 0.0) -> None:
        super().__init__(attention, ghosts)
