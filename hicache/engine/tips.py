"""Evicting and dropping tips of slotted tiers in one step: what ``split``, ``leave`` and ``prune`` would come to.

A tip stands in one tier only, at the end of its path, and nobody holds it (``tree/tips.py``). Where a tier is the last
one, nearly all victims are tips or their last pages, and a new run that is pruned at once would be most of the cost.
"""

from __future__ import annotations

from array import array

from hicache.engine.actions import Free
from hicache.engine.core import ABSENT, RESIDENT, Core
from hicache.engine.holders import Reservation
from hicache.engine.names import ids_of_hashes
from hicache.engine.pools import Pool
from hicache.engine.steps import stretches
from hicache.policy import RunInfo
from hicache.tree import Run
from hicache.tree.tips import add_tip, drop_tip, is_tip, trim_tip

FIRST = 0  # commits land in the first tier


def evict(core: Core, run: Run, tier: int, pages: int) -> None:
    """Take the last ``pages`` of a tip out of its tier and the tree."""
    pool: Pool = run.extra.pools[tier]  # type: ignore[attr-defined]  # hot: no cast, no call
    _gone(core, pool, _take(core, pool, run, pages))


def evict_first(core: Core, pool: Pool, need: int) -> int:
    """Evict tips as the policy gives them, until ``need`` slots are free or the next victim is no tip.

    What a plan would choose, without one. Returns how many slots that gave.
    """
    tier, first = pool.tier, pool.first
    assert first is not None, "this policy has no such method"
    places = array("q")
    while len(places) < need:
        ident = first()
        run = core.runs[ident] if ident is not None else None
        if run is None or not is_tip(run, tier):
            break
        places += _take(core, pool, run, min(run.pages, need - len(places)))
    if places:
        _gone(core, pool, places)
        core.counters.dropped_pages[tier] += len(places)
        core.counters.unsaved_dropped_pages += len(places) * bool(pool.lower_tiers)
    return len(places)


def _take(core: Core, pool: Pool, run: Run, pages: int) -> array[int]:
    """Take the last ``pages`` of a tip out of the policy and the tree; returns their slots."""
    tier, policy = pool.tier, pool.policy
    if core.warmed and run in core.warmed:
        core.counters.unused_prefetched_pages += pages
    if core.news is not None:
        core.news.trimmed(run, tier, pages)
    ghosts = core.page_ids(run)[-pages:] if policy.wants_ghosts else ()
    if pages < run.pages:
        policy.trim(run.id, pages, ghosts)
        return trim_tip(run, tier, pages)
    policy.forget(run.id, ghosts)
    places = run.slots[tier]
    assert places is not None, "a page without a place left a tier"
    above, leaf = drop_tip(run, tier)
    core.forget_run(run)
    if leaf is not None and leaf.state[tier] == RESIDENT and not leaf.pins[tier]:
        policy.expose(leaf.id)
        pool.eased += leaf.pages
    if above is not None and not above.live:
        core.prune(above)
    return places


def add(core: Core, reservation: Reservation, symbols: bytes, places: array[int]) -> list[Run]:
    """The first missing pages of a reservation, whose bytes have arrived in the first tier, hang below its anchor.

    They are tips, cut where the policy's ghosts begin or end as ``cut_at_ghosts`` does. Of tokens the ids are not known
    here.
    """
    namespace, use = reservation.namespace, reservation.use
    tree, policy = namespace.tree, namespace.pools[FIRST].policy
    after = reservation.runs[-1] if reservation.runs else None
    ids = ids_of_hashes(namespace, symbols) if policy.wants_ghosts else []
    parts = stretches(policy, ids) if ids else ((len(places), False),)
    runs: list[Run] = []
    start = 0
    for pages, known in list(parts):
        end = start + pages
        whole = pages == len(places)
        mine = symbols if whole else symbols[start * tree.symbol_bytes : end * tree.symbol_bytes]
        run, covered = add_tip(tree, after, mine, FIRST, places if whole else places[start:end])
        core.adopt(run, namespace, use)
        run.hits += known
        info = RunInfo(pages, reservation.present_pages + start, None, use.cls, use.turn, use.cost)
        ghosts = ids[start:end] if known else ()
        if start and ghosts and policy.known(ghosts) < pages:
            ghosts = ()  # what came before has pushed them out
        policy.insert(run.id, info, core.tick, ghosts)
        policy.expose(run.id)
        if covered is not None and covered.state[FIRST] == RESIDENT and not covered.pins[FIRST]:
            policy.hide(covered.id)
        if core.news is not None:
            core.news.gained(run, FIRST)
        runs.append(run)
        after, start = run, end
    counts = core.counters.pages[FIRST]
    counts[RESIDENT] += start
    counts[ABSENT] -= start
    return runs


def _gone(core: Core, pool: Pool, places: array[int]) -> None:
    """Pages that were RESIDENT have given up their slots."""
    pool.give_back(places)
    core.emit(Free(pool.tier, places, ()))
    counts = core.counters.pages[pool.tier]
    counts[RESIDENT] -= len(places)
    counts[ABSENT] += len(places)
    core.room_changed = True
