"""The ends of paths: where a match ends, what may follow, and tails that leave without a split.

A *tip* is a run at the end of a childless node that stands in one tier only and that nobody holds. Most of what
eviction takes are tips, or the last pages of one.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from hicache.errors import ViolationError
from hicache.keys import KEY_BYTES
from hicache.tree.edit import add_pages, drop_last_run, shorten
from hicache.tree.node import ABSENT, RESIDENT, Match, Run, count_above, index_at, parent_run

if TYPE_CHECKING:
    from hicache.tree.tree import Tree


def last_run(tree: Tree, match: Match) -> tuple[Run, int]:
    """The run in which a match that is not empty ends, and how many of its pages are matched. O(log runs)."""
    node = match.nodes[-1]
    pages = match.last_pages
    whole = pages * tree.symbol_bytes == len(node.edge)
    run = node.runs[-1 if whole else index_at(node, pages) - 1]
    return run, pages - run.start


def is_new(tree: Tree, prompt: bytes, after: Run | None, page: int) -> bool:
    """Whether a page of a prompt has no place yet. ``after``: the run that ends just before it, None at the root.

    O(1).
    """
    width = tree.symbol_bytes
    symbol = prompt[page * width : (page + 1) * width]
    if after is None:
        return page == 0 and symbol not in tree.root.children
    node = after.node
    if node.runs[-1] is after:
        return symbol not in node.children
    end = (after.start + after.pages) * width
    return node.edge[end : end + width] != symbol


def is_tip(run: Run, tier: int) -> bool:
    """Whether the run is a tip that stands in this tier. O(tiers)."""
    node = run.node
    state = run.state
    return (
        not node.children
        and node.runs[-1] is run
        and state[tier] == RESIDENT
        and state.count(ABSENT) == len(state) - 1
        and not (run.anchors or run.holders or any(run.pins))
    )


def _ends_path(run: Run) -> bool:
    """The part of ``is_tip`` that the shape of the tree depends on; the caller has asked for all of it."""
    node = run.node
    return not node.children and node.runs[-1] is run


def trim_tip(run: Run, tier: int, pages: int) -> array[int]:
    """Take the last pages of a tip, not all of them, out of the tree; returns their slots.

    O(pages left in the node), a long edge as in ``Tree.prune``.
    """
    slots = run.slots[tier]
    keep = run.pages - pages
    if slots is None or keep < 1 or not _ends_path(run):
        raise ViolationError(f"trim: {run} cannot lose {pages} pages")
    gone = slots[keep:]
    del slots[keep:]
    run.pages = keep
    if run.packed_keys is not None:
        run.packed_keys = run.packed_keys[: keep * KEY_BYTES]
    shorten(run.node, (run.start + keep) * run.tree.symbol_bytes)
    return gone


def drop_tip(run: Run, tier: int) -> tuple[Run | None, Run | None]:
    """Take a tip out of the tree: as ``set_state`` to ABSENT and ``prune`` of this run alone.

    Returns the run above it, and the one that became a leaf of the tier, if there is one. Cost as of these two.
    """
    if not _ends_path(run):
        raise ViolationError(f"drop: {run} is no tip")
    above = parent_run(run)
    leaf = count_above(above, tier, -1)
    drop_last_run(run, run.tree.symbol_bytes)
    run.state[tier] = ABSENT
    run.slots[tier] = None
    run.live = 0
    return above, leaf


def add_tip(
    tree: Tree, after: Run | None, symbols: bytes, tier: int, slots: array[int]
) -> tuple[Run, Run | None]:
    """Give pages just after ``after`` a place, RESIDENT in one tier: ``insert``, ``set_slots`` and ``set_state``.

    Returns the run, and the one above that ceased to be a leaf of the tier, if there is one. Cost as of these three.
    Raises ViolationError if the pages have a place already, or for another number of slots.
    """
    if len(slots) * tree.symbol_bytes != len(symbols) or not slots:
        raise ViolationError(f"add: {len(slots)} slots for {len(symbols)} bytes of symbols")
    run = add_pages(tree, after, symbols)
    run.slots[tier] = slots
    run.state[tier] = RESIDENT
    run.live = 1
    run.node.holes -= 1
    return run, count_above(after, tier, 1)
