"""W-TinyLFU over runs.

Einziger, Friedman and Manes, "TinyLFU: a highly efficient cache admission policy", ACM ToS 13(4), 2017: what comes
goes to a small LRU window. What falls out of it competes with the victim of the main cache, an SLRU: the one used
less often, by a sketch of all recent uses, leaves. A run's uses are counted in its record and written to the sketch
when it leaves; all counts are halved every ``period`` turnovers of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.ordered import OrderedPlan
from hicache.policy.records import Record
from hicache.policy.segments import SegmentedPlan, SegmentedPolicy, Tally
from hicache.policy.sketch import CountMin

WINDOW, PROBATION, PROTECTED = range(3)


class WTinyLfuPolicy(SegmentedPolicy):
    """``window`` and ``protected``: shares of the pool and of its main part; ``note``: the era a count is of."""

    wants_ghosts = True

    def __init__(
        self, window: float = 0.01, protected: float = 0.8, period: float = 10.0, counters: int = 1 << 16
    ) -> None:
        super().__init__(3)
        self.window, self.protected, self.period = window, protected, period
        self.sketch = CountMin(counters)
        self.era = 0
        self._next_era = 0

    def known(self, ghosts: Sequence[int]) -> int:
        """How many, from the first on, the sketch has seen."""
        estimate = self.sketch.estimate
        return next((at for at, ghost in enumerate(ghosts) if not estimate(ghost)), len(ghosts))

    def uses(self, record: Tally) -> int:
        """Its count, halved for every era since."""
        return record.hits >> self.era - record.note

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        self._age()
        record.hits = 1 + (self.sketch.estimate(ghosts[0]) if ghosts else 0)
        record.note = self.era
        record.place(record.last)

    def _age(self) -> None:
        if self.clock >= self._next_era:
            self._next_era = self.clock + max(1024, int(self.period * self.full))
            self.era += 1
            self.sketch.halve()

    def hit(self, run: int, now: int) -> None:
        """The youngest of its segment, or of the protected one if it was in the main part. O(log n)."""
        record = self.find(run)
        record.hits, record.note = self.uses(record) + 1, self.era
        segment = PROTECTED if record.segment == PROBATION else record.segment
        rank = now if segment != record.segment else max(now, record.rank)
        self.move(record, segment, rank)

    def remember(self, record: Tally, ghosts: Sequence[int]) -> None:
        """The sketch learns how often it was used."""
        uses = self.uses(record)
        for ghost in ghosts:
            self.sketch.raise_to(ghost, uses)

    def new_plan(self) -> OrderedPlan:
        """A plan that lets what falls out of the window compete."""
        return _WTinyLfuPlan(self)


class _WTinyLfuPlan(SegmentedPlan):
    policy: WTinyLfuPolicy

    def choose(self) -> Record | None:
        policy = self.policy
        room = policy.window * policy.full
        self._demote(policy.protected * (policy.full - room))
        while self.sizes[WINDOW] > room:
            candidate = self.peek(WINDOW)
            if candidate is None or self.sizes[WINDOW] - candidate.pages < room:
                break  # the last that is over competes
            self.take(WINDOW)
            self.put(candidate, PROBATION, policy.now)
        candidate, victim = self.peek(WINDOW), self.peek(PROBATION) or self.peek(PROTECTED)
        if candidate is None or victim is None:
            return self._main() or self.take(WINDOW)
        if policy.uses(candidate) <= policy.uses(victim):
            return self.take(WINDOW)
        self.take(WINDOW)
        self.put(candidate, PROBATION, policy.now)
        return self._main()

    def _demote(self, room: float) -> None:
        while self.sizes[PROTECTED] > room:
            record = self.take(PROTECTED)
            if record is None:
                break
            self.put(record, PROBATION, self.policy.now)

    def _main(self) -> Tally | None:
        return self.take(PROBATION) or self.take(PROTECTED)
