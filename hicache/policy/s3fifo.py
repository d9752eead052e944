"""S3-FIFO over runs.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023: what comes goes to S, a FIFO of a tenth
of the pool; what was used more than once there goes on to M when its turn comes, the rest leaves and is remembered
in G (as many pages as M); what comes back while remembered goes to M at once. M gives what was used another round,
as often as its counter (at most 3) says.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.ordered import OrderedPlan
from hicache.policy.records import Record
from hicache.policy.segments import GHOSTS_MAX, GHOSTS_MIN, SegmentedPlan, SegmentedPolicy, Tally

SMALL, MAIN = 0, 1
_USES_MAX = 3


class S3FifoPolicy(SegmentedPolicy):
    """``small``: share of S; ``note`` of a record is its counter of uses."""

    wants_ghosts = True

    def __init__(self, small: float = 0.1, ghosts: int = GHOSTS_MAX) -> None:
        super().__init__(2)
        self.small, self.ghosts_max = small, ghosts
        self.ghosts = GhostTable(min(ghosts, GHOSTS_MIN))
        self.arrivals = 0

    def known(self, ghosts: Sequence[int]) -> int:
        """How many, from the first on, are in G."""
        return self.ghosts.leading(ghosts)

    def next_known(self, ghosts: Sequence[int], start: int) -> int:
        """Where the first page from ``start`` on stands that is known; the end if none is."""
        return self.ghosts.missing(ghosts, start)

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        self.arrivals += 1
        record.segment = MAIN if self.ghosts.recall(ghosts) >= 0 else SMALL
        record.place(self.arrivals)

    def hit(self, run: int, now: int) -> None:
        """Its counter goes up. O(1)."""
        record = self.find(run)
        record.note = min(_USES_MAX, record.note + 1)

    def remember(self, record: Tally, ghosts: Sequence[int]) -> None:
        """G learns what left S."""
        if record.segment == SMALL:
            self.ghosts.resize(self.ghost_limit(1.0 - self.small, self.ghosts_max))
            self.ghosts.add_all(ghosts, 0)

    def new_plan(self) -> OrderedPlan:
        """A plan that promotes and reinserts on its way to a victim."""
        return _S3FifoPlan(self)


class _S3FifoPlan(SegmentedPlan):
    policy: S3FifoPolicy

    def __init__(self, policy: S3FifoPolicy) -> None:
        super().__init__(policy)
        self._arrivals = policy.arrivals

    def choose(self) -> Record | None:
        policy = self.policy
        while True:
            if self.sizes[SMALL] > policy.small * policy.full:
                record = self.take(SMALL) or self.take(MAIN)
            else:
                record = self.take(MAIN) or self.take(SMALL)
            if record is None:
                return None
            segment, note = record.segment, record.note
            if record.run in self.moved:
                segment, _, note = self.moved[record.run]
            if segment == SMALL and note > 1:
                self._again(record, 0)
            elif segment == MAIN and note > 0:
                self._again(record, note - 1)
            else:
                return record

    def _again(self, record: Tally, note: int) -> None:
        self._arrivals += 1
        self.put(record, MAIN, self._arrivals, note)

    def settle(self) -> None:
        """The moves become the policy's, and the count of arrivals with them."""
        super().settle()
        self.policy.arrivals = self._arrivals
