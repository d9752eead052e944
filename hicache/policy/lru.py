"""LRU over runs: the run whose last hit is oldest goes first, and of runs hit by one request the deepest.

With leaves as the only candidates that is LRU over pages touched deepest first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ordered import OrderedPlan, OrderedPolicy
from hicache.policy.records import Key, Queue, Record, run_of


class LruPolicy(OrderedPolicy):
    """Ranks a run by the tick of its last hit, or of its arrival."""

    only_last_use = True

    def __init__(self) -> None:
        super().__init__(queues=1)

    def queue_of(self, record: Record) -> Queue:
        """The only one."""
        return self.queues[0]

    def insert(self, run: int, info: RunInfo, now: int, ghosts: Sequence[int] = ()) -> None:
        """A run has arrived, used now; it is hidden. O(1)."""
        self.add(Record(run, info.pages, info.depth, now))

    def hit(self, run: int, now: int) -> None:
        """A run was used. O(1): a queued entry moves when it is met."""
        record = self.records.get(run) or self.find(run)
        if now > record.rank:
            record.rank = now

    def hit_all(self, runs: Sequence[int], now: int) -> None:
        """These runs were used. O(runs)."""
        records = self.records
        for run in runs:
            record = records.get(run) or self.find(run)
            if now > record.rank:
                record.rank = now

    def first(self) -> int | None:
        """Whom a plan would give first. O(log n) amortised."""
        record = self.queues[0].peek()
        return None if record is None else record.run

    def merge(self, run: int, absorbed: int, pages: int) -> None:
        """The merged run was last used when the later used of the two was. O(1) amortised."""
        rank = self.find(absorbed).rank
        super().merge(run, absorbed, pages)
        self.hit(run, rank)

    def new_plan(self) -> OrderedPlan:
        """A plan over the one queue."""
        return _LruPlan(self)


class _LruPlan(OrderedPlan):
    """Merges the policy's queue with the runs that the plan exposes."""

    def __init__(self, policy: LruPolicy) -> None:
        super().__init__(policy)
        self._queue = policy.queues[0]
        self._shown_keys: list[Key] = []

    def choose(self) -> Record | None:
        queued = self._queue.peek()
        if self._shown_keys and (queued is None or self._shown_keys[0] < queued.key):
            return self.policy.find(run_of(heapq.heappop(self._shown_keys)))
        if queued is not None:
            self._queue.pop()
            self.taken.append(queued)
        return queued

    def show(self, record: Record) -> None:
        heapq.heappush(self._shown_keys, record.key)

    def settle(self) -> None:
        """Nothing: choosing by age changes nothing."""
