"""Operators' events, and what tiers report of themselves."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from hicache.engine import copies, reservations, room
from hicache.engine.actions import EvictResult, Free
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
    targets = [*path, *room.below(path[-1])] if path and whole else path
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
        pages = run.pages
        done = _drop(core, run) if tier == EVERYWHERE else _move_out(core, run, tier)
        if done:
            gone += pages
        else:
            kept += pages
    return EvictResult(gone, kept)


def _drop(core: Core, run: Run) -> bool:
    """Drop a run from every tier, unless someone holds it or something hangs below it."""
    if run.anchors or any(run.pins) or run.tree.child_runs(run) or DRAINING in run.state:
        return False
    for tier in core.tier_range:
        if run.state[tier] == RESIDENT:
            core.leave(run, tier)
    core.counters.dropped_pages[len(core.tiers) - 1] += run.pages
    core.prune(run)
    return True


def _move_out(core: Core, run: Run, tier: int) -> bool:
    """Make a run leave one tier: at once if it stands elsewhere, else by a demotion."""
    if run.state[tier] != RESIDENT or run.pins[tier] or run.below[tier]:
        return run.state[tier] == ABSENT
    if run.live > 1:
        room.evict(core, run, tier, run.pages)
        return True
    lower = room.lower_tier(core, tier)
    if lower < 0:
        return _drop(core, run)
    return copies.copy_down(core, run, lower, room.room_maker(core), drain_from=tier)


def page_corrupt(core: Core, event: PageCorrupt) -> None:
    """A reader found that the last page of this prompt is not what was stored in a tier."""
    namespace = core.namespaces[event.namespace]
    pages = len(event.prompt) // namespace.tree.symbol_bytes
    path = core.cut(namespace, namespace.tree.trace(event.prompt))
    if sum(run.pages for run in path) != pages:
        return
    run = path[-1]
    if run.pages > 1:
        run = core.split(run, run.pages - 1)
    if run.state[event.tier] == DRAINING:
        core.rescue(run)
    if run.state[event.tier] == RESIDENT:
        core.counters.corrupt_pages[event.tier] += 1
        core.void(run, event.tier)


def tier_latched(core: Core, event: TierLatched) -> None:
    """A tier takes no more pages; if it cannot be read either, what it held is gone."""
    core.writable[event.tier] = False
    core.room_changed = True
    if event.readable:
        return
    for run in list(core.runs.values()):
        if run.id not in core.runs:
            continue
        if run.state[event.tier] == DRAINING:
            core.rescue(run)
        if run.state[event.tier] == RESIDENT:
            core.void(run, event.tier)


def recovered(core: Core, event: Recovered) -> None:
    """Hang what a durable tier held at start into the tree."""
    namespace = core.namespaces[event.namespace]
    tree = namespace.tree
    core.next_tick()
    for parent, symbols, keys, charges in zip(
        event.parents, event.symbols, event.keys, event.charges, strict=True
    ):
        end = ChainEnd()
        namespace.recovered.append(end)
        above = namespace.recovered[parent].last if parent >= 0 else None
        if parent >= 0 and (above is None or above.state[event.tier] == ABSENT):
            core.emit(Free(event.tier, (), list(keys)))  # the page above went meanwhile
            continue
        before = tree.prompt_to(above) if above is not None else b""
        first = len(before) // tree.symbol_bytes
        run = _lay_recovered(core, namespace, before + symbols, first, event.tier, (keys, charges))
        if run is not None:
            core.hold(end, run)
    if event.done:
        for end in namespace.recovered:
            for run in list(end.runs):
                core.let_go(end, run)
        namespace.recovered = []


def _lay_recovered(
    core: Core,
    namespace: NamespaceState,
    prompt: bytes,
    first: int,
    tier: int,
    found: tuple[Sequence[bytes], Sequence[int]],
) -> Run | None:
    """Give recovered pages their place; a page that a client has stored anew meanwhile gains its old copy.

    Returns the run in which they end, None if the tier knows them already.
    """
    keys, charges = found
    pool = namespace.pools[tier]
    page = 0
    run: Run | None = None
    for run in reservations.from_page(core, core.cut(namespace, namespace.tree.trace(prompt)), first):
        if run.state[tier] == ABSENT:
            _appear(core, run, tier, charges[page : page + run.pages])
            core.holes.discard(run)
        else:
            core.emit(Free(tier, (), list(keys[page : page + run.pages])))
        page += run.pages
    if page < len(charges):
        path = core.cut(namespace, namespace.tree.trace(prompt))
        run = namespace.tree.insert(prompt, path[-1] if path else None, first + page, len(charges) - page)
        core.adopt(run, namespace)
        run.keys = list(keys[page:])
        _appear(core, run, tier, charges[page:])
    core.counters.recovered_pages += len(charges)
    assert pool.used >= 0
    return run


def _appear(core: Core, run: Run, tier: int, charges: Sequence[int]) -> None:
    places = array("q", charges)
    core.pool(run, tier).used += sum(places)
    core.place(run, tier, places)
    core.set_state(run, tier, RESIDENT)
