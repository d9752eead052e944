"""Evicting and dropping tips of slotted tiers in one step: what ``split``, ``leave`` and ``prune`` would come to.

A tip stands in one tier only, at the end of its path, and nobody holds it (``tree/tips.py``). Where a tier is the last
one, nearly all victims are tips or their last pages, and a new run that is pruned at once would be most of the cost.
"""

from __future__ import annotations

from array import array

from hicache.engine.actions import Free
from hicache.engine.core import ABSENT, RESIDENT, Core
from hicache.engine.pools import Pool
from hicache.tree import Run
from hicache.tree.tips import drop_tip, trim_tip


def evict(core: Core, run: Run, tier: int, pages: int) -> None:
    """Take the last ``pages`` of a tip out of its tier and the tree."""
    pool: Pool = run.extra.pools[tier]  # type: ignore[attr-defined]  # hot: no cast, no call
    policy = pool.policy
    if core.warmed and run in core.warmed:
        core.counters.unused_prefetched_pages += pages
    ghosts = core.page_ids(run)[-pages:] if policy.wants_ghosts else ()
    if pages < run.pages:
        policy.trim(run.id, pages, ghosts)
        _gone(core, pool, trim_tip(run, tier, pages))
        return
    policy.forget(run.id, ghosts)
    places = run.slots[tier]
    assert places is not None, "a page without a place left a tier"
    above, leaf = drop_tip(run, tier)
    core.forget_run(run)
    if leaf is not None and leaf.state[tier] == RESIDENT and not leaf.pins[tier]:
        policy.expose(leaf.id)
    _gone(core, pool, places)
    if above is not None and not above.live:
        core.prune(above)


def _gone(core: Core, pool: Pool, places: array[int]) -> None:
    """Pages that were RESIDENT have given up their slots."""
    pool.give_back(places)
    core.emit(Free(pool.tier, places, ()))
    counts = core.counters.pages[pool.tier]
    counts[RESIDENT] -= len(places)
    counts[ABSENT] += len(places)
    core.room_changed = True
