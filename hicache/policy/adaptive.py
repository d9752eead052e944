"""Our own: keeps the pages whose room pays best, by what was learned of pages like them.

A run is of a kind: how often it was used (0 to 3 times after it came), how deep it begins (at the root, one page
down, deeper), and, if never used again, how many pages came with it. ``hazard.py`` counts when pages of each kind
come back, those that have left included, and turns that into what a page of a kind and an age is worth. A victim is
the candidate that is worth least among ``sample`` drawn from all; worths that differ by less than a step count as
equal, and among equals the oldest goes, and of one age the deepest: where nothing is to be learned, it is (sampled)
LRU.

Ghosts are kept by piece, not by page: the first page's id stands for what left with it. An arriving stretch that
begins with such a page is taken for that piece, which costs one look-up; that pages behind it may differ only blurs
a statistic. Everything random comes from one seeded generator, and a plan that is aborted does not move it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log2

from hicache.errors import ViolationError
from hicache.policy.base import Plan, RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.hazard import HazardTable

_DEPTHS = 3
_SIZES = 8
_USES = 4
KINDS = _DEPTHS * (_SIZES + _USES - 1)

_GHOST_SHARE = 4  # ghost pieces for each run in the pool
_GHOSTS_MIN = 1024
_LOOKED_AT = 2048  # lifetimes that go on, of runs and of ghosts each, that a refresh looks at
_FIRST_REFRESH = 64
_REFRESH_RUNS = 1024
_DECAY_TURNS = 32  # counts are halved when that many times the pool's pages have been reused
_DECAY_PAGES_MIN = 100_000

_LCG_MUL, _LCG_ADD, _LCG_MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1

_KIND_BITS, _USE_BITS, _SIZE_BITS, _PAGE_BITS = 6, 2, 4, 12
_PAGES_MAX = (1 << _PAGE_BITS) - 1


class _Run:
    """One run."""

    __slots__ = ("depth", "kind", "last", "pages", "run", "seat", "size", "slot", "uses")

    def __init__(self, run: int, pages: int, depth: int, last: int) -> None:
        self.run = run
        self.pages = pages
        self.depth = depth
        self.last = last
        self.uses = 0
        self.size = min(pages.bit_length(), _SIZES - 1)  # of what came together
        self.kind = 0
        self.slot = -1  # among the exposed
        self.seat = -1  # among all

    def settle(self) -> None:
        """The kind that follows from its history."""
        which = self.size if not self.uses else _SIZES - 1 + self.uses
        self.kind = which * _DEPTHS + (self.depth if self.depth < _DEPTHS else _DEPTHS - 1)


class AdaptivePolicy:
    """Learned worth, sampled candidates."""

    wants_ghosts = True

    def __init__(self, sample: int = 64, ghosts: int = 500_000, seed: int = 1) -> None:
        self.sample = sample
        self.ghosts_max = ghosts
        self.table = HazardTable(KINDS)
        self.ghosts = GhostTable(min(ghosts, _GHOSTS_MIN))
        self.records: dict[int, _Run] = {}
        self.exposed: list[_Run] = []
        self.state = (seed * _LCG_MUL + _LCG_ADD) & _LCG_MASK
        self.now = 0
        self.total = 0
        self.steps = _steps(self.table)
        self.open_plan: AdaptivePlan | None = None
        self._all: list[_Run] = []
        self._fresh = 0  # runs that came since the last refresh
        self._arrived = 0

    def find(self, run: int) -> _Run:
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
        record = _Run(run, info.pages, info.depth, now)
        self._enter(record)
        self.now = max(self.now, now)
        self.total += info.pages
        self._return(record, ghosts)
        record.settle()
        self._fresh += 1
        self._arrived += 1
        if self._fresh >= min(_REFRESH_RUNS, max(_FIRST_REFRESH, self._arrived >> 3)):
            self._refresh()

    def _return(self, record: _Run, ghosts: Sequence[int]) -> None:
        at, total = 0, len(ghosts)
        while at < total and (note := self.ghosts.pop(ghosts[at])) >= 0:
            pages = note & _PAGES_MAX
            note >>= _PAGE_BITS
            size = note & (1 << _SIZE_BITS) - 1
            note >>= _SIZE_BITS
            uses = note & (1 << _USE_BITS) - 1
            note >>= _USE_BITS
            kind = note & (1 << _KIND_BITS) - 1
            self.table.reuse(kind, self.now - (note >> _KIND_BITS), min(pages, total - at))
            if not at:
                record.uses, record.size = min(uses + 1, _USES - 1), size
            at += pages

    def hit(self, run: int, now: int) -> None:
        """A run was used: one lifetime ends and the next begins. O(1)."""
        record = self.find(run)
        if now > self.now:
            self.now = now
        if now > record.last:
            self.table.reuse(record.kind, now - record.last, record.pages)
            record.last = now
        if record.uses < _USES - 1:
            record.uses += 1
        record.settle()

    def split(self, run: int, tail: int, tail_pages: int) -> None:
        """The last pages of a run have become a run of their own: hidden, with the same history. O(1)."""
        head = self.find(run)
        if not 0 < tail_pages < head.pages:
            raise ViolationError(
                f"policy: run {run} of {head.pages} pages cannot give {tail_pages} to a tail"
            )
        record = _Run(tail, tail_pages, head.depth + head.pages - tail_pages, head.last)
        record.uses, record.size, record.kind = head.uses, head.size, head.kind
        self._enter(record)
        head.pages -= tail_pages

    def merge(self, run: int, absorbed: int, pages: int) -> None:
        """A run has taken over the run after it; it has the later use and the more uses of the two. O(1)."""
        head, gone = self.find(run), self.find(absorbed)
        if head.pages + gone.pages != pages or head is gone:
            raise ViolationError(f"policy: runs {run} and {absorbed} do not make one of {pages} pages")
        head.uses, head.last = max(head.uses, gone.uses), max(head.last, gone.last)
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

    def _enter(self, record: _Run) -> None:
        if record.run in self.records:
            raise ViolationError(f"policy: run {record.run} is known already")
        self.records[record.run] = record
        record.seat = len(self._all)
        self._all.append(record)

    def _leave(self, record: _Run) -> None:
        self.hide(record.run)
        del self.records[record.run]
        last = self._all.pop()
        if last is not record:
            self._all[record.seat] = last
            last.seat = record.seat

    def _remember(self, record: _Run, ghosts: Sequence[int]) -> None:
        """Keep what was evicted as one piece; the oldest pieces are lost sight of."""
        if not ghosts:
            return
        table = self.ghosts
        table.limit = min(self.ghosts_max, max(_GHOSTS_MIN, _GHOST_SHARE * len(self.records)))
        note = record.last << _KIND_BITS | record.kind
        note = (note << _USE_BITS | record.uses) << _SIZE_BITS | record.size
        for start in range(0, len(ghosts), _PAGES_MAX):
            pages = min(_PAGES_MAX, len(ghosts) - start)
            while len(table) >= table.limit and (oldest := table.take_oldest()) >= 0:
                kind, last, lost = _read(oldest)
                self.table.lose(kind, self.now - last, lost)
            table.add(ghosts[start], note << _PAGE_BITS | pages)

    def _refresh(self) -> None:
        """Learn what was counted. Its cost does not depend on the pool: O(1) a run that came."""
        self._fresh = 0
        if self.table.ended > max(_DECAY_PAGES_MIN, _DECAY_TURNS * self.total):
            self.table.decay(0.5)
        self.table.refresh(self._waiting())
        self.steps = _steps(self.table)

    def _waiting(self) -> Iterator[tuple[int, int, float]]:
        """Kind, age and pages of a sample of the lifetimes that go on."""
        now, stride = self.now, len(self._all) // _LOOKED_AT + 1
        for record in self._all[::stride]:
            yield record.kind, now - record.last, record.pages * stride
        stride = len(self.ghosts) // _LOOKED_AT + 1
        for note in self.ghosts.notes(stride):
            kind, last, pages = _read(note)
            yield kind, now - last, pages * stride


class AdaptivePlan:
    """Draws candidates with a generator of its own; what it takes out goes back where it was before it ends."""

    def __init__(self, policy: AdaptivePolicy) -> None:
        self._policy = policy
        self._state = policy.state
        self._taken: list[tuple[_Run, int]] = []  # and the slot that it had
        self._shown: list[_Run] = []
        self._given: set[int] = set()
        self._over = False

    def next(self) -> int | None:
        """The next victim, each run at most once; None when no candidate is left. O(sample)."""
        self._require_open()
        exposed = self._policy.exposed
        if not exposed:
            return None
        record = self._choose(exposed)
        slot, last = record.slot, exposed.pop()
        self._taken.append((record, slot))
        if last is not record:
            exposed[slot] = last
            last.slot = slot
        self._given.add(record.run)
        return record.run

    def _choose(self, exposed: list[_Run]) -> _Run:
        policy = self._policy
        steps, now, count, state = policy.steps, policy.now, len(exposed), self._state
        sample = policy.sample
        best, least, oldest = exposed[0], 1 << 60, 0
        for turn in range(min(sample, count)):
            at = turn
            if count > sample:
                state = (state * _LCG_MUL + _LCG_ADD) & _LCG_MASK
                at = (state >> 32) * count >> 32
            record = exposed[at]
            last = record.last
            age = now - last
            if age < 4:
                step = steps[record.kind][age]
            else:
                bits = age.bit_length()
                step = steps[record.kind][4 * (bits - 2) + (age >> bits - 3 & 3)]
            if step > least:
                continue
            if (
                step < least
                or last < oldest
                or (last == oldest and (record.depth, record.run) > (best.depth, best.run))
            ):
                best, least, oldest = record, step, last
        self._state = state
        return best

    def expose(self, run: int) -> None:
        """Make a hidden run a candidate for the rest of this plan; idempotent. O(1)."""
        self._require_open()
        record = self._policy.find(run)
        if record.slot < 0:
            record.slot = len(self._policy.exposed)
            self._policy.exposed.append(record)
            self._taken.append((record, -1))

    def commit(self, evicted: Sequence[int] = ()) -> None:
        """End the plan. Raises ViolationError if a run leaves that the plan did not give. O(given)."""
        self._require_open()
        leaving = frozenset(evicted)
        if not leaving <= self._given:
            raise ViolationError(f"policy: runs {sorted(leaving - self._given)} leave, which no plan gave")
        self._undo()
        self._policy.state = self._state
        for run in evicted:
            self._policy.hide(run)

    def abort(self) -> None:
        """End the plan; the policy is as if it had never begun. O(given)."""
        self._require_open()
        self._undo()

    def _undo(self) -> None:
        """Undo, last first, what taking and showing did to the list of the exposed."""
        self._over = True
        self._policy.open_plan = None
        exposed = self._policy.exposed
        for record, slot in reversed(self._taken):
            if slot < 0:  # it was shown, and stands last again
                exposed.pop()
                record.slot = -1
            elif slot == len(exposed):
                exposed.append(record)
            else:
                moved = exposed[slot]
                moved.slot = len(exposed)
                exposed.append(moved)
                exposed[slot] = record
                record.slot = slot

    def _require_open(self) -> None:
        if self._over:
            raise ViolationError("policy: this plan is over")


def _read(note: int) -> tuple[int, int, int]:
    """Kind, last use and pages of a ghost piece."""
    pages = note & _PAGES_MAX
    note >>= _PAGE_BITS + _SIZE_BITS + _USE_BITS
    return note & (1 << _KIND_BITS) - 1, note >> _KIND_BITS, pages


def _steps(table: HazardTable) -> list[list[int]]:
    """Worths in whole steps of an eighth of an octave, so that what is nearly alike counts as equal."""
    return [[int(8 * log2(worth)) for worth in row] for row in table.worth]
