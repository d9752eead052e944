"""Workload-aware: reuse by request class and turn, with exponential reuse times.

Wang et al., "KVCache cache in the wild: characterizing and optimizing KVCache cache at a large cloud provider",
USENIX ATC 2025: requests of one category (class, and whether first or later turn) are reused alike, with
exponentially distributed reuse times. A run's priority is the chance that it is used within the next ``life``
turnovers of the pool given its age, by its category's record so far; the least likely goes first, of equals the
deepest. Within a category that is LRU, so only the heads are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

from hicache.policy.base import RunInfo
from hicache.policy.ghosts import GhostTable
from hicache.policy.ordered import OrderedPlan
from hicache.policy.records import Record
from hicache.policy.segments import GHOSTS_MAX, GHOSTS_MIN, SegmentedPlan, SegmentedPolicy, Tally

_CLASSES = 8
_CATEGORIES = 2 * _CLASSES
_DOUBT = 8.0  # arrivals that the first estimate weighs


class WorkloadPolicy(SegmentedPolicy):
    """One LRU queue for each category; ``note`` is the clock (pages that arrived) at the last use."""

    wants_ghosts = True

    def __init__(self, life: float = 1.0, ghosts: float = 2.0) -> None:
        super().__init__(_CATEGORIES)
        self.life, self.share = life, ghosts
        self.out = GhostTable(GHOSTS_MIN)
        self.starts = [0] * _CATEGORIES  # uses after which a reuse could come
        self.reuses = [0] * _CATEGORIES
        self.waits = [0] * _CATEGORIES  # sum of reuse times
        self._classes: dict[str, int] = {}

    def category(self, info: RunInfo) -> int:
        """Of a class and turn; classes beyond the first few share one."""
        index = self._classes.get(info.cls)
        if index is None:
            index = min(len(self._classes), _CLASSES - 1)
            if index < _CLASSES - 1:
                self._classes[info.cls] = index
        return 2 * index + (info.turn > 1 or (not info.turn and info.depth > 0))

    def known(self, ghosts: Sequence[int]) -> int:
        """How many, from the first on, it remembers."""
        return self.out.leading(ghosts)

    def next_known(self, ghosts: Sequence[int], start: int) -> int:
        """Where the first page from ``start`` on stands that is known; the end if none is."""
        return self.out.missing(ghosts, start)

    def learn(self, category: int, wait: int) -> None:
        """A page of a category was used again after so long."""
        self.reuses[category] += 1
        self.waits[category] += wait

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        note = self.out.recall(ghosts)
        if note >= 0:
            self.learn(note % _CATEGORIES, self.clock - note // _CATEGORIES)
        record.segment = self.category(info)
        self.starts[record.segment] += 1
        record.note = self.clock
        record.place(record.last)

    def hit(self, run: int, now: int) -> None:
        """Used again. O(1): a queued entry moves when it is met."""
        record = self.find(run)
        self.learn(record.segment, self.clock - record.note)
        self.starts[record.segment] += 1
        record.note = self.clock
        self.move(record, record.segment, max(now, record.rank))

    def chance(self, record: Tally) -> float:
        """That it is used within the next ``life`` turnovers."""
        at = record.segment
        full = max(1, self.full)
        share = (self.reuses[at] + _DOUBT / 2) / (self.starts[at] + _DOUBT)
        mean = (self.waits[at] + _DOUBT * full) / (self.reuses[at] + _DOUBT)
        waiting = min(share, 1.0) * exp(-(self.clock - record.note) / mean)
        return waiting * (1.0 - exp(-self.life * full / mean)) / (1.0 - min(share, 0.999) + waiting)

    def remember(self, record: Tally, ghosts: Sequence[int]) -> None:
        """Keep category and time of the last use."""
        self.out.resize(self.ghost_limit(self.share, GHOSTS_MAX))
        self.out.add_all(ghosts, record.note * _CATEGORIES + record.segment)

    def new_plan(self) -> OrderedPlan:
        """A plan that compares the heads of all categories."""
        return _WorkloadPlan(self)


class _WorkloadPlan(SegmentedPlan):
    policy: WorkloadPolicy

    def choose(self) -> Record | None:
        heads = [
            head for head in map(self.peek, range(2 * len(self.policy._classes) + 2)) if head is not None
        ]
        if not heads:
            return None
        least = min(heads, key=lambda head: (self.policy.chance(head), head.key))
        return self.take(least.segment)
