"""MQ over runs: several LRU queues by the logarithm of the number of uses.

Zhou, Philbin and Li, "The multi-queue replacement algorithm for second level buffer caches", USENIX ATC 2001: a run
used n times stands in queue log2(n); one that was not used for a life time goes down a queue. Victims come from the
lowest queue. Ghosts (Qout, four times the pool) keep the number of uses. Life time is counted in pages that arrive,
as a multiple of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.ordered import OrderedPlan
from hicache.policy.records import Record
from hicache.policy.segments import GHOSTS_MAX, GHOSTS_MIN, SegmentedPlan, SegmentedPolicy, Tally


class MqPolicy(SegmentedPolicy):
    """``queues``; ``life``: in turnovers of the pool; ``out``: ghosts over the pool's pages."""

    wants_ghosts = True

    def __init__(
        self, queues: int = 8, life: float = 1.0, out: float = 4.0, ghosts: int = GHOSTS_MAX
    ) -> None:
        super().__init__(queues)
        self.life, self.share, self.ghosts_max = life, out, ghosts
        self.out = GhostTable(min(ghosts, GHOSTS_MIN))

    def known(self, ghosts: Sequence[int]) -> int:
        """How many, from the first on, are in Qout."""
        return self.out.leading(ghosts)

    def next_known(self, ghosts: Sequence[int], start: int) -> int:
        """Where the first page from ``start`` on stands that is known; the end if none is."""
        return self.out.missing(ghosts, start)

    def level(self, hits: int) -> int:
        """The queue of a run used so often."""
        return min(hits.bit_length(), len(self.queues)) - 1

    def expiry(self) -> int:
        """When a run used now is to go down."""
        return self.clock + int(self.life * self.full)

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        record.hits = max(0, self.out.recall(ghosts)) + 1
        record.segment = self.level(record.hits)
        record.note = self.expiry()
        record.place(record.last)

    def hit(self, run: int, now: int) -> None:
        """The run becomes the youngest of the queue of its uses. O(log n)."""
        record = self.find(run)
        record.hits += 1
        record.note = self.expiry()
        self.move(record, self.level(record.hits), max(now, record.rank))

    def remember(self, record: Tally, ghosts: Sequence[int]) -> None:
        """Qout learns how often it was used."""
        self.out.resize(self.ghost_limit(self.share, self.ghosts_max))
        self.out.add_all(ghosts, record.hits)

    def new_plan(self) -> OrderedPlan:
        """A plan that lowers what has expired, then takes from the lowest queue."""
        return _MqPlan(self)


class _MqPlan(SegmentedPlan):
    policy: MqPolicy
    lowered = False

    def choose(self) -> Record | None:
        if not self.lowered:
            self.lowered = True
            self._lower()
        for segment in range(len(self.queues)):
            record = self.take(segment)
            if record is not None:
                return record
        return None

    def _lower(self) -> None:
        """What expired goes down one queue, once a plan."""
        policy = self.policy
        for segment in range(1, len(self.queues)):
            while (record := self.peek(segment)) is not None:
                if record.run in self.moved or record.note >= policy.clock:
                    break
                self.take(segment)
                self.put(record, segment - 1, policy.now, policy.expiry())
