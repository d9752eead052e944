"""What the adaptive policy chooses among, and how a plan of its chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hicache.errors import ViolationError

if TYPE_CHECKING:
    from hicache.policy.adaptive import AdaptivePolicy

_DEPTHS = 3
_SIZES = 8
USES = 4
_PASSED = _SIZES + USES - 1
KINDS = _DEPTHS * (_PASSED + 1)

#: Candidates that a plan leaves to the next one.
KEPT = 16
LCG_MUL, LCG_ADD, LCG_MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1


class RunRecord:
    """One run."""

    __slots__ = ("at", "depth", "kind", "last", "pages", "passed", "run", "seat", "size", "slot", "uses")

    def __init__(self, run: int, pages: int, depth: int, last: int, at: int) -> None:
        self.run = run
        self.pages = pages
        self.depth = depth
        self.last = last  # tick of the last use
        self.at = at  # step of the last use
        self.uses = 0
        self.passed = False  # a prompt went another way from here, and none came since
        self.size = min(pages.bit_length(), _SIZES - 1)  # of what came together
        self.kind = 0
        self.slot = -1  # among the exposed
        self.seat = -1  # among all

    def settle(self) -> None:
        """The kind that follows from its history."""
        which = _PASSED if self.passed else self.size if not self.uses else _SIZES - 1 + self.uses
        self.kind = which * _DEPTHS + (self.depth if self.depth < _DEPTHS else _DEPTHS - 1)


_Place = tuple[int, int, int, int, RunRecord]  # rank, last use, depth and number from the end, the record


class AdaptivePlan:
    """Draws candidates with a generator of its own; what it takes out goes back where it was before it ends."""

    def __init__(self, policy: AdaptivePolicy) -> None:
        self._policy = policy
        self._state = policy.state
        self._found: list[_Place] | None = None  # the best so far, in order
        self._taken: list[tuple[RunRecord, int]] = []  # and the slot that it had
        self._shown: list[RunRecord] = []
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
        record.slot = -1
        self._given.add(record.run)
        return record.run

    def _choose(self, exposed: list[RunRecord]) -> RunRecord:
        """The best of those kept from before and of some drawn now; the next best are kept."""
        policy = self._policy
        ranks, now, found = policy.ranks, policy.clock.step, self._found
        if found is None:
            found = sorted(_place(record, ranks, now) for record in policy.kept if record.slot >= 0)
        worst, latest = found[KEPT - 1][:2] if len(found) >= KEPT else (1 << 60, 0)
        there = {each[4] for each in found}
        stride = -(-len(exposed) // policy.sample)
        self._state = state = (self._state * LCG_MUL + LCG_ADD) & LCG_MASK
        for record in exposed[(state >> 32) * stride >> 32 :: stride]:
            age = now - record.at
            if age < 4:
                rank = ranks[record.kind][age]
            else:
                bits = age.bit_length()
                rank = ranks[record.kind][4 * (bits - 2) + (age >> bits - 3 & 3)]
            if rank > worst or (rank == worst and record.last > latest) or record in there:
                continue
            found.append((rank, record.last, -record.depth, -record.run, record))
        found.sort()
        self._found = found
        chosen = found.pop(0)[4]
        del found[KEPT:]
        return chosen

    def expose(self, run: int) -> None:
        """Make a hidden run a candidate for the rest of this plan; idempotent. O(1)."""
        self._require_open()
        record = self._policy.find(run)
        if record.slot < 0 and run not in self._given:
            record.slot = len(self._policy.exposed)
            self._policy.exposed.append(record)
            self._taken.append((record, -1))
            if self._found is not None:
                self._found.append(_place(record, self._policy.ranks, self._policy.clock.step))
                self._found.sort()

    def commit(self, evicted: Sequence[int] = ()) -> None:
        """End the plan. Raises ViolationError if a run leaves that the plan did not give. O(given)."""
        self._require_open()
        leaving = frozenset(evicted)
        if not leaving <= self._given:
            raise ViolationError(f"policy: runs {sorted(leaving - self._given)} leave, which no plan gave")
        self._undo()
        self._policy.state = self._state
        if self._found is not None:
            self._policy.kept = [place[4] for place in self._found]
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
                record.slot = slot
            else:
                moved = exposed[slot]
                moved.slot = len(exposed)
                exposed.append(moved)
                exposed[slot] = record
                record.slot = slot

    def _require_open(self) -> None:
        if self._over:
            raise ViolationError("policy: this plan is over")


def _place(record: RunRecord, ranks: list[list[int]], now: int) -> _Place:
    """The record, and where it stands in the order: the first goes first."""
    age = now - record.at
    if age < 4:
        rank = ranks[record.kind][age]
    else:
        bits = age.bit_length()
        rank = ranks[record.kind][4 * (bits - 2) + (age >> bits - 3 & 3)]
    return rank, record.last, -record.depth, -record.run, record
