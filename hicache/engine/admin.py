"""Operators' events, and what tiers report of themselves."""

from __future__ import annotations

from hicache.engine import copies, plan, recovery, room
from hicache.engine.actions import EvictResult
from hicache.engine.core import ABSENT, DRAINING, RESIDENT, Core
from hicache.engine.events import Clear, Evict, PageCorrupt, PagesLost, TierLatched, TierRestored
from hicache.engine.holders import NamespaceState
from hicache.keys import KEY_BYTES
from hicache.tree import Run

EVERYWHERE = -1


def evict(core: Core, event: Evict) -> None:
    """Make a prefix and all below it leave one tier, or all."""
    namespace = core.namespaces[event.namespace]
    path = core.cut(namespace, namespace.tree.trace(event.prompt))
    width = namespace.tree.symbol_bytes
    whole = sum(run.pages for run in path) == len(event.prompt) // width
    targets = [*path, *plan.below(path[-1])] if path and whole else path
    from_disk = event.tier in {EVERYWHERE, core.durable_tier}
    stranded = 0
    if not event.prompt:
        if from_disk:
            recovery.clear_coming(core, namespace.id)
            stranded = recovery.drop_stranded(core, namespace.id)
        targets = _all_runs(namespace)
    elif from_disk:
        stranded = recovery.drop_below(core, namespace, event.prompt)
    core.reply(event.request, _evict_all(core, targets, event.tier, stranded))


def clear(core: Core, event: Clear) -> None:
    """Drop whatever nobody holds, of one namespace or of all."""
    recovery.clear_coming(core, event.namespace)
    stranded = recovery.drop_stranded(core, event.namespace)
    chosen = [core.namespaces[event.namespace]] if event.namespace else list(core.namespaces.values())
    targets = [run for namespace in chosen for run in _all_runs(namespace)]
    core.reply(event.request, _evict_all(core, targets, EVERYWHERE, stranded))


def _all_runs(namespace: NamespaceState) -> list[Run]:
    """Parents before children."""
    return [run for node in namespace.tree.walk() for run in node.runs]


def _evict_all(core: Core, targets: list[Run], tier: int, gone: int) -> EvictResult:
    """``gone``: pages that have gone already."""
    kept = 0
    for run in reversed(targets):
        if run.id not in core.runs or not run.live:
            core.prune(run)
            continue
        if tier != EVERYWHERE and run.state[tier] == ABSENT:
            continue
        pages = run.pages
        done = _drop(core, run) if tier == EVERYWHERE else _move_out(core, run, tier)
        if done:
            gone += pages
        else:
            kept += pages
    return EvictResult(gone, kept)


def _drop(core: Core, run: Run) -> bool:
    """Drop a run from every tier, unless someone holds it or something hangs below it."""
    if run.anchors or any(run.pins) or run.tree.child_runs(run):
        return False
    plan.drop(core, run)
    return True


def _move_out(core: Core, run: Run, tier: int) -> bool:
    """Make a run leave one tier: at once if it stands elsewhere, else by a demotion."""
    if run.state[tier] != RESIDENT or run.pins[tier]:
        return False
    leaf = not run.below[tier]
    if run.live > 1:
        if leaf:
            plan.evict(core, run, tier, run.pages)
        return leaf
    lower = room.lower_tier(core, core.pool(run, tier))
    if lower < 0:
        return leaf and _drop(core, run)
    # What stands above pages that are still leaving is only copied: it can leave when they have.
    started = copies.copy_down(core, run, lower, room.make_room_below, drain_from=tier if leaf else -1)
    return started and leaf


def page_corrupt(core: Core, event: PageCorrupt) -> None:
    """A reader found that the last page of this prompt is not what was stored in a tier."""
    namespace = core.namespaces[event.namespace]
    pages = len(event.prompt) // namespace.tree.symbol_bytes
    path = core.cut(namespace, namespace.tree.trace(event.prompt))
    if not path or sum(run.pages for run in path) != pages:
        return
    _lose_page(core, path[-1], path[-1].pages - 1, event.tier)


def pages_lost(core: Core, event: PagesLost) -> None:
    """A keyed tier found damage before anybody asked for the page. O(runs): keys are not indexed, and rot is rare."""
    wanted = set(event.keys)
    todo = [run for run in core.runs.values() if run.packed_keys is not None]
    while todo and wanted:
        run = todo.pop()
        if run.id not in core.runs:
            continue
        page, key = _page_of(run, wanted)
        if page < 0:
            continue
        wanted.discard(key)
        tail = core.split(run, page + 1) if page + 1 < run.pages else None
        _lose_page(core, run, page, event.tier)
        todo += [run] if tail is None else [run, tail]


def _page_of(run: Run, keys: set[bytes]) -> tuple[int, bytes]:
    """The first of these keys that a page of the run has, and that page; -1 if none."""
    packed = run.packed_keys or b""
    for key in keys:
        at = packed.find(key)
        while at >= 0 and at % KEY_BYTES:
            at = packed.find(key, at + 1)
        if at >= 0:
            return at // KEY_BYTES, key
    return -1, b""


def _lose_page(core: Core, run: Run, page: int, tier: int) -> None:
    """One page of a run, its last one, is not in a tier any more."""
    if run.state[tier] not in {RESIDENT, DRAINING}:
        return
    if page:
        run = core.split(run, page)
    if run.state[tier] == DRAINING:
        core.rescue(run)
    if (run.id, tier) not in core.condemned:
        core.counters.corrupt_pages[tier] += 1
        core.void(run, tier)


def tier_latched(core: Core, event: TierLatched) -> None:
    """A tier takes no more pages; if it cannot be read either, what it held is gone. O(runs) then."""
    core.writable[event.tier] = False
    core.room_changed = True
    if event.readable or not core.readable[event.tier]:
        return
    core.readable[event.tier] = False
    if event.tier == core.durable_tier:
        recovery.drop_stranded(core, 0)
    for run in list(core.runs.values()):
        if run.id not in core.runs:
            continue
        if run.state[event.tier] == DRAINING:
            core.rescue(run)
        if run.state[event.tier] == RESIDENT:
            core.void(run, event.tier)


def tier_restored(core: Core, event: TierRestored) -> None:
    """A tier takes pages again. What it lost under pages that it kept is copied there once more."""
    core.writable[event.tier] = core.readable[event.tier] = True
    core.room_changed = True
    if event.tier == core.durable_tier:
        for run in sorted(core.gaps, key=lambda run: run.id):
            if run.live:
                core.save_early(run, event.tier - 1)
