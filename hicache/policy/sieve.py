"""SIEVE over runs (Zhang et al., "SIEVE is Simpler than LRU", NSDI'24).

The paper: a queue in order of insertion; a hit sets the visited bit and moves nothing. The hand walks from
the oldest towards the newest object and then from the oldest again. It clears the bit of a visited object
and goes on; it stops at the first that was not visited, which is evicted, and rests on the next newer one.

On runs: the queue holds all runs of the pool. Hidden ones are passed over and keep bit and place. The tail
of a split stands just before (older than) its head, with the same bit, and is looked at first if the hand
rested on the head. A run that a plan gave and that stays is not passed: if it was the last one, the hand
rests on it.

Work: the linked list gives the queue's order; where a run stands is also a number, ``rank``, counted at
insertion (pieces of one run share it; within it deeper is older). The exposed runs wait in two heaps by
that order, those that the hand has yet to reach in this round and those that it has passed; when the first
is empty the two change roles. So hidden runs cost nothing, and every step of the hand is one heap
operation, which either gives a victim or clears a bit that a hit had set.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ordered import OrderedPlan, OrderedPolicy
from hicache.policy.records import Key, Queue, Record, run_of


class SievePolicy(OrderedPolicy):
    """One hand over one queue of runs."""

    def __init__(self) -> None:
        super().__init__(queues=2)
        self.ahead = 0  # which queue the hand has yet to reach in this round
        self.hand: Record | None = None  # looked at next; None: the oldest
        self._newest: Record | None = None
        self._arrivals = 0

    def is_ahead(self, record: Record) -> bool:
        """Whether the hand has yet to reach the record in this round."""
        return self.hand is None or record.key >= self.hand.key

    def queue_of(self, record: Record) -> Queue:
        """By the side of the hand that the record is on."""
        return self.queues[self.ahead if self.is_ahead(record) else 1 - self.ahead]

    def insert(self, run: int, info: RunInfo, now: int, ghosts: Sequence[int] = ()) -> None:
        """A run has arrived: the newest, not visited, hidden. O(1)."""
        self._arrivals += 1
        record = Record(run, info.pages, info.depth, self._arrivals)
        self.add(record)
        _link(record, self._newest, None)
        self._newest = record

    def hit(self, run: int, now: int) -> None:
        """A run was used: its bit is set. O(1)."""
        self.find(run).visited = True

    def split(self, run: int, tail: int, tail_pages: int) -> None:
        """The tail stands just before its head, bit copied, hidden. O(1)."""
        super().split(run, tail, tail_pages)
        head, record = self.records[run], self.records[tail]
        _link(record, head.older, head)
        if self.hand is head:
            self.hand = record

    def forget(self, run: int, ghosts: Sequence[int] = ()) -> None:
        """The run has left; a hand that rested on it moves to the next newer. O(1) amortised."""
        record = self.find(run)
        if self.hand is record:
            self.hand = record.newer
            if self.hand is None:  # past the newest: a new round, all that was passed lies ahead
                self.ahead = 1 - self.ahead
        if self._newest is record:
            self._newest = record.older
        if record.older is not None:
            record.older.newer = record.newer
        if record.newer is not None:
            record.newer.older = record.older
        super().forget(run)

    def new_plan(self) -> OrderedPlan:
        """A plan with a hand of its own."""
        return _SievePlan(self)


class _SievePlan(OrderedPlan):
    """Walks with its own hand, side and cleared bits; the policy gets them at ``commit``.

    On each side of the hand there are the policy's queue and a heap of this plan's own: runs that it
    exposed, and runs that it passed over, which it meets again in its next round.
    """

    def __init__(self, policy: SievePolicy) -> None:
        super().__init__(policy)
        self._sieve = policy
        self._ahead = policy.ahead
        self._own: tuple[list[Key], list[Key]] = ([], [])
        self._cleared: set[int] = set()
        self._passed: Key | None = None  # the last place looked at
        self._last: Record | None = None  # the last victim

    def choose(self) -> Record | None:
        while True:
            record = self._reach()
            if record is None:
                if not self._own[1 - self._ahead] and self._sieve.queues[1 - self._ahead].peek() is None:
                    return None
                self._ahead = 1 - self._ahead
            elif record.visited and record.run not in self._cleared:
                self._cleared.add(record.run)
                heapq.heappush(self._own[1 - self._ahead], record.key)
                self._passed = record.key
            else:
                self._passed = record.key
                self._last = record
                return record

    def _reach(self) -> Record | None:
        """Take out the next candidate ahead of the hand in this round."""
        own = self._own[self._ahead]
        queue = self._sieve.queues[self._ahead]
        queued = queue.peek()
        if own and (queued is None or own[0] < queued.key):
            return self.policy.find(run_of(heapq.heappop(own)))
        if queued is not None:
            queue.pop()
            self.taken.append(queued)
        return queued

    def show(self, record: Record) -> None:
        heapq.heappush(self._own[self._ahead if self._is_ahead(record) else 1 - self._ahead], record.key)

    def _is_ahead(self, record: Record) -> bool:
        """Whether this plan's hand has yet to reach the record in its round."""
        return self._sieve.is_ahead(record) if self._passed is None else record.key > self._passed

    def settle(self) -> None:
        """The policy's hand, side and bits become this plan's.

        The hand rests on the last victim; if that leaves, it moves on when it is forgotten.
        """
        if self._last is None:
            return
        for run in self._cleared:
            self.policy.find(run).visited = False
        self._sieve.ahead = self._ahead
        self._sieve.hand = self._last


def _link(record: Record, older: Record | None, newer: Record | None) -> None:
    """Put a record between two neighbours."""
    record.older, record.newer = older, newer
    if older is not None:
        older.newer = record
    if newer is not None:
        newer.older = record
