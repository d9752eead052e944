"""The ledger: who holds how much of each tier.

A *pool* is the room of one (domain, page size) in a slotted tier, or all of a keyed tier. Room moves between the
pools of a slotted tier in whole segments, since a segment's memory belongs to one domain and one slot size. A pool's
``units`` are slots where the tier is slotted, bytes where it is keyed.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from hicache.policy import Admission, Policy
from hicache.types import SLOTS_PER_SEGMENT, TierSpec

if TYPE_CHECKING:
    from hicache.engine.holders import Leaving, Operation, ReserveWaiter
    from hicache.tree import Run

#: What a page on a keyed tier is taken to cost until the store says what it really took: the raw bytes, rounded up to
#: memory pages, plus one for the record's own header and index.
KEYED_OVERHEAD_BYTES = 4096


@dataclasses.dataclass(slots=True, eq=False)
class Stall:
    """A walk for victims that did not give the room: until something has changed the next one would not either.

    ``gained``: the units that it found; ``eased``: the pool's count then; ``rest``: the dirty victims that it met, in
    their order, with their last use then, of those that have not begun to drain; ``tries``: how often it may stand for
    a walk before one looks again whatever was counted, since uses change the order.
    """

    gained: int
    lower: int
    eased: int
    rest: list[tuple[Run, int]]
    tries: int


class Segments:
    """The segments of one slotted tier that no pool holds."""

    def __init__(self, spec: TierSpec) -> None:
        self.total = spec.capacity_bytes // spec.segment_bytes if spec.segment_bytes else 0
        self.spare = list(range(self.total - 1, -1, -1))
        self.claimant: Pool | None = None  # for whom a segment is being given up


@dataclasses.dataclass(slots=True, eq=False)
class Pool:
    """Room in one tier, its policy, and those who wait for it."""

    tier: int
    spec: TierSpec
    domain: str
    page_bytes: int
    slots_per_segment: int
    policy: Policy
    free: list[int] = dataclasses.field(default_factory=list)  # slotted: free slots, next one last
    segments: set[int] = dataclasses.field(default_factory=set)
    admission: Admission | None = None  # what is let in from the tiers above; None: all
    leaving: int = -1  # slotted: the segment being given up; its freed slots do not come back
    leaving_slots: int = 0  # how many of its slots are free by now
    leaving_runs: Leaving | None = None  # who has pages there
    lower_tiers: tuple[int, ...] = ()  # tiers below that can hold a page of this pool's size
    tick: int = 0  # of the last use
    used: int = 0  # units held by pages, reservations and copies
    draining: int = 0  # units that copies under way will free
    waiters: deque[ReserveWaiter] = dataclasses.field(default_factory=deque)
    wanting: dict[int, Operation] = dataclasses.field(default_factory=dict)  # operations that wait for room
    hit_all: Callable[[Sequence[int], int], None] = dataclasses.field(
        init=False
    )  # the policy's, or one by one
    first: Callable[[], int | None] | None = dataclasses.field(init=False)  # the policy's, if it has one
    taken: int = 0  # units ever taken
    eased: int = 0  # units that have ever come free, become candidates, or become clean: at least as many
    stall: Stall | None = None  # the last walk for victims, if it was in vain
    cold_mark: int = 0  # ``taken + eased`` when the coldest pages were last looked for
    cold_wanted: int = 0  # units of the tier below that the coldest pages did not get then; 0: they got all
    cold_eased: int = 0  # how eased that tier was then

    def __post_init__(self) -> None:
        """Look once what the policy can do."""
        self.hit_all = getattr(self.policy, "hit_all", self._hit_one_by_one)
        self.first = getattr(self.policy, "first", None)

    def _hit_one_by_one(self, runs: Sequence[int], now: int) -> None:
        for run in runs:
            self.policy.hit(run, now)

    @property
    def capacity(self) -> int:
        """Units the pool has now."""
        if self.spec.keyed:
            return self.spec.capacity_bytes
        return len(self.segments) * self.slots_per_segment

    @property
    def available(self) -> int:
        """Units that can be taken now."""
        return self.spec.capacity_bytes - self.used if self.spec.keyed else len(self.free)

    def tell_capacity(self) -> None:
        """Tell a policy that asks for it how large the pool is."""
        resize = getattr(self.policy, "resize", None)
        if resize is not None and self.capacity:
            resize(self.capacity)

    def units(self, pages: int, page_bytes: int) -> int:
        """Units that ``pages`` new pages are taken to need."""
        if not self.spec.keyed:
            return pages
        return pages * (-(-page_bytes // 4096) * 4096 + KEYED_OVERHEAD_BYTES)

    def take(self, pages: int, page_bytes: int) -> array[int]:
        """Places for new pages: slot numbers in ascending stretches, or the estimated charge of each page.

        The caller has made sure that they are there.
        """
        if self.spec.keyed:
            charge = self.units(1, page_bytes)
            self.used += charge * pages
            self.taken += charge * pages
            return array("q", [charge]) * pages
        assert pages <= len(self.free), "took more slots than are free"
        taken = array("q", self.free[: -pages - 1 : -1])
        del self.free[len(self.free) - pages :]
        self.used += pages
        self.taken += pages
        return taken

    def give_back(self, places: Sequence[int]) -> None:
        """The places hold nothing any more."""
        if self.spec.keyed:
            units = sum(places)
            self.used -= units
            self.eased += units
            return
        self.used -= len(places)
        self.eased += len(places)
        if self.leaving < 0:
            self.free.extend(reversed(places))
            return
        low = self.leaving * SLOTS_PER_SEGMENT
        high = low + SLOTS_PER_SEGMENT
        for slot in reversed(places):
            if low <= slot < high:
                self.leaving_slots += 1
            else:
                self.free.append(slot)

    def recharge(self, old: Iterable[int], new: Iterable[int]) -> None:
        """A keyed tier has said what pages really take."""
        self.used += sum(new) - sum(old)

    def add_segment(self, segment: int) -> None:
        """All slots of a fresh segment become free, lowest first."""
        self.segments.add(segment)
        self.tell_capacity()
        base = segment * SLOTS_PER_SEGMENT
        self.free[:0] = range(base + self.slots_per_segment - 1, base - 1, -1)

    def is_leaving(self, slot: int) -> bool:
        """Whether a slot lies in the segment being given up."""
        return slot // SLOTS_PER_SEGMENT == self.leaving

    def start_leaving(self, segment: int) -> None:
        """Stop giving out slots of this segment."""
        low, high = segment * SLOTS_PER_SEGMENT, (segment + 1) * SLOTS_PER_SEGMENT
        kept = [slot for slot in self.free if not low <= slot < high]
        self.leaving = segment
        self.leaving_slots = len(self.free) - len(kept)
        self.free = kept

    def finish_leaving(self) -> int:
        """The segment that left; all its slots are free."""
        assert self.leaving_slots == self.slots_per_segment
        segment, self.leaving, self.leaving_slots = self.leaving, -1, 0
        self.segments.discard(segment)
        self.tell_capacity()
        return segment

    def fits(self, pages: int, page_bytes: int) -> bool:
        """Whether the pool could ever hold so many pages, with all of its tier to itself."""
        if self.spec.keyed:
            return self.units(pages, page_bytes) <= self.spec.capacity_bytes
        if not self.slots_per_segment or not self.spec.segment_bytes:
            return False
        return pages <= self.spec.capacity_bytes // self.spec.segment_bytes * self.slots_per_segment
