"""What can be read off an engine without changing it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from hicache.engine.core import DRAINING, FILLING, RESIDENT, TICKS_PER_MS, Core
from hicache.engine.counters import Counters
from hicache.engine.holders import NamespaceState
from hicache.tree import Node


@dataclasses.dataclass(frozen=True, slots=True)
class MatchView:
    """How much of a prompt is cached: columns of runs with one best tier, in page order."""

    pages: int
    run_pages: list[int]
    run_tier: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class PagePlace:
    """A page is in this tier, and serves; ``slot`` is -1 in a keyed one."""

    tier: int
    slot: int


@dataclasses.dataclass(frozen=True, slots=True)
class OperationView:
    """How an operation stands. ``lease`` 0: it belongs to none."""

    done: bool
    moved_pages: int
    failed_pages: int
    lease: int


@dataclasses.dataclass(frozen=True, slots=True)
class TierView:
    """Occupancy of one tier, in bytes that count against its capacity and in pages."""

    name: str
    kind: str
    writable: bool
    capacity_bytes: int
    used_bytes: int
    pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. ``counters`` is the live object: read it at once."""

    tiers: list[TierView]
    counters: Counters
    sessions: int
    leases: int
    reservations: int
    waiting: int
    copies: int
    namespaces: int
    nodes: int
    runs: int
    pages: int
    stranded_pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class NodeView:
    """One node for people to look at. ``digest``: 8 bytes of a hash of its first symbol, no content."""

    id: int
    parent: int
    namespace: str
    depth_pages: int
    pages: int
    digest: bytes
    tier_pages: list[int]
    pinned_pages: int
    hits: int
    idle_ms: int
    children: int


def match(namespace: NamespaceState, prompt: bytes) -> MatchView:
    """The longest cached prefix, with the fastest tier of each stretch."""
    tree = namespace.tree
    found = tree.match(prompt)
    pages: list[int] = []
    tiers: list[int] = []
    if not found.pages:
        return MatchView(0, pages, tiers)
    runs, last = tree.runs(found)
    for run in runs:
        state = run.state
        tier = state.index(RESIDENT) if RESIDENT in state else state.index(DRAINING)
        if tiers and tiers[-1] == tier:
            pages[-1] += run.pages
        else:
            tiers.append(tier)
            pages.append(run.pages)
    pages[-1] -= runs[-1].pages - last
    return MatchView(found.pages, pages, tiers)


def page_places(core: Core, namespace: NamespaceState, prompt: bytes) -> list[PagePlace]:
    """The tiers in which the last page of a prompt is resident; none where the prompt does not match to its end."""
    tree = namespace.tree
    pages = len(prompt) // tree.symbol_bytes
    found = tree.match(prompt)
    if not pages or found.pages != pages:
        return []
    runs, inside = tree.runs(found)
    run = runs[-1]
    at = inside - 1
    places = []
    for tier, spec in enumerate(core.tiers):
        slots = run.slots[tier]
        if run.state[tier] == RESIDENT and (run.id, tier) not in core.condemned:
            places.append(PagePlace(tier, -1 if spec.keyed or slots is None else slots[at]))
    return places


def stats(core: Core) -> EngineStats:
    """Occupancy and counts. O(runs); with holes, O(runs times depth)."""
    tiers = []
    for index, spec in enumerate(core.tiers):
        used = sum(
            _used_bytes(pool.used, pool.page_bytes) for key, pool in core.pools.items() if key[0] == index
        )
        counts = core.counters.pages[index]
        held = counts[FILLING] + counts[RESIDENT] + counts[DRAINING]
        tiers.append(
            TierView(spec.name, spec.kind.value, core.writable[index], spec.capacity_bytes, used, held)
        )
    live = [run for run in core.runs.values() if run.live]
    return EngineStats(
        tiers,
        core.counters,
        len(core.sessions),
        len(core.leases),
        len(core.reservations),
        sum(len(pool.waiters) for pool in core.pools.values()),
        len(core.copies) + len(core.ingests),
        len(core.namespaces),
        len({id(run.node) for run in core.runs.values()}),
        len(core.runs),
        sum(run.pages for run in live),
        core.stranded.pages + (sum(run.pages for run in live if _stranded(core, run)) if core.holes else 0),
    )


def _used_bytes(units: int, page_bytes: int) -> int:
    return units * page_bytes if page_bytes else units


def _stranded(core: Core, run: object) -> bool:
    above = run.tree.parent_run(run)  # type: ignore[attr-defined]
    while above is not None:
        if not above.live:
            return True
        above = above.tree.parent_run(above)
    return False


def describe(namespace: NamespaceState) -> str:
    """A namespace in one short line."""
    spec = namespace.spec
    parts = [
        spec.tenant,
        spec.model,
        spec.revision,
        spec.adapter,
        spec.kv_dtype,
        f"{spec.page_tokens} tokens a page",
    ]
    return " · ".join(part for part in parts if part)


def tree_view(core: Core, chosen: Sequence[NamespaceState], max_nodes: int) -> tuple[list[NodeView], int]:
    """Nodes, parents before children, at most ``max_nodes``; and how many were left out."""
    views: list[NodeView] = []
    omitted = 0
    for namespace in chosen:
        numbers: dict[int, int] = {}
        for node in namespace.tree.walk():
            if len(views) >= max_nodes:
                omitted += 1
                continue
            numbers[id(node)] = len(views) + 1
            views.append(_node_view(core, namespace, node, numbers))
    return views, omitted


def _node_view(core: Core, namespace: NamespaceState, node: Node, numbers: dict[int, int]) -> NodeView:
    width = namespace.tree.symbol_bytes
    top = node.parent is namespace.tree.root
    tier_pages = [
        sum(run.pages for run in node.runs if run.state[tier] == RESIDENT) for tier in core.tier_range
    ]
    newest = max(run.tick for run in node.runs)
    return NodeView(
        numbers[id(node)],
        numbers.get(id(node.parent), 0),
        describe(namespace) if top else "",
        namespace.tree.depth_pages(node.runs[0]),
        len(node.edge) // width,
        hashlib.sha256(namespace.fingerprint + node.edge[:width]).digest()[:8],
        tier_pages,
        sum(run.pages for run in node.runs if any(run.pins)),
        max(run.hits for run in node.runs),
        max(core.now_ms - newest // TICKS_PER_MS, 0),
        len(node.children),
    )
