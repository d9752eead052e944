"""Emptying the segment that a pool gives up, and handing it on.

Its pages leave at once where they stand in another tier, else by a copy down; where no tier below takes them they are
dropped with what hangs below them. Pinned pages are waited for. When the segment is empty and no session maps it any
more, it goes to the pool for which it was given up.
"""

from __future__ import annotations

from hicache.engine import copies, gate, plan, room
from hicache.engine.actions import CloseSegment
from hicache.engine.core import ABSENT, RESIDENT, Core
from hicache.engine.events import SegmentClosed
from hicache.engine.pools import Pool
from hicache.tree import Run

#: How many of the runs in the segment are looked at each time; the others follow.
WINDOW = 64


def advance(core: Core, pool: Pool) -> None:
    """Go on emptying the segment that the pool gives up."""
    if pool.leaving_slots < pool.slots_per_segment:
        _empty(core, pool)
    if pool.leaving_slots == pool.slots_per_segment:
        _close(core, pool)


def _close(core: Core, pool: Pool) -> None:
    leaving = pool.leaving_runs
    assert leaving is not None, "a segment is given up, and nobody has looked who is in it"
    for run in list(leaving.runs):
        core.let_go(leaving, run)
    pool.leaving_runs = None
    segment = pool.finish_leaving()
    core.closing_segments[pool.tier].add(segment)
    core.emit(CloseSegment(pool.tier, segment))


def _empty(core: Core, pool: Pool) -> None:
    """Move out what can be moved now; the rest when its pins or copies are gone."""
    leaving = pool.leaving_runs
    assert leaving is not None, "a segment is given up, and nobody has looked who is in it"
    front = leaving.runs[:WINDOW]
    for run in front:
        if run.state[pool.tier] == RESIDENT and not run.pins[pool.tier]:
            inside = _part_inside(core, pool, run)
            if inside is not None:
                _move_out(core, pool, inside)
    for run in front:
        places = run.slots[pool.tier]
        if places is None or not any(pool.is_leaving(slot) for slot in places):
            core.let_go(leaving, run)
    stay = min(WINDOW, len(leaving.runs))
    leaving.runs = leaving.runs[stay:] + leaving.runs[:stay]


def _part_inside(core: Core, pool: Pool, run: Run) -> Run | None:
    """The first stretch of a run that lies in the segment, cut out of it: the rest may stay. None if there is none."""
    inside = [pool.is_leaving(slot) for slot in run.slots[pool.tier] or ()]
    if True not in inside:
        return None
    first = inside.index(True)
    if first:
        run = core.split(run, first)
        inside = inside[first:]
    if False in inside:
        core.split(run, inside.index(False))
    return run


def _move_out(core: Core, pool: Pool, run: Run) -> None:
    if run.live > 1:
        plan.evict(core, run, pool.tier, run.pages)
        return
    lower = room.lower_tier(core, pool)
    if gate.refuses(core, run, lower):
        plan.drop(core, run, evicted=True)
    elif lower >= 0 and run.state[lower] == ABSENT:
        copies.copy_down(
            core, run, lower, room.make_room_below
        )  # when that has arrived it leaves as a clean page
    elif lower < 0:
        family = [run, *plan.below(run)]
        if not any(each.anchors or any(each.pins) for each in family):
            for each in reversed(family):
                plan.drop(core, each, evicted=True)


def segment_closed(core: Core, event: SegmentClosed) -> None:
    """Nobody maps it any more: it goes to who waits for it."""
    if event.segment not in core.closing_segments[event.tier]:
        return
    core.closing_segments[event.tier].discard(event.segment)
    segments = core.segments[event.tier]
    claimant, segments.claimant = segments.claimant, None
    if claimant is not None:
        core.give_segment(claimant, event.segment)
    else:
        segments.spare.append(event.segment)
    core.room_changed = True
