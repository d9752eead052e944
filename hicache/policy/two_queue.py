"""2Q over runs (the full version).

Johnson and Shasha, "2Q: a low overhead high performance buffer management replacement algorithm", VLDB 1994: what
comes goes to A1in, a FIFO of a quarter of the pool, where hits change nothing; what leaves it is remembered in
A1out (half the pool's pages). What comes back while remembered goes to Am, an LRU, which gives victims while A1in
is under its share.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.ordered import OrderedPlan
from hicache.policy.records import Record
from hicache.policy.segments import GHOSTS_MAX, GHOSTS_MIN, SegmentedPlan, SegmentedPolicy, Tally

A1IN, AM = 0, 1


class TwoQueuePolicy(SegmentedPolicy):
    """``kin``: share of A1in; ``kout``: ghosts over the pool's pages."""

    wants_ghosts = True

    def __init__(self, kin: float = 0.25, kout: float = 0.5, ghosts: int = GHOSTS_MAX) -> None:
        super().__init__(2)
        self.kin, self.kout, self.ghosts_max = kin, kout, ghosts
        self.out = GhostTable(min(ghosts, GHOSTS_MIN))
        self.arrivals = 0

    def known(self, ghosts: Sequence[int]) -> int:
        """How many, from the first on, are in A1out."""
        return self.out.leading(ghosts)

    def next_known(self, ghosts: Sequence[int], start: int) -> int:
        """Where the first page from ``start`` on stands that is known; the end if none is."""
        return self.out.missing(ghosts, start)

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        if self.out.recall(ghosts) >= 0:
            record.segment = AM
            record.place(record.last)
        else:
            self.arrivals += 1
            record.place(self.arrivals)

    def hit(self, run: int, now: int) -> None:
        """In Am the run becomes the youngest; in A1in nothing changes. O(1)."""
        record = self.find(run)
        if record.segment == AM:
            self.move(record, AM, max(now, record.rank))

    def remember(self, record: Tally, ghosts: Sequence[int]) -> None:
        """A1out learns what left A1in."""
        if record.segment == A1IN:
            self.out.resize(self.ghost_limit(self.kout, self.ghosts_max))
            self.out.add_all(ghosts, 0)

    def new_plan(self) -> OrderedPlan:
        """A plan that takes from A1in while it is over its share."""
        return _TwoQueuePlan(self)


class _TwoQueuePlan(SegmentedPlan):
    policy: TwoQueuePolicy

    def choose(self) -> Record | None:
        policy = self.policy
        if self.sizes[A1IN] > policy.kin * policy.full:
            return self.take(A1IN) or self.take(AM)
        return self.take(AM) or self.take(A1IN)
