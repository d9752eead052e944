"""Operators' events, and what tiers report of themselves."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from hicache.engine import commits, copies, plan, room
from hicache.engine.actions import EvictResult
from hicache.engine.core import ABSENT, DRAINING, RESIDENT, Core
from hicache.engine.events import Clear, Evict, PageCorrupt, Recovered, TierLatched
from hicache.engine.holders import ChainEnd, NamespaceState
from hicache.tree import Run

EVERYWHERE = -1


def evict(core: Core, event: Evict) -> None:
    """Make a prefix and all below it leave one tier, or all."""
    namespace = core.namespaces[event.namespace]
    path = core.cut(namespace, namespace.tree.trace(event.prompt))
    width = namespace.tree.symbol_bytes
    whole = sum(run.pages for run in path) == len(event.prompt) // width
    targets = [*path, *plan.below(path[-1])] if path and whole else path
    if not event.prompt:
        targets = _all_runs(namespace)
    core.reply(event.request, _evict_all(core, targets, event.tier))


def clear(core: Core, event: Clear) -> None:
    """Drop whatever nobody holds, of one namespace or of all."""
    chosen = [core.namespaces[event.namespace]] if event.namespace else list(core.namespaces.values())
    targets = [run for namespace in chosen for run in _all_runs(namespace)]
    core.reply(event.request, _evict_all(core, targets, EVERYWHERE))


def _all_runs(namespace: NamespaceState) -> list[Run]:
    """Parents before children."""
    return [run for node in namespace.tree.walk() for run in node.runs]


def _evict_all(core: Core, targets: list[Run], tier: int) -> EvictResult:
    gone = kept = 0
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
    run = path[-1]
    if run.state[event.tier] not in {RESIDENT, DRAINING}:
        return
    if run.pages > 1:
        run = core.split(run, run.pages - 1)
    if run.state[event.tier] == DRAINING:
        core.rescue(run)
    if (run.id, event.tier) not in core.condemned:
        core.counters.corrupt_pages[event.tier] += 1
        core.void(run, event.tier)


def tier_latched(core: Core, event: TierLatched) -> None:
    """A tier takes no more pages; if it cannot be read either, what it held is gone. O(runs) then."""
    core.writable[event.tier] = False
    core.room_changed = True
    if event.readable or not core.readable[event.tier]:
        return
    core.readable[event.tier] = False
    for run in list(core.runs.values()):
        if run.id not in core.runs:
            continue
        if run.state[event.tier] == DRAINING:
            core.rescue(run)
        if run.state[event.tier] == RESIDENT:
            core.void(run, event.tier)


# --- recovery


def recovered(core: Core, event: Recovered) -> None:
    """Hang what a durable tier held at start into the tree.

    Until all is there, the end of each chain is pinned in the tier, lest it go before what hangs below it comes.
    """
    namespace = core.namespaces[event.namespace]
    tree = namespace.tree
    core.next_tick()
    for parent, symbols, keys, charges in zip(
        event.parents, event.symbols, event.keys, event.charges, strict=True
    ):
        end = ChainEnd(event.tier)
        namespace.recovered.append(end)
        above = namespace.recovered[parent].last if parent >= 0 else None
        lost = above is None or above.state[event.tier] == ABSENT
        if not keys or not core.readable[event.tier] or (parent >= 0 and lost):
            core.free_keys(event.tier, list(keys))  # the tier, or the page above, has been lost meanwhile
            continue
        before = tree.prompt_to(above) if above is not None else b""
        run = _lay_recovered(core, namespace, before + symbols, event.tier, (keys, charges))
        core.hold(end, run)
        core.pin(run, event.tier)
    if event.done:
        _end_recovery(core, namespace, event.tier)


def _end_recovery(core: Core, namespace: NamespaceState, tier: int) -> None:
    """Let go of the chains; pages beyond the tier's capacity, which may be smaller by now, leave."""
    for end in namespace.recovered:
        for run in list(end.runs):
            core.unpin(run, tier)
            core.let_go(end, run)
    namespace.recovered = []
    pool = namespace.pools[tier]
    if pool.available < 0:
        room.make_room(core, pool, 0, namespace.page_bytes, drop=True)


def _lay_recovered(
    core: Core,
    namespace: NamespaceState,
    prompt: bytes,
    tier: int,
    found: tuple[Sequence[bytes], Sequence[int]],
) -> Run:
    """Give recovered pages, the last ones of a prompt, their place; one that was stored anew gains its old copy.

    Returns the run in which they end. A page that the tier has or gets anyway is of the same key: it replaces the old.
    """
    keys, charges = found
    tree = namespace.tree
    first = len(prompt) // tree.symbol_bytes - len(charges)
    path = core.cut(namespace, tree.trace(prompt))
    page = 0
    for run in commits.from_page(core, path, first):
        if run.state[tier] == ABSENT:
            _appear(core, run, tier, charges[page : page + run.pages])
        page += run.pages
    if page < len(charges):
        run = tree.insert(prompt, path[-1] if path else None, first + page, len(charges) - page)
        core.adopt(run, namespace)
        run.keys = list(keys[page:])
        _appear(core, run, tier, charges[page:])
    return run


def _appear(core: Core, run: Run, tier: int, charges: Sequence[int]) -> None:
    places = array("q", charges)
    core.pool(run, tier).used += sum(places)
    core.appear(run, tier, places)
    core.counters.recovered_pages += run.pages
