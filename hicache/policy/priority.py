"""Priorities and a time to live, LRU among equals.

What operators ask for and engines offer (vLLM and TensorRT-LLM have retention priorities): request classes named
``low`` go first, those named ``high`` last, the others between; several names are joined by ``+``. What was not
used for ``ttl`` ticks (uses of the cache; 0: never) goes before all others, so that a priority decays instead of
holding for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ordered import OrderedPlan
from hicache.policy.records import Record
from hicache.policy.segments import SegmentedPlan, SegmentedPolicy, Tally

LOW, NORMAL, HIGH = range(3)


class PriorityPolicy(SegmentedPolicy):
    """Three LRU queues."""

    def __init__(self, low: str = "low", high: str = "high", ttl: int = 0) -> None:
        super().__init__(3)
        self.low, self.high = frozenset(low.split("+")), frozenset(high.split("+"))
        self.ttl = ttl

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        record.segment = LOW if info.cls in self.low else HIGH if info.cls in self.high else NORMAL
        record.place(record.last)

    def hit(self, run: int, now: int) -> None:
        """The youngest of its queue. O(1): a queued entry moves when it is met."""
        record = self.find(run)
        self.now = max(self.now, now)
        self.move(record, record.segment, max(now, record.rank))

    def new_plan(self) -> OrderedPlan:
        """A plan that takes what expired, then the lowest."""
        return _PriorityPlan(self)


class _PriorityPlan(SegmentedPlan):
    policy: PriorityPolicy

    def choose(self) -> Record | None:
        policy = self.policy
        if policy.ttl:
            heads = [head for head in map(self.peek, (LOW, NORMAL, HIGH)) if head is not None]
            oldest = min(heads, key=lambda head: head.key, default=None)
            if oldest is not None and oldest.rank + policy.ttl < policy.now:
                return self.take(oldest.segment)
        return self.take(LOW) or self.take(NORMAL) or self.take(HIGH)
