"""Moving room between the pools of a slotted tier, a whole segment at a time.

A segment's memory belongs to one domain and one slot size. When a pool that has less than its fair share finds no spare
segment, the pool that has most gives one up: the segment that is emptiest stops giving out slots, its pages leave (at
once, or by a demotion), and when it is empty and no session maps it any more, it becomes spare. This looks through the
run table once a segment; it happens when a new model or tenant arrives, not in steady state.
"""

from __future__ import annotations

from collections import Counter

from hicache.engine import copies, room
from hicache.engine.actions import CloseSegment
from hicache.engine.core import RESIDENT, Core, namespace_of
from hicache.engine.events import SegmentClosed
from hicache.engine.pools import Pool
from hicache.tree import Run
from hicache.types import SLOTS_PER_SEGMENT


def wanted(core: Core, pool: Pool) -> None:
    """A pool could not grow: have a richer one give up a segment, if this one has less than its fair share."""
    if pool.spec.keyed or not pool.slots_per_segment or core.segments[pool.tier].spare:
        return
    siblings = [each for each in core.pools.values() if each.tier == pool.tier and each.slots_per_segment]
    if any(each.leaving >= 0 for each in siblings) or core.closing_segments[pool.tier]:
        return  # one at a time
    fair = core.segments[pool.tier].total // len(siblings)
    richest = max(siblings, key=lambda each: len(each.segments))
    if len(pool.segments) >= max(fair, 1) or len(richest.segments) <= max(fair, 1):
        return
    counts = Counter(slot // SLOTS_PER_SEGMENT for slot in richest.free)
    victim = max(sorted(richest.segments), key=lambda segment: counts[segment])
    richest.start_leaving(victim)
    core.counters.reclaimed_segments += 1
    core.room_changed = True


def advance(core: Core) -> None:
    """Go on emptying the segments that are being given up."""
    for pool in list(core.pools.values()):
        if pool.leaving < 0:
            continue
        if pool.leaving_slots < pool.slots_per_segment:
            _empty(core, pool)
        if pool.leaving_slots == pool.slots_per_segment:
            segment = pool.finish_leaving()
            core.closing_segments[pool.tier] += 1
            core.emit(CloseSegment(pool.tier, segment))


def _empty(core: Core, pool: Pool) -> None:
    """Move out what can be moved now; the rest when its pins or copies are gone."""
    tier = pool.tier
    low = pool.leaving * SLOTS_PER_SEGMENT
    high = low + SLOTS_PER_SEGMENT
    inside = [
        run
        for run in core.runs.values()
        if run.state[tier] == RESIDENT
        and namespace_of(run).pools[tier] is pool
        and any(low <= slot < high for slot in run.slots[tier] or ())
    ]
    lower = room.lower_tier(core, tier)
    maker = room.room_maker(core)
    for run in inside:
        if run.id not in core.runs or run.state[tier] != RESIDENT or run.pins[tier]:
            continue
        if run.live > 1:
            room.evict(core, run, tier, run.pages)
        elif lower >= 0 and copies.copy_down(core, run, lower, maker):
            continue  # it leaves as a clean page when the copy has arrived
        elif lower < 0:
            _drop_with_all_below(core, run, tier)


def _drop_with_all_below(core: Core, run: Run, tier: int) -> None:
    """There is no lower tier: the page goes, and what hangs below it goes with it, unless someone holds that."""
    family = [run, *room.below(run)]
    if any(each.anchors or any(each.pins) for each in family):
        return
    for each in reversed(family):
        for index in core.tier_range:
            if each.state[index] == RESIDENT:
                core.leave(each, index)
        core.counters.dropped_pages[tier] += each.pages
        core.prune(each)


def segment_closed(core: Core, event: SegmentClosed) -> None:
    """Nobody maps it any more: it may be given to any pool."""
    core.closing_segments[event.tier] -= 1
    core.segments[event.tier].spare.append(event.segment)
    core.room_changed = True
