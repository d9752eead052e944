"""How the segments of a slotted tier are shared between its pools.

A segment's memory belongs to one domain and one slot size. When a pool that has less than its fair share runs out of
room and no segment is spare, the pool that has most gives one up, one at a time in a tier; ``reclaim`` empties it. A
pool that has none gets one even where nobody has more than one: from the pool that was used longest ago.
"""

from __future__ import annotations

from collections import Counter

from hicache.engine.core import Core
from hicache.engine.holders import Leaving
from hicache.engine.pools import Pool
from hicache.tree import Run
from hicache.types import SLOTS_PER_SEGMENT


def siblings(core: Core, tier: int) -> list[Pool]:
    """The pools that share a tier's segments."""
    return [pool for pool in core.pools.values() if pool.tier == tier and pool.slots_per_segment]


def fair_segments(core: Core, pool: Pool) -> int:
    """How many segments the pool may have however much others want: its part, and at least one.

    Pools that hold nothing and ask for nothing count for nothing.
    """
    active = sum(1 for each in siblings(core, pool.tier) if each.segments or each is pool)
    return max(core.segments[pool.tier].total // max(active, 1), 1)


def wanted(core: Core, pool: Pool) -> None:
    """A pool has run out of room: have another give up a segment, if this one has less than its fair share."""
    segments = core.segments[pool.tier]
    if pool.spec.keyed or not pool.slots_per_segment or segments.spare or segments.claimant is not None:
        return
    if len(pool.segments) == segments.total:
        return
    fair = fair_segments(core, pool)
    if len(pool.segments) >= fair:
        return
    others = [each for each in siblings(core, pool.tier) if each is not pool and each.segments]
    if not others:
        return
    giver = max(others, key=lambda each: len(each.segments))
    if len(giver.segments) <= fair:
        if pool.segments:
            return
        giver = min(others, key=lambda each: each.tick)
    segments.claimant = pool
    _give_up(core, giver)
    core.counters.reclaimed_segments += 1
    core.room_changed = True


def _give_up(core: Core, pool: Pool) -> None:
    """Choose the segment that is emptiest, or youngest, and list who has pages there. O(runs): once a segment."""
    counts = Counter(slot // SLOTS_PER_SEGMENT for slot in pool.free)
    pool.start_leaving(max(sorted(pool.segments, reverse=True), key=lambda segment: counts[segment]))
    pool.leaving_runs = Leaving()
    for run in core.runs.values():
        if run.slots[pool.tier] is not None and core.pool(run, pool.tier) is pool:
            note_leaving(core, run, pool)


def note_leaving(core: Core, run: Run, pool: Pool) -> None:
    """Remember the run if it has pages in the segment that its pool gives up."""
    leaving = pool.leaving_runs
    if leaving is not None and any(pool.is_leaving(slot) for slot in run.slots[pool.tier] or ()):
        core.hold(leaving, run)
