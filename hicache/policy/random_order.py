"""Random: every candidate is as likely as any other.

The plainest baseline there is. Each exposed run has a clock that rings after an exponentially distributed time; the
first to ring goes. The distribution has no memory, so at any time the next victim is uniform over the exposed. A
run's draw follows from the seed, its id and the time, so a run repeats and an aborted plan leaves no trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from hicache.policy.base import RunInfo
from hicache.policy.records import Record
from hicache.policy.segments import SegmentedPlan, SegmentedPolicy, Tally

_UNIT = 1 << 32
_WORD = (1 << 64) - 1


def draw(seed: int, run: int, time: int) -> int:
    """When the clock of a run that is exposed at ``time`` rings."""
    word = seed * 0x9E3779B97F4A7C15 + run * 0xBF58476D1CE4E5B9 + time * 0x94D049BB133111EB & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    word ^= word >> 31
    return time + int(-log((word + 1) / (_WORD + 2)) * _UNIT)


class RandomPolicy(SegmentedPolicy):
    """Ranks by when the clock rings."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.seed = seed
        self.time = 0

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        record.place(self.time)

    def hit(self, run: int, now: int) -> None:
        """Nothing changes. O(1)."""
        self.find(run)

    def expose(self, run: int) -> None:
        """The run is a candidate, with a fresh clock; idempotent. O(log n) amortised."""
        record = self.find(run)
        if not record.exposed:
            self.move(record, 0, draw(self.seed, run, self.time))
        super().expose(run)

    def left(self, records: list[Tally]) -> None:
        """It is as late as the last clock that rang."""
        self.time = max(self.time, *(record.rank for record in records))

    def new_plan(self) -> SegmentedPlan:
        """A plan that winds the clocks of what it exposes."""
        return _RandomPlan(self)


class _RandomPlan(SegmentedPlan):
    policy: RandomPolicy

    def show(self, record: Record) -> None:
        rank = draw(self.policy.seed, record.run, self.policy.time)
        self.moved[record.run] = (0, rank, None)
        self._push(0, record.key_at(rank))
