"""LFU over runs, with dynamic ageing (LFU-DA).

Arlitt et al., "Evaluating content management techniques for Web proxy caches", PER 27(4), 2000: the key of an object
is its number of uses plus the cache's age, and the age is the key of the last object evicted; so what was popular
once goes in time. ``ageing=0`` is plain LFU. Equal keys leave least recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.segments import SegmentedPolicy, Tally

_TICK_BITS = 48


class LfuPolicy(SegmentedPolicy):
    """Ranks by uses plus age, then by the last use."""

    def __init__(self, ageing: int = 1) -> None:
        super().__init__()
        self.ageing = ageing
        self.age = 0

    def rank(self, record: Tally) -> int:
        """Uses and age, and the tick below them."""
        return record.hits + self.age << _TICK_BITS | record.last

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        record.place(self.rank(record))

    def hit(self, run: int, now: int) -> None:
        """One use more. O(1): a queued entry moves when it is met."""
        record = self.find(run)
        record.hits += 1
        record.last = max(now, record.last)
        self.move(record, 0, self.rank(record))

    def left(self, records: list[Tally]) -> None:
        """The cache is as old as what it evicts."""
        if self.ageing:
            self.age = max(self.age, *(record.rank >> _TICK_BITS for record in records))
