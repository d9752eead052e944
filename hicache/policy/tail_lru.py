"""T-LRU: LRU that first takes what does not make the slow requests slower.

Zhang et al., "Tail-optimized caching for LLM inference", NeurIPS 2025: a prompt that can be computed within the
latency target without any cache needs none, so its pages are "free" and go first. Here a run is free if the prompt
that it ends is at most ``short`` pages long; free runs go first, LRU among them, then the others, LRU. The paper
also frees the last pages of long prompts; a run leaves from its tail, so those go first anyway when it is its turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ordered import OrderedPlan
from hicache.policy.records import Record
from hicache.policy.segments import SegmentedPlan, SegmentedPolicy, Tally


class TailLruPolicy(SegmentedPolicy):
    """Two LRU queues, by where a run ends. ``short``: pages that are computed within the target."""

    def __init__(self, short: int = 4) -> None:
        super().__init__(2)
        self.short = short

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        record.segment = int(info.depth + info.pages > self.short)
        record.place(record.last)

    def hit(self, run: int, now: int) -> None:
        """The youngest of its queue. O(1): a queued entry moves when it is met."""
        record = self.find(run)
        self.move(record, record.segment, max(now, record.rank))

    def new_plan(self) -> OrderedPlan:
        """A plan that takes what is free first."""
        return _TailLruPlan(self)


class _TailLruPlan(SegmentedPlan):
    def choose(self) -> Record | None:
        return self.take(0) or self.take(1)
