"""Demand eviction: making room in a pool, and giving pages up.

A plan walks the pool's policy from the page it would miss least. Victims are of three kinds:

- *clean*: the page stands in another tier too; it leaves at once;
- *last*: it stands nowhere else and no lower tier would take it; it is dropped, if nothing hangs below it;
- *dirty*: it must be copied down first.

Clean and last victims give room now. Only if they suffice is the plan carried out; otherwise it is abandoned without a
trace and the dirty ones start to drain: those who wait for room are asked again when a copy has finished. Under
``drop`` pressure dirty victims count as last, and are counted as unsaved.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator

from hicache.engine import copies
from hicache.engine.core import ABSENT, RESIDENT, Core, namespace_of
from hicache.engine.pools import Pool
from hicache.tree import Run

#: How far a plan looks past dirty victims for clean ones.
LOOK_AHEAD = 64


class Kind(enum.Enum):
    """How a victim can leave."""

    CLEAN = 1
    LAST = 2
    DIRTY = 3
    STUCK = 4


def lower_tier(core: Core, tier: int) -> int:
    """The next tier below that takes pages, -1 if none."""
    return next((t for t in range(tier + 1, len(core.tiers)) if core.writable[t]), -1)


def make_room(core: Core, pool: Pool, pages: int, page_bytes: int, *, drop: bool = False) -> bool:
    """Have room for ``pages`` in the pool if that can be had now; else start what will bring it about.

    ``drop``: unsaved pages may be dropped.
    """
    core.grow(pool, pages)
    need = pool.units(pages, page_bytes) - pool.available
    if need <= 0:
        return True
    if core.holes and _evict_stranded(core, pool, need):
        return True
    need = pool.units(pages, page_bytes) - pool.available
    plan = _Plan(core, pool, need, drop=drop)
    if plan.build():
        plan.carry_out()
        return True
    dirty = plan.abandon()
    if not drop:
        start_draining(core, pool, dirty, need)
    return False


def room_maker(core: Core, *, drop: bool = False) -> copies.MakeRoom:
    """``make_room`` in the form that ``copies`` asks for. Tiers from which pages can only be dropped do that."""

    def make(tier: int, run: Run, pages: int) -> bool:
        namespace = namespace_of(run)
        return make_room(core, namespace.pools[tier], pages, namespace.page_bytes, drop=drop)

    return make


def start_draining(core: Core, pool: Pool, victims: list[tuple[Run, int]], need: int) -> None:
    """Start copying dirty victims down, as many as are still needed beside what drains already."""
    maker = room_maker(core)
    lower = lower_tier(core, pool.tier)
    for run, pages in victims:
        if pool.draining >= need or lower < 0:
            return
        if run.id not in core.runs or run.state[pool.tier] != RESIDENT or run.pins[pool.tier]:
            continue  # an earlier step of this loop has moved it
        if run.pages < pages or run.below[pool.tier]:
            continue
        victim = run if pages == run.pages else core.split(run, run.pages - pages)
        copies.copy_down(core, victim, lower, maker, drain_from=pool.tier)


def evict(core: Core, run: Run, tier: int, pages: int, *, unsaved: bool = False) -> None:
    """Take the last ``pages`` of a run out of a tier at once; drop them if that was their last."""
    victim = run if pages == run.pages else core.split(run, run.pages - pages)
    core.leave(victim, tier)
    if victim.live:
        core.counters.evicted_pages[tier] += pages
        if victim is not run:
            return
        copies.merge_all(core, [victim])
        return
    core.counters.dropped_pages[tier] += pages
    if unsaved:
        core.counters.unsaved_dropped_pages += pages
    core.prune(victim)


class _Plan:
    """One walk through a pool's policy. Changes nothing before ``carry_out``."""

    def __init__(self, core: Core, pool: Pool, need: int, *, drop: bool) -> None:
        self.core = core
        self.pool = pool
        self.tier = pool.tier
        self.need = need
        self.may_drop = drop or lower_tier(core, pool.tier) < 0
        self.policy_plan = pool.policy.begin()
        self.chosen: list[tuple[Run, int, Kind]] = []
        self.dirty: list[tuple[Run, int]] = []
        self.gained = 0
        self.whole: set[int] = set()  # runs chosen with all their pages
        self.gone: dict[int, int] = {}  # run -> how many of its next runs the plan removes from the tree
        self.absent: dict[int, int] = {}  # run -> how many of its next runs the plan empties in this tier

    def build(self) -> bool:
        """Choose victims; True if they give the room."""
        skipped = 0
        while self.gained < self.need and skipped < LOOK_AHEAD:
            ident = self.policy_plan.next()
            if ident is None:
                break
            run = self.core.runs[ident]
            kind = self._kind(run)
            if kind in {Kind.CLEAN, Kind.LAST}:
                self._choose(run, kind)
                continue
            skipped += 1
            if kind is Kind.DIRTY:
                pages, _ = self._tail(run, self.need)
                self.dirty.append((run, pages))
        return self.gained >= self.need

    def carry_out(self) -> None:
        """Evict what was chosen."""
        self.policy_plan.commit([run.id for run, pages, _ in self.chosen if pages == run.pages])
        lower = lower_tier(self.core, self.tier) >= 0
        for run, pages, kind in self.chosen:
            evict(self.core, run, self.tier, pages, unsaved=kind is Kind.LAST and lower)

    def abandon(self) -> list[tuple[Run, int]]:
        """Forget the plan; returns its dirty victims in policy order."""
        self.policy_plan.abort()
        return self.dirty

    def _kind(self, run: Run) -> Kind:
        state = run.state
        if any(state[tier] == RESIDENT for tier in self.core.tier_range if tier != self.tier):
            return Kind.CLEAN
        if self.may_drop:
            children = run.tree.child_runs(run)
            if not run.anchors and len(children) == self.gone.get(run.id, 0):
                return Kind.LAST
            if lower_tier(self.core, self.tier) < 0:
                return Kind.STUCK
        return Kind.DIRTY

    def _tail(self, run: Run, need: int) -> tuple[int, int]:
        """How many pages from the run's tail give ``need`` units, and the units they give."""
        if not self.pool.spec.keyed:
            pages = min(run.pages, need)
            return pages, pages
        charges = run.slots[self.tier] or ()
        pages = units = 0
        for charge in reversed(charges):
            if units >= need:
                break
            pages += 1
            units += charge
        return pages, units

    def _choose(self, run: Run, kind: Kind) -> None:
        pages, units = self._tail(run, self.need - self.gained)
        self.gained += units
        self.chosen.append((run, pages, kind))
        if pages < run.pages:
            return
        self.whole.add(run.id)
        if kind is Kind.LAST:
            above = run.tree.parent_run(run)
            if above is not None:
                self.gone[above.id] = self.gone.get(above.id, 0) + 1
        for exposed in self._exposed_by(run):
            self.policy_plan.expose(exposed.id)

    def _exposed_by(self, run: Run) -> Iterator[Run]:
        """The run above that this eviction exposes, if any."""
        above = run.tree.parent_run(run)
        while above is not None:
            count = self.absent.get(above.id, 0) + 1
            self.absent[above.id] = count
            if count < above.below[self.tier]:
                return
            if above.state[self.tier] != ABSENT:
                if above.state[self.tier] == RESIDENT and not above.pins[self.tier]:
                    yield above
                return
            above = above.tree.parent_run(above)


# --- stranded pages


def below(run: Run) -> list[Run]:
    """Every run below this one, parents first."""
    found: list[Run] = []
    todo = run.tree.child_runs(run)
    while todo:
        each = todo.pop()
        found.append(each)
        todo.extend(each.tree.child_runs(each))
    return found


def _evict_stranded(core: Core, pool: Pool, need: int) -> bool:
    """Give up pages below holes first: nobody can match them. True if that gave the room."""
    before = pool.available
    for hole in list(core.holes):
        if hole.live or hole.id not in core.runs:
            core.holes.discard(hole)
            continue
        for run in reversed(below(hole)):
            if run.id not in core.runs or run.state[pool.tier] != RESIDENT or run.pins[pool.tier]:
                continue
            if run.below[pool.tier] or namespace_of(run).pools[pool.tier] is not pool:
                continue
            if run.live > 1 or not (run.anchors or run.tree.child_runs(run)):
                evict(core, run, pool.tier, run.pages)
            if pool.available - before >= need:
                return True
        core.prune(hole)
    return False


# --- ahead of need


def copy_down_cold(core: Core, pool: Pool) -> None:
    """Where room gets short, copy the coldest unsaved pages down so that later evictions need no copy."""
    lower = lower_tier(core, pool.tier)
    if lower < 0 or pool.capacity == 0 or core.segments[pool.tier].spare:
        return
    want = int(pool.capacity * core.options.free_low_fraction)
    short = want - pool.available - pool.draining
    if short <= 0 or len(core.copies) >= core.options.max_copies:
        return
    plan = pool.policy.begin()
    found: list[Run] = []
    clean = 0
    for ident in itertools.islice(iter(plan.next, None), LOOK_AHEAD):
        run = core.runs[ident]
        if run.live > 1:
            clean += core.run_units(run, pool.tier)
        else:
            found.append(run)
        if clean >= short:
            break
    plan.abort()
    maker = room_maker(core)
    for run in found:
        if clean >= short or run.id not in core.runs or run.state[pool.tier] != RESIDENT:
            break
        pages = min(run.pages, max(1, short - clean), core.options.max_copy_pages)
        if run.state[lower] != ABSENT or run.pins[pool.tier]:
            continue
        victim = run if pages == run.pages else core.split(run, run.pages - pages)
        if not copies.copy_down(core, victim, lower, maker):
            break
        clean += core.run_units(victim, pool.tier)
