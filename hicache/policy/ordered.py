"""What policies that keep runs in a queue share: the records, and the frame of a plan."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from hicache.errors import ViolationError
from hicache.policy.base import Plan, RunInfo
from hicache.policy.records import Queue, Record


class OrderedPolicy(abc.ABC):
    """Records of runs in one or more queues. A subclass ranks them (``insert``, ``hit``) and makes plans."""

    wants_ghosts = False

    def __init__(self, queues: int) -> None:
        self.records: dict[int, Record] = {}
        self.queues = tuple(Queue(self.records) for _ in range(queues))
        self.open_plan: OrderedPlan | None = None

    @abc.abstractmethod
    def queue_of(self, record: Record) -> Queue:
        """The queue that the record belongs in when it is exposed."""

    @abc.abstractmethod
    def insert(self, run: int, info: RunInfo, now: int, ghosts: Sequence[int] = ()) -> None:
        """A run has arrived; it is hidden."""

    @abc.abstractmethod
    def hit(self, run: int, now: int) -> None:
        """A run was used. O(1)."""

    @abc.abstractmethod
    def new_plan(self) -> OrderedPlan:
        """A plan that looks at this policy."""

    def find(self, run: int) -> Record:
        """The record of a run. Raises ViolationError for an unknown one."""
        record = self.records.get(run)
        if record is None:
            raise ViolationError(f"policy: run {run} is not known")
        return record

    def add(self, record: Record) -> None:
        """Know a run from now on, hidden. Raises ViolationError for one that is known."""
        if record.run in self.records:
            raise ViolationError(f"policy: run {record.run} is known already")
        self.records[record.run] = record

    def give_back(self, record: Record) -> None:
        """Queue an exposed record that has no entry."""
        if record.exposed and record.entry is None:
            self.queue_of(record).push(record)

    def split(self, run: int, tail: int, tail_pages: int) -> None:
        """The last pages of a run have become a run of their own: hidden, with the same history. O(1)."""
        head = self.find(run)
        if not 0 < tail_pages < head.pages:
            raise ViolationError(
                f"policy: run {run} of {head.pages} pages cannot give {tail_pages} to a tail"
            )
        record = Record(tail, tail_pages, head.depth + head.pages - tail_pages, head.rank)
        record.visited = head.visited
        self.add(record)
        head.pages -= tail_pages

    def merge(self, run: int, absorbed: int, pages: int) -> None:
        """A run has taken over the run after it, and has ``pages`` now. O(1) amortised."""
        head, gone = self.find(run), self.find(absorbed)
        if head.pages + gone.pages != pages or run == absorbed:
            raise ViolationError(f"policy: runs {run} and {absorbed} do not make one of {pages} pages")
        head.pages = pages
        head.visited |= gone.visited
        self.forget(absorbed)

    def hide(self, run: int) -> None:
        """The run is no candidate; idempotent. O(1): its entry goes when it is met."""
        record = self.records.get(run) or self.find(run)
        record.exposed = False

    def expose(self, run: int) -> None:
        """The run is a candidate; idempotent. O(log n) amortised."""
        record = self.records.get(run) or self.find(run)
        record.exposed = True
        if record.entry is None:
            self.queue_of(record).push(record)

    def known(self, ghosts: Sequence[int]) -> int:
        """None: no ghosts here."""
        return 0

    def trim(self, run: int, pages: int, ghosts: Sequence[int] = ()) -> None:
        """A run has lost its last ``pages``, not all of them; it keeps its place. No ghosts here. O(1)."""
        record = self.find(run)
        if not 0 < pages < record.pages:
            raise ViolationError(f"policy: run {run} of {record.pages} pages cannot lose {pages}")
        record.pages -= pages

    def forget(self, run: int, ghosts: Sequence[int] = ()) -> None:
        """The run has left the pool. O(1) amortised."""
        self.find(run)
        del self.records[run]
        for queue in self.queues:
            queue.clean()

    def begin(self) -> Plan:
        """Start to choose victims; a plan that was left open is aborted. O(1)."""
        if self.open_plan is not None:
            self.open_plan.abort()
        self.open_plan = self.new_plan()
        return self.open_plan


class OrderedPlan(abc.ABC):
    """A plan takes records out of the queues and, whatever becomes of it, puts back all that stay.

    That moves entries, never a place: nothing that decides the order changes before ``commit``.
    """

    def __init__(self, policy: OrderedPolicy) -> None:
        self.policy = policy
        self.taken: list[Record] = []  # out of the queues, given to the caller or passed over
        self.given: set[int] = set()
        self.shown: set[int] = set()  # hidden in the policy, candidates here
        self.over = False

    @abc.abstractmethod
    def choose(self) -> Record | None:
        """Take out the next victim."""

    @abc.abstractmethod
    def show(self, record: Record) -> None:
        """Make a hidden record a candidate of this plan."""

    @abc.abstractmethod
    def settle(self) -> None:
        """Write down what choosing has changed in the policy, before records are put back."""

    def next(self) -> int | None:
        """The next victim, each run at most once; None when no candidate is left. O(log n) amortised."""
        if self.over:
            self._require_open()
        record = self.choose()
        if record is None:
            return None
        self.given.add(record.run)
        return record.run

    def expose(self, run: int) -> None:
        """Make a hidden run a candidate for the rest of this plan; idempotent. O(log n)."""
        if self.over:
            self._require_open()
        record = self.policy.records.get(run) or self.policy.find(run)
        if not record.exposed and run not in self.shown:
            self.shown.add(run)
            self.show(record)

    def commit(self, evicted: Sequence[int] = ()) -> None:
        """End the plan. Raises ViolationError if a run leaves that the plan did not give. O(given log n)."""
        self._require_open()
        if not self.given.issuperset(evicted):
            raise ViolationError(
                f"policy: runs {sorted(set(evicted) - self.given)} leave, which no plan gave"
            )
        for run in evicted:
            self.policy.find(run).exposed = False
        self.settle()
        self._end()

    def abort(self) -> None:
        """End the plan; the policy is as if it had never begun. O(given log n)."""
        self._require_open()
        self._end()

    def _require_open(self) -> None:
        if self.over:
            raise ViolationError("policy: this plan is over")

    def _end(self) -> None:
        self.over = True
        self.policy.open_plan = None
        for record in self.taken:
            if record.exposed and record.entry is None:
                self.policy.queue_of(record).push(record)
