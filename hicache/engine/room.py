"""Demand eviction: having room in a pool, and what is done ahead of need.

Clean pages, and pages that no lower tier would take, give room now. Only if they suffice is the plan carried out;
otherwise it is abandoned without a trace and the dirty ones start to drain: those who wait for room are asked again
when a copy has finished. Under ``drop`` pressure dirty pages are dropped, too, and counted as unsaved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hicache.engine import copies, gate, shares, tips
from hicache.engine.core import ABSENT, RESIDENT, Core, namespace_of
from hicache.engine.plan import LOOK_AHEAD, Plan, evict
from hicache.engine.pools import Pool, Stall
from hicache.engine.stranded import give_room
from hicache.tree import Run

#: After so many victims whose copy could not be started, no more are tried.
FUTILE = 4
#: So many tries may be answered by a walk that was in vain; then one looks again.
STALL_TRIES = 16
#: The coldest pages are looked for again when this share of the low mark has been taken or has come free.
NEWS_SHARE = 8


def lower_tier(core: Core, pool: Pool) -> int:
    """The next tier below a pool's that takes its pages, -1 if none."""
    for tier in pool.lower_tiers:
        if core.writable[tier]:
            return tier
    return -1


def make_room(core: Core, pool: Pool, pages: int, page_bytes: int, *, drop: bool = False) -> bool:
    """Have room for ``pages`` in the pool if that can be had now; else start what will bring it about.

    ``drop``: nothing is started; instead unsaved pages may be dropped.
    """
    units = pool.units(pages, page_bytes)
    if units > pool.available:
        core.grow(pool, pages)
    if units <= pool.available:
        return True
    shares.wanted(core, pool)
    if not pool.fits(pages, page_bytes):
        return False
    if core.recovering and pool.tier == core.durable_tier:
        return False  # what is still to come hangs below what is there; and writes wait for it anyway
    if core.holes or core.stranded.pages:
        _evict_stranded(core, pool, units)
        if units <= pool.available:
            return True
    lower = lower_tier(core, pool)
    if _first_give(core, pool, units - pool.available, lower):
        return True
    return _plan(core, pool, units, lower, drop=drop)


def _plan(core: Core, pool: Pool, units: int, lower: int, *, drop: bool) -> bool:
    """``make_room`` by a plan; where that does not suffice, start draining, or drop."""
    need = units - pool.available
    if not drop and _stalled(core, pool, need, lower):
        return False
    plan = Plan(core, pool, need, lower, may_drop=lower < 0)
    if plan.build():
        pool.stall = None
        plan.carry_out()
        return units <= pool.available
    dirty = plan.abandon()
    if not drop:
        rest = [(run, run.tick) for run, _ in dirty]
        pool.stall = Stall(plan.gained, lower, pool.eased, rest, STALL_TRIES)
        _start_draining(core, pool, dirty, need)
        return False
    plan = Plan(core, pool, need, lower, may_drop=True)
    if plan.build():
        plan.carry_out()
    else:
        plan.abandon()
    return units <= pool.available


def _first_give(core: Core, pool: Pool, need: int, lower: int) -> bool:
    """Have ``need`` slots from the victims in front if it is clear that these suffice. What a plan would come to.

    One clean victim is enough by itself. Where pages go nowhere from here, everything can go that nobody holds.
    """
    if pool.first is None or pool.spec.keyed or pool.leaving >= 0:
        return False
    if lower < 0 and len(core.tiers) == 1 and not (core.copies or core.savers):
        if need <= pool.used - core.held_pages:
            return tips.evict_first(core, pool, need) >= need
        return False
    ident = pool.first()
    run = core.runs[ident] if ident is not None else None
    if run is None or run.pages < need or run.live < 2 or run.state.count(RESIDENT) < 2:
        return False
    evict(core, run, pool.tier, need)
    return True


def make_room_below(core: Core, tier: int, run: Run, pages: int) -> bool:
    """``make_room`` in the form that ``copies`` asks for."""
    namespace = namespace_of(run)
    return make_room(core, namespace.pools[tier], pages, namespace.page_bytes)


def _stalled(core: Core, pool: Pool, need: int, lower: int) -> bool:
    """Whether a walk for victims would be in vain as the last one was; its dirty victims go on draining then."""
    stall = pool.stall
    if stall is None or pool.spec.keyed or pool.leaving >= 0 or stall.lower != lower:
        return False
    if need <= stall.gained + pool.eased - stall.eased or not stall.tries:
        return False
    stall.tries -= 1
    if pool.draining < need:
        front = [(run, tick) for run, tick in stall.rest if run.tick == tick and not run.pins[pool.tier]]
        stall.rest = front
        if not front:
            return False
        _start_draining(core, pool, [(run, min(run.pages, need)) for run, _ in front], need)
    return True


def _start_draining(core: Core, pool: Pool, victims: list[tuple[Run, int]], need: int) -> None:
    """Start copying dirty victims down, as many as are still needed beside what drains already."""
    lower = lower_tier(core, pool)
    futile = 0
    for run, pages in victims:
        if pool.draining >= need or lower < 0 or futile >= FUTILE:
            return
        if len(core.copies) >= core.options.max_copies or copies.much_under_way(core, pool, lower):
            return
        sizes = (pages, min(pages, core.options.max_copy_pages))
        if not any(_drain_tail(core, run, pool.tier, lower, size) for size in dict.fromkeys(sizes)):
            futile += 1


def _drain_tail(core: Core, run: Run, tier: int, lower: int, pages: int) -> bool:
    """Start demoting the last pages of a run, if what was started before it has left it as it was."""
    if run.id not in core.runs or run.state[tier] != RESIDENT or run.pins[tier]:
        return False
    if run.pages < pages or run.below[tier] or run.live > 1:
        return False
    victim = run if pages == run.pages else core.split(run, run.pages - pages)
    if copies.copy_down(core, victim, lower, make_room_below, drain_from=tier):
        return True
    copies.merge_all(core, [victim])
    return False


# --- stranded pages


def _evict_stranded(core: Core, pool: Pool, units: int) -> None:
    """Give up first what nobody can match: stranded chains, then pages below holes."""
    if core.stranded.pages and pool.tier == core.durable_tier:
        give_room(core, pool, units)
    for hole in list(core.holes):
        if hole.id not in core.runs or hole.live:
            core.holes.discard(hole)
            continue
        if namespace_of(hole).pools[pool.tier] is not pool or not hole.below[pool.tier]:
            continue
        for run in _leaves_first(core, hole, pool.tier):
            if units <= pool.available:
                return
            if run.id not in core.runs or run.state[pool.tier] != RESIDENT:
                continue
            held = run.pins[pool.tier] or run.below[pool.tier]
            if held or (run.live == 1 and (run.anchors or run.tree.child_runs(run))):
                continue
            evict(core, run, pool.tier, run.pages)
        core.prune(hole)


def _leaves_first(core: Core, hole: Run, tier: int) -> Iterator[Run]:
    """Runs below a hole that lead to pages in a tier, children before parents; they may be evicted meanwhile."""

    def next_runs(run: Run) -> Iterator[Run]:
        for each in run.tree.child_runs(run):
            if each.id in core.runs and (each.state[tier] != ABSENT or each.below[tier]):
                yield each

    path = [(hole, next_runs(hole))]
    while path:
        run, rest = path[-1]
        child = next(rest, None)
        if child is not None:
            path.append((child, next_runs(child)))
            continue
        path.pop()
        if path:
            yield run


# --- ahead of need


def copy_down_cold(core: Core, pool: Pool) -> None:
    """Where room gets short, copy the coldest unsaved pages down so that later evictions need no copy.

    Once between two uses: in a lower tier that is full of such pages they would push each other out without end.
    """
    lower = lower_tier(core, pool)
    if lower < 0 or pool.capacity == 0 or core.segments[pool.tier].spare:
        return
    low = int(pool.capacity * core.options.free_low_fraction)
    short = low - pool.available - pool.draining
    if short <= 0 or len(core.copies) >= core.options.max_copies:
        return
    below = core.pools.get(
        (lower, "", 0) if core.tiers[lower].keyed else (lower, pool.domain, pool.page_bytes)
    )
    if below is None or _no_news(pool, below, low) or copies.much_under_way(core, pool, lower):
        return
    pool.cold_mark, pool.cold_wanted = pool.taken + pool.eased, 0
    dirty, short = _coldest(core, pool, short, lower)
    for run in dirty:
        if short <= 0:
            return
        if run.id not in core.runs or run.state[lower] != ABSENT or run.pins[pool.tier]:
            continue
        if core.ahead.get(run.id) == run.tick:
            continue
        pages = min(run.pages, short if not pool.spec.keyed else 1, core.options.max_copy_pages)
        victim = run if pages == run.pages else core.split(run, run.pages - pages)
        if not copies.copy_down(core, victim, lower, make_room_below):
            copies.merge_all(core, [victim])
            pool.cold_wanted, pool.cold_eased = below.units(pages, pool.page_bytes), below.eased
            return
        core.ahead[victim.id] = victim.tick
        short -= core.run_units(victim, pool.tier)


def _no_news(pool: Pool, below: Pool, low: int) -> bool:
    """Whether looking for the coldest pages again would show what it showed the last time, or nearly."""
    if pool.cold_wanted and not below.spec.keyed:
        return max(below.available, below.eased - pool.cold_eased) < pool.cold_wanted
    return pool.taken + pool.eased - pool.cold_mark < low // NEWS_SHARE


def _coldest(core: Core, pool: Pool, short: int, lower: int) -> tuple[list[Run], int]:
    """The unsaved ones of the runs that would leave next, and how many units they must give.

    Clean ones count, and those that leave without a copy, since admission refuses them.
    """
    plan = pool.policy.begin()
    dirty: list[Run] = []
    for ident in itertools.islice(iter(plan.next, None), LOOK_AHEAD):
        run = core.runs[ident]
        if run.live > 1 or gate.refuses(core, run, lower):
            short -= core.run_units(run, pool.tier)
        else:
            dirty.append(run)
        if short <= 0:
            break
    plan.abort()
    return dirty, short
