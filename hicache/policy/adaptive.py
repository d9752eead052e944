"""Our own: keeps the pages whose room pays best, by what was learned of pages like them.

A run is of a kind: how often it was used (0 to 3 times after it came), how deep it begins (at the root, one page
down, deeper), if never used again how many pages came with it, and whether a prompt went another way from where it
begins and none came since. ``hazard.py`` counts when pages of each kind come back, those that have left included, and
turns that into what a page of a kind and an age is worth. ``guard.py`` weighs that order against LRU on data that it
has not seen; while it is not ahead, all worths count as equal.

A victim is the candidate that is worth least among the best that the last plan left over and about ``sample`` drawn
evenly from all; worths that differ by less than a step count as equal, and among equals the oldest goes, and of one
age the deepest: where nothing is to be learned, it is (sampled) LRU. Ages are counted in uses of the pool
(``steps.py``), so any ticks will do.

Ghosts are kept by piece, not by page: the first page's id stands for what left with it. An arriving stretch that
begins with such a page is taken for that piece, which costs one look-up; that pages behind it may differ only blurs
a statistic. Everything random comes from one seeded generator, and a plan that is aborted does not move it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import log2

from hicache.errors import ViolationError
from hicache.policy.base import Plan, RunInfo
from hicache.policy.candidates import KINDS, LCG_ADD, LCG_MASK, LCG_MUL, USES, AdaptivePlan, RunRecord
from hicache.policy.ghosts import GhostTable
from hicache.policy.guard import CELL_BITS, Guard
from hicache.policy.hazard import BUCKETS, HazardTable, bucket
from hicache.policy.steps import StepClock

_RANKS = 16  # an octave of worth
_GHOST_SHARE = 4  # ghost pieces for each run in the pool
_GHOSTS_MIN = 1024
_LOOKED_AT = 2048  # lifetimes that go on, of runs and of ghosts each, that a refresh looks at
_LOOKED_AT_ONCE = 256
_FIRST_REFRESH = 32
_REFRESH_RUNS = 1024
_DECAY_TURNS = 32  # counts are halved when that many times the pool's pages have been reused
_DECAY_PAGES_MIN = 100_000

_KIND_BITS, _USE_BITS, _SIZE_BITS, _PAGE_BITS = 6, 2, 4, 12
_PAGES_MAX = (1 << _PAGE_BITS) - 1
_BEYOND = 4 * 64 - BUCKETS  # ages that no bucket was made for count as the oldest
_LEVEL = [[0] * (BUCKETS + _BEYOND)] * KINDS  # all alike: LRU


class AdaptivePolicy:
    """Learned worth, sampled candidates."""

    wants_ghosts = True

    def __init__(self, sample: int = 24, ghosts: int = 500_000, seed: int = 1) -> None:
        self.sample = sample
        self.ghosts_max = ghosts
        self.table = HazardTable(KINDS)
        self.ghosts = GhostTable(min(ghosts, _GHOSTS_MIN))
        self.records: dict[int, RunRecord] = {}
        self.exposed: list[RunRecord] = []
        self.kept: list[RunRecord] = []  # the best that were not taken the last time
        self.state = (seed * LCG_MUL + LCG_ADD) & LCG_MASK
        self.clock = StepClock()
        self.guard = Guard()
        self.total = 0
        self.ranks = _LEVEL
        self.open_plan: AdaptivePlan | None = None
        self._all: list[RunRecord] = []
        self._learned = _LEVEL
        self._floors = _LEVEL  # the least rank up to each age: who is let go at an age does not grow older
        self._work: Iterator[None] = self._refreshes()

    def find(self, run: int) -> RunRecord:
        """The record of a run. Raises ViolationError for an unknown one."""
        record = self.records.get(run)
        if record is None:
            raise ViolationError(f"policy: run {run} is not known")
        return record

    def known(self, ghosts: Sequence[int]) -> int:
        """How many pages the ghost pieces cover that lie one behind the other from the first on."""
        count, total = 0, len(ghosts)
        while count < total and (note := self.ghosts.get(ghosts[count])) >= 0:
            count += note & _PAGES_MAX
        return min(count, total)

    def next_known(self, ghosts: Sequence[int], start: int) -> int:
        """Where the first page from ``start`` on stands that is known; the end if none is."""
        return self.ghosts.missing(ghosts, start)

    def insert(self, run: int, info: RunInfo, now: int, ghosts: Sequence[int] = ()) -> None:
        """A run has arrived, used now; if it is remembered, that ends the lifetimes of its pieces. O(1) amortised."""
        record = RunRecord(run, info.pages, info.depth, now, self.clock.tell(now))
        self._enter(record)
        self.total += info.pages
        if ghosts:
            self._return(record, ghosts)
        record.settle()
        next(self._work)

    def _return(self, record: RunRecord, ghosts: Sequence[int]) -> None:
        at, total = 0, len(ghosts)
        while at < total and (note := self.ghosts.pop(ghosts[at])) >= 0:
            pages = note & _PAGES_MAX
            note >>= _PAGE_BITS
            size = note & (1 << _SIZE_BITS) - 1
            note >>= _SIZE_BITS
            uses = note & (1 << _USE_BITS) - 1
            note >>= _USE_BITS
            kind = note & (1 << _KIND_BITS) - 1
            self.table.reuse(kind, self.clock.step - (note >> _KIND_BITS), min(pages, total - at))
            if not at:
                record.uses, record.size = min(uses + 1, USES - 1), size
            at += pages

    def hit(self, run: int, now: int) -> None:
        """A run was used: one lifetime ends and the next begins. O(1)."""
        record = self.records.get(run) or self.find(run)
        at = self.clock.tell(now)
        if now > record.last:
            record.last = now
            if at <= record.at:  # the same use
                return
            self.table.reuse(record.kind, at - record.at, record.pages)
            record.at = at
        if record.uses < USES - 1 or record.passed:
            record.uses = min(record.uses + 1, USES - 1)
            record.passed = False
            record.settle()

    def split(self, run: int, tail: int, tail_pages: int) -> None:
        """The last pages of a run have become a run of their own: hidden, with the same history. O(1)."""
        head = self.find(run)
        if not 0 < tail_pages < head.pages:
            raise ViolationError(
                f"policy: run {run} of {head.pages} pages cannot give {tail_pages} to a tail"
            )
        record = RunRecord(tail, tail_pages, head.depth + head.pages - tail_pages, head.last, head.at)
        record.uses, record.size, record.passed = head.uses, head.size, True
        record.settle()
        self._enter(record)
        head.pages -= tail_pages

    def merge(self, run: int, absorbed: int, pages: int) -> None:
        """A run has taken over the run after it; it has the later use and the more uses of the two. O(1)."""
        head, gone = self.find(run), self.find(absorbed)
        if head.pages + gone.pages != pages or head is gone:
            raise ViolationError(f"policy: runs {run} and {absorbed} do not make one of {pages} pages")
        head.uses, head.passed = max(head.uses, gone.uses), head.passed and gone.passed
        head.last, head.at = max(head.last, gone.last), max(head.at, gone.at)
        head.settle()
        head.pages = pages
        self._leave(gone)

    def hide(self, run: int) -> None:
        """The run is no candidate; idempotent. O(1)."""
        record = self.records.get(run)
        if record is None:
            raise ViolationError(f"policy: run {run} is not known")
        slot = record.slot
        if slot >= 0:
            last = self.exposed.pop()
            if last is not record:
                self.exposed[slot] = last
                last.slot = slot
            record.slot = -1

    def expose(self, run: int) -> None:
        """The run is a candidate; idempotent. O(1)."""
        record = self.find(run)
        if record.slot < 0:
            record.slot = len(self.exposed)
            self.exposed.append(record)

    def trim(self, run: int, pages: int, ghosts: Sequence[int] = ()) -> None:
        """A run has lost its last ``pages``, not all of them; it keeps its place. O(1)."""
        record = self.find(run)
        if not 0 < pages < record.pages:
            raise ViolationError(f"policy: run {run} of {record.pages} pages cannot lose {pages}")
        record.pages -= pages
        self.total -= pages
        self._remember(record, ghosts)

    def forget(self, run: int, ghosts: Sequence[int] = ()) -> None:
        """The run has left the pool. O(1)."""
        record = self.find(run)
        self.total -= record.pages
        self._remember(record, ghosts)
        self._leave(record)

    def begin(self) -> Plan:
        """Start to choose victims; a plan that was left open is aborted. O(1)."""
        if self.open_plan is not None:
            self.open_plan.abort()
        self.open_plan = AdaptivePlan(self)
        return self.open_plan

    # --- the inside

    def _enter(self, record: RunRecord) -> None:
        if record.run in self.records:
            raise ViolationError(f"policy: run {record.run} is known already")
        self.records[record.run] = record
        record.seat = len(self._all)
        self._all.append(record)

    def _leave(self, record: RunRecord) -> None:
        self.hide(record.run)
        del self.records[record.run]
        last = self._all.pop()
        if last is not record:
            self._all[record.seat] = last
            last.seat = record.seat

    def _remember(self, record: RunRecord, ghosts: Sequence[int]) -> None:
        """Keep what was evicted as one piece; the oldest pieces are lost sight of."""
        if not ghosts:
            return
        table = self.ghosts
        table.limit = min(self.ghosts_max, max(_GHOSTS_MIN, _GHOST_SHARE * len(self.records)))
        note = record.at << _KIND_BITS | record.kind
        note = (note << _USE_BITS | record.uses) << _SIZE_BITS | record.size
        for start in range(0, len(ghosts), _PAGES_MAX):
            pages = min(_PAGES_MAX, len(ghosts) - start)
            while len(table) >= table.limit and (oldest := table.take_oldest()) >= 0:
                kind, at, lost = _read(oldest)
                self.table.lose(kind, self.clock.step - at, lost)
            table.add(ghosts[start], note << _PAGE_BITS | pages)

    def _refreshes(self) -> Iterator[None]:
        """Learn what was counted, for ever: a small step for each run that comes, so that none waits for all of it."""
        arrived = 0
        while True:
            for _ in range(min(_REFRESH_RUNS, max(_FIRST_REFRESH, arrived >> 3))):
                arrived += 1
                yield
            standing: dict[int, float] = {}
            for number, (kind, age, pages) in enumerate(self._waiting()):
                cell = kind << CELL_BITS | bucket(age)
                standing[cell] = standing.get(cell, 0.0) + pages
                if not (number + 1) % _LOOKED_AT_ONCE:
                    yield
            for _ in self.guard.judge(self._floors, standing, self.table.fresh, self.total):
                yield
            if self.table.ended > max(_DECAY_PAGES_MIN, _DECAY_TURNS * self.total):
                self.table.decay(0.5)
            for _ in self.table.refresh(standing):
                yield
            for _ in self._learn():
                yield

    def _learn(self) -> Iterator[None]:
        """Ranks from worths; those of all kinds together are one list."""
        done: dict[int, tuple[list[int], list[int]]] = {}
        for row in self.table.worth:
            if id(row) not in done:
                ranks = [int(_RANKS * log2(worth)) for worth in row]
                done[id(row)] = ranks + [ranks[-1]] * _BEYOND, list(accumulate(ranks, min))
                yield
        self._learned = [done[id(row)][0] for row in self.table.worth]
        self._floors = [done[id(row)][1] for row in self.table.worth]
        self.ranks = self._learned if self.guard.leads else _LEVEL

    def _waiting(self) -> Iterator[tuple[int, int, float]]:
        """Kind, age and pages of a sample of the lifetimes that go on."""
        stride = len(self._all) // _LOOKED_AT + 1
        for record in self._all[::stride]:
            yield record.kind, self.clock.step - record.at, record.pages * stride
        stride = len(self.ghosts) // _LOOKED_AT + 1
        for note in self.ghosts.notes(stride):
            kind, at, pages = _read(note)
            yield kind, self.clock.step - at, pages * stride


def _read(note: int) -> tuple[int, int, int]:
    """Kind, last use and pages of a ghost piece."""
    pages = note & _PAGES_MAX
    note >>= _PAGE_BITS + _SIZE_BITS + _USE_BITS
    return note & (1 << _KIND_BITS) - 1, note >> _KIND_BITS, pages
