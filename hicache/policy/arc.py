"""ARC over runs.

Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003: T1 holds what was used once, T2
what was used again, each an LRU; B1 and B2 remember what left them. A hit in B1 says that T1 is too small and
raises its target p, one in B2 lowers it. T1 and B1 together hold at most as many pages as the pool, all four at
most twice as many. The target moves when the run arrives, that is after room was made for it; the paper moves it
before.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.ordered import OrderedPlan
from hicache.policy.records import Record
from hicache.policy.segments import GHOSTS_MAX, SegmentedPlan, SegmentedPolicy, Tally

T1, T2 = 0, 1


class ArcPolicy(SegmentedPolicy):
    """``ghosts``: the most pages remembered, in both lists together."""

    wants_ghosts = True

    def __init__(self, ghosts: int = GHOSTS_MAX) -> None:
        super().__init__(2)
        self.ghosts_max = ghosts
        self.target = 0.0
        self.b1, self.b2 = GhostTable(ghosts), GhostTable(ghosts)

    def known(self, ghosts: Sequence[int]) -> int:
        """How many, from the first on, are in the list that the first is in."""
        return self.b1.leading(ghosts) or self.b2.leading(ghosts)

    def next_known(self, ghosts: Sequence[int], start: int) -> int:
        """Where the first page from ``start`` on stands that is known; the end if none is."""
        return min(self.b1.missing(ghosts, start), self.b2.missing(ghosts, start))

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        in_b1, in_b2 = len(self.b1), len(self.b2)
        if self.b1.recall(ghosts) >= 0:
            self.target = min(self.full, self.target + info.pages * max(1.0, in_b2 / in_b1))
            record.segment = T2
        elif self.b2.recall(ghosts) >= 0:
            self.target = max(0.0, self.target - info.pages * max(1.0, in_b1 / in_b2))
            record.segment = T2
        record.place(record.last)

    def hit(self, run: int, now: int) -> None:
        """The run becomes the youngest of T2. O(log n)."""
        self.move(self.find(run), T2, now)

    def remember(self, record: Tally, ghosts: Sequence[int]) -> None:
        """B1 or B2 learns what left T1 or T2."""
        (self.b1 if record.segment == T1 else self.b2).add_all(ghosts, 0)
        self.b1.shrink(min(self.ghosts_max, self.full - self.sizes[T1]))
        self.b2.shrink(min(self.ghosts_max, 2 * self.full - self.total) - len(self.b1))

    def new_plan(self) -> OrderedPlan:
        """A plan that takes from T1 while it is over its target."""
        return _ArcPlan(self)


class _ArcPlan(SegmentedPlan):
    policy: ArcPolicy

    def choose(self) -> Record | None:
        if self.sizes[T1] > self.policy.target:
            return self.take(T1) or self.take(T2)
        return self.take(T2) or self.take(T1)
