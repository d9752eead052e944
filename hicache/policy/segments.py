"""What policies with several queues share: runs in numbered segments, and plans that move runs between them.

A policy changes a run's own place when the run is used. What the paper does to *other* objects for room's sake
(demotion from a full segment, a second chance in a queue, a promotion on the way out) is done here when victims
are sought, inside the plan, and written down at its commit. Sizes are pages, and the pool's size is that of the runs
known: victims are sought when it is full.
"""

from __future__ import annotations

import abc
import heapq
from collections.abc import Sequence
from typing import Any

from hicache.errors import ViolationError
from hicache.policy.base import Plan, RunInfo
from hicache.policy.ordered import OrderedPlan, OrderedPolicy
from hicache.policy.records import Queue, Record

#: Ghosts a policy keeps at most, whatever the size of its pool.
GHOSTS_MAX = 1_000_000

#: Below this many pages in the pool a policy keeps this many ghosts all the same.
GHOSTS_MIN = 1_024


class Tally(Record):
    """A record with its segment, its uses and a number of the policy's own."""

    __slots__ = ("hits", "last", "note", "segment")

    def __init__(self, run: int, pages: int, depth: int, rank: int) -> None:
        super().__init__(run, pages, depth, rank)
        self.segment = 0
        self.hits = 1
        self.last = 0  # when it was used
        self.note = 0

    def copy(self, run: int, pages: int, depth: int) -> Tally:
        """Another run with the same history, hidden."""
        made = Tally(run, pages, depth, self.rank)
        made.visited = self.visited
        made.segment, made.hits, made.last, made.note = self.segment, self.hits, self.last, self.note
        return made


class SegmentedPolicy(OrderedPolicy):
    """Runs in ``segments`` queues, ordered within each by rank. Subclasses place runs and say where victims are."""

    records: dict[int, Tally]  # type: ignore[assignment]  # the frame keeps what it is given

    def __init__(self, segments: int = 1) -> None:
        super().__init__(segments)
        self.sizes = [0] * segments  # pages
        self.total = 0  # pages
        self.full = 0  # pages when victims were last sought: what the pool holds when it is full
        self.clock = 0  # pages that have arrived: a time that goes as fast as the pool turns over
        self.now = 0

    def find(self, run: int) -> Tally:
        """The record of a run. Raises ViolationError for an unknown one."""
        record = self.records.get(run)
        if record is None:
            raise ViolationError(f"policy: run {run} is not known")
        return record

    def queue_of(self, record: Record) -> Queue:
        """That of its segment."""
        return self.queues[record.segment]  # type: ignore[attr-defined]  # a Tally

    def enter(self, record: Tally) -> None:
        """Know a new run, and count its pages."""
        self.add(record)
        self.sizes[record.segment] += record.pages
        self.total += record.pages
        self.clock += record.pages

    def insert(self, run: int, info: RunInfo, now: int, ghosts: Sequence[int] = ()) -> None:
        """A run has arrived, used now; it is hidden. O(log n) amortised."""
        if now > self.now:
            self.now = now
        record = Tally(run, info.pages, info.depth, 0)
        record.last = now
        self.welcome(record, info, ghosts)
        self.enter(record)

    @abc.abstractmethod
    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Give a new record its segment and rank."""

    def move(self, record: Tally, segment: int, rank: int) -> None:
        """Another place for a known run. O(1), or O(log n) if its queue must change or its key shrank."""
        if segment != record.segment:
            self.sizes[record.segment] -= record.pages
            self.sizes[segment] += record.pages
            record.segment = segment
        elif rank >= record.rank:
            record.rank = rank
            return
        record.rank = rank
        self.requeue(record)  # what stands in a queue is stale now

    def requeue(self, record: Tally) -> None:
        """Give an exposed record a fresh entry in the queue it belongs in. O(log n) amortised."""
        record.entry = None
        if record.exposed:
            queue = self.queues[record.segment]
            queue.push(record)
            queue.clean()

    def split(self, run: int, tail: int, tail_pages: int) -> None:
        """The last pages of a run have become a run of their own: hidden, with the same history. O(1)."""
        head = self.find(run)
        self.check_tail(head, tail_pages)
        self.add(head.copy(tail, tail_pages, head.depth + head.pages - tail_pages))
        head.pages -= tail_pages

    def merge(self, run: int, absorbed: int, pages: int) -> None:
        """A run has taken over the run after it: it has the better history of the two. O(log n) amortised."""
        head, gone = self.find(run), self.find(absorbed)
        self.check_merge(head, gone, pages)
        if (gone.segment, gone.rank) > (head.segment, head.rank):
            self.move(head, gone.segment, gone.rank)
            head.last, head.note = gone.last, gone.note
        head.hits = max(head.hits, gone.hits)
        head.visited |= gone.visited
        self.sizes[gone.segment] -= gone.pages
        self.sizes[head.segment] += gone.pages
        head.pages = pages
        super().forget(absorbed)

    def trim(self, run: int, pages: int, ghosts: Sequence[int] = ()) -> None:
        """A run has lost its last ``pages``, not all of them; it keeps its place. O(pages)."""
        super().trim(run, pages)
        record = self.records[run]
        self.sizes[record.segment] -= pages
        self.total -= pages
        if ghosts:
            self.remember(record, ghosts)

    def forget(self, run: int, ghosts: Sequence[int] = ()) -> None:
        """The run has left the pool. O(log n + pages) amortised."""
        record = self.find(run)
        self.sizes[record.segment] -= record.pages
        self.total -= record.pages
        super().forget(run)
        if ghosts:
            self.remember(record, ghosts)

    def remember(self, record: Tally, ghosts: Sequence[int]) -> None:
        """Pages of the record have been evicted. Nothing, unless a policy wants ghosts."""

    def ghost_limit(self, share: float, at_most: int) -> int:
        """How many ghosts ``share`` times the pool is."""
        return min(at_most, max(GHOSTS_MIN, int(share * self.full)))

    def left(self, records: list[Tally]) -> None:
        """These records are being evicted whole. Nothing, unless a policy ages."""

    def begin(self) -> Plan:
        """Start to choose victims; a plan that was left open is aborted. O(1)."""
        self.full = self.total
        return super().begin()

    def new_plan(self) -> OrderedPlan:
        """A plan that takes from segment 0."""
        return SegmentedPlan(self)


class SegmentedPlan(OrderedPlan):
    """Takes victims from the segments, with sizes and moves of its own until it is committed."""

    policy: SegmentedPolicy

    def __init__(self, policy: SegmentedPolicy) -> None:
        super().__init__(policy)
        self.sizes = list(policy.sizes)
        self.queues = policy.queues
        self.own: list[list[int]] | None = None  # a heap of keys a segment: shown or moved here
        self.moved: dict[int, tuple[int, int, Any]] = {}  # run -> segment, key, note

    def choose(self) -> Record | None:
        """The first of segment 0."""
        return self.take(0)

    def peek(self, segment: int) -> Tally | None:
        """The first candidate of a segment."""
        queued = self.queues[segment].peek()
        if self.own is not None and self.own[segment]:
            key = self.own[segment][0]
            if queued is None or key < queued.key:
                return self.policy.records[key & 0xFFFF_FFFF_FFFF_FFFF]
        return queued  # type: ignore[return-value]  # a Tally

    def take(self, segment: int) -> Tally | None:
        """Take out the first candidate of a segment."""
        queue = self.queues[segment]
        record = queue.peek()
        if (
            self.own is not None
            and self.own[segment]
            and (record is None or self.own[segment][0] < record.key)
        ):
            record = self.policy.records[heapq.heappop(self.own[segment]) & 0xFFFF_FFFF_FFFF_FFFF]
        elif record is not None:
            queue.pop()
            self.taken.append(record)
        if record is not None:
            self.sizes[segment] -= record.pages
        return record  # type: ignore[return-value]  # a Tally

    def put(self, record: Tally, segment: int, rank: int, note: Any = None) -> None:
        """Move a record that was taken out, for this plan; the policy hears of it at commit."""
        key = record.key_at(rank)
        self.moved[record.run] = (segment, rank, note)
        self._push(segment, key)
        self.sizes[segment] += record.pages

    def show(self, record: Record) -> None:
        """A candidate of its own segment."""
        self._push(record.segment, record.key)  # type: ignore[attr-defined]  # a Tally

    def _push(self, segment: int, key: int) -> None:
        if self.own is None:
            self.own = [[] for _ in self.queues]
        heapq.heappush(self.own[segment], key)

    def commit(self, evicted: Sequence[int] = ()) -> None:
        """End the plan. Raises ViolationError if a run leaves that the plan did not give. O(given log n)."""
        super().commit(evicted)
        if evicted:
            records = self.policy.records
            self.policy.left([records[run] for run in evicted])

    def settle(self) -> None:
        """The moves become the policy's."""
        records = self.policy.records
        for run, (segment, rank, note) in self.moved.items():
            record = records[run]
            self.policy.move(record, segment, rank)
            if note is not None:
                record.note = note
