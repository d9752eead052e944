"""Segmented LRU over runs, its protected segment capped.

Karedla, Love and Wherry, "Caching strategies to improve disk system performance", IEEE Computer 27(3), 1994: what
comes goes to the probationary segment, what is hit there to the protected one; when that is over its share, its
least recently used go back to the young end of probation. Without the cap it collapses on agent traces: everything
was hit once.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ordered import OrderedPlan
from hicache.policy.records import Record
from hicache.policy.segments import SegmentedPlan, SegmentedPolicy, Tally

PROBATION, PROTECTED = 0, 1


class SlruPolicy(SegmentedPolicy):
    """Two LRU queues. ``protected``: the largest share of the pages in the second; ``uses`` that bring a run there."""

    def __init__(self, protected: float = 0.8, uses: int = 1) -> None:
        super().__init__(2)
        self.protected, self.uses = protected, uses

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        record.place(record.last)

    def hit(self, run: int, now: int) -> None:
        """The run becomes the youngest of its segment. O(log n)."""
        record = self.find(run)
        record.hits += 1
        self.move(record, PROTECTED if record.hits > self.uses else PROBATION, now)

    def new_plan(self) -> OrderedPlan:
        """A plan that brings the protected segment under its cap first."""
        return _SlruPlan(self)


class _SlruPlan(SegmentedPlan):
    policy: SlruPolicy

    def choose(self) -> Record | None:
        policy = self.policy
        while self.sizes[PROTECTED] > policy.protected * policy.full:
            record = self.take(PROTECTED)
            if record is None:
                break
            self.put(record, PROBATION, policy.now)
        return self.take(PROBATION) or self.take(PROTECTED)
