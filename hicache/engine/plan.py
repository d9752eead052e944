"""One walk through a pool's policy for victims, without a trace until it is carried out.

A plan walks the pool's policy from the page it would miss least. Victims are of five kinds:

- *clean*: the page stands in another tier too; it leaves at once;
- *last*: it stands nowhere else and may be dropped, and nothing hangs below it;
- *refused*: the same, because admission says that it is not worth a copy;
- *family*: it may be dropped, but pages hang below it in other tiers: those would have to be dropped with it;
- *dirty*: it must be copied down first.

Clean, last and refused victims give room now. Families are a last resort, and small.
"""

from __future__ import annotations

from hicache.engine import copies, gate, tips
from hicache.engine.core import ABSENT, RESIDENT, Core
from hicache.engine.pools import Pool
from hicache.tree import Run
from hicache.tree.node import parent_run
from hicache.tree.tips import is_tip

#: How far a plan looks past dirty victims for clean ones.
LOOK_AHEAD = 64
#: The most runs that a family may have.
FAMILY_RUNS = 256


# How a victim can leave. Plain ints: members of an enum are hashed in Python, and this is asked of every victim.
CLEAN, LAST, REFUSED, FAMILY, DIRTY, STUCK = range(6)


class Plan:
    """What is to leave a pool so that ``need`` units become free. Changes nothing before ``carry_out``.

    ``lower``: the tier to which dirty pages would go, -1 if none. ``may_drop``: pages that stand nowhere else may be
    given up.
    """

    def __init__(self, core: Core, pool: Pool, need: int, lower: int, *, may_drop: bool) -> None:
        self.core = core
        self.pool = pool
        self.tier = pool.tier
        self.need = need
        self.lower = lower
        self.may_drop = may_drop
        self.policy_plan = pool.policy.begin()
        self.chosen: list[tuple[Run, int, int]] = []
        self.dirty: list[tuple[Run, int]] = []
        self.families: list[Run] = []
        self.gained = 0
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
            if kind <= REFUSED:
                self._choose(run, kind)
                continue
            skipped += 1
            if kind is FAMILY:
                self.families.append(run)
            elif kind is DIRTY:
                self.dirty.append((run, self._tail(run, self.need)[0]))
        for run in self.families:
            if self.gained >= self.need:
                break
            if self._may_go_with_all_below(run):
                self._choose(run, FAMILY)
        return self.gained >= self.need

    def carry_out(self) -> None:
        """Evict what was chosen."""
        self.policy_plan.commit([run.id for run, pages, _ in self.chosen if pages == run.pages])
        for run, pages, kind in self.chosen:
            if kind is FAMILY:
                for each in reversed(below(run)):
                    drop(self.core, each, evicted=True)
            unsaved = kind in {LAST, FAMILY} and bool(self.pool.lower_tiers)
            evict(self.core, run, self.tier, pages, unsaved=unsaved)

    def abandon(self) -> list[tuple[Run, int]]:
        """Forget the plan; returns its dirty victims in policy order."""
        self.policy_plan.abort()
        return self.dirty

    def _kind(self, run: Run) -> int:
        if run.live > 1:
            state = run.state
            for tier in self.core.tier_range:
                if tier != self.tier and state[tier] == RESIDENT:
                    return CLEAN
        if not self.may_drop:
            leaving = self.gone.get(run.id, 0)
            return REFUSED if gate.refuses(self.core, run, self.lower, leaving=leaving) else DIRTY
        if run.anchors:
            return STUCK
        node = run.node
        if not node.children and node.runs[-1] is run:
            return LAST
        return LAST if len(run.tree.child_runs(run)) == self.gone.get(run.id, 0) else FAMILY

    def _may_go_with_all_below(self, run: Run) -> bool:
        """Whether nobody holds anything below, and it is not much. O(FAMILY_RUNS)."""
        todo, seen = [run], 0
        while todo:
            each = todo.pop()
            seen += 1
            if seen > FAMILY_RUNS or each.anchors or any(each.pins):
                return False
            todo.extend(each.tree.child_runs(each))
        return True

    def _tail(self, run: Run, need: int) -> tuple[int, int]:
        """How many pages from the run's tail give ``need`` units, and the units they give."""
        pool = self.pool
        if not pool.spec.keyed and pool.leaving < 0:
            pages = min(run.pages, need)
            return pages, pages
        pages = units = 0
        for place in reversed(run.slots[self.tier] or ()):
            if units >= need:
                break
            pages += 1
            # Slots of a segment that is being given up do not come back.
            units += place if pool.spec.keyed else int(not pool.is_leaving(place))
        return pages, units

    def _choose(self, run: Run, kind: int) -> None:
        pages, units = self._tail(run, self.need - self.gained)
        self.gained += units
        self.chosen.append((run, pages, kind))
        if pages < run.pages:
            return
        above = parent_run(run)
        if above is None:
            return
        if kind in {LAST, REFUSED}:
            self.gone[above.id] = self.gone.get(above.id, 0) + 1
        self._expose(above)

    def _expose(self, above: Run | None) -> None:
        """Make the run above what leaves a candidate, if this leaves it without pages below."""
        tier = self.tier
        while above is not None:
            count = self.absent.get(above.id, 0) + 1
            self.absent[above.id] = count
            if count < above.below[tier]:
                return
            state = above.state[tier]
            if state != ABSENT:
                if state == RESIDENT and not above.pins[tier]:
                    self.policy_plan.expose(above.id)
                return
            above = parent_run(above)


def evict(core: Core, run: Run, tier: int, pages: int, *, unsaved: bool = False) -> None:
    """Take the last ``pages`` of a run out of a tier at once; drop them if that was their last.

    ``unsaved``: count them as such, since a lower tier is configured.
    """
    if is_tip(run, tier) and not core.tiers[tier].keyed:
        tips.evict(core, run, tier, pages)
        core.counters.dropped_pages[tier] += pages
        core.counters.unsaved_dropped_pages += pages * unsaved
        return
    victim = run if pages == run.pages else core.split(run, run.pages - pages)
    core.leave(victim, tier, evicted=True)
    if victim.live:
        core.counters.evicted_pages[tier] += pages
        copies.merge_all(core, [victim])
        return
    core.counters.dropped_pages[tier] += pages
    core.counters.unsaved_dropped_pages += pages * unsaved
    core.prune(victim)


def drop(core: Core, run: Run, *, evicted: bool = False) -> None:
    """Take a run that nobody holds out of every tier. ``evicted``: to make room."""
    last = -1
    for tier in core.tier_range:
        if run.state[tier] == RESIDENT:
            core.leave(run, tier, evicted=evicted)
            last = tier
    if last >= 0:
        core.counters.dropped_pages[last] += run.pages
    core.prune(run)


def below(run: Run) -> list[Run]:
    """Every run below this one, parents first. O(what is below)."""
    found: list[Run] = []
    todo = run.tree.child_runs(run)
    while todo:
        each = todo.pop()
        found.append(each)
        todo.extend(each.tree.child_runs(each))
    return found
