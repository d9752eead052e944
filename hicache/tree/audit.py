"""The tree's invariants, computed from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hicache.errors import ViolationError
from hicache.keys import KEY_BYTES
from hicache.tree.node import ABSENT, LIVE, Node, Run
from hicache.types import Residency

if TYPE_CHECKING:
    from hicache.tree.tree import Tree

_STATES = frozenset(int(state) for state in Residency)


def audit(tree: Tree) -> None:
    """Raise ViolationError for the first invariant that does not hold. O(everything)."""
    root = tree.root
    _demand(not (root.edge or root.runs or root.holes or root.parent), root, "the root stays empty")
    found = [root, *tree.walk()]
    ids: set[int] = set()
    for node in found:
        _audit_node(tree, node)
        for run in node.runs:
            _demand(run.id not in ids, run, "one run, one id")
            ids.add(run.id)
            _audit_run(tree, run)
    _audit_below(tree, found)


def _demand(holds: object, where: object, rule: str) -> None:
    if not holds:
        raise ViolationError(f"tree: {where}: broken rule: {rule}")


def _audit_node(tree: Tree, node: Node) -> None:
    width = tree.symbol_bytes
    for symbol, child in node.children.items():
        _demand(child.parent is node, child, "a child names its parent")
        _demand(symbol == child.edge[:width], child, "a child is filed under its first symbol")
        _demand(child.runs, child, "a node has runs")
    end = 0
    for run in node.runs:
        _demand(run.node is node, run, "a run names its node")
        _demand(run.start == end, run, "runs cover the edge without gaps")
        end += run.pages
    _demand(len(node.edge) == end * width, node, "runs cover the edge to its end")
    _demand(
        node.holes == sum(not run.live for run in node.runs), node, "holes are the runs without live pages"
    )


def _audit_run(tree: Tree, run: Run) -> None:
    lists = (run.state, run.slots, run.pins, run.below)
    _demand(run.tree is tree, run, "a run names its tree")
    _demand(run.pages > 0, run, "a run has pages")
    _demand(all(len(each) == tree.tiers for each in lists), run, "one entry a tier")
    _demand(_STATES.issuperset(run.state), run, "states are residencies")
    _demand(run.live == sum(state in LIVE for state in run.state), run, "live counts readable tiers")
    _demand(min(run.anchors, *run.pins) >= 0, run, "pins and anchors are counts")
    keys = run.packed_keys
    _demand(keys is None or len(keys) == run.pages * KEY_BYTES, run, "one key a page")
    for state, slots in zip(run.state, run.slots, strict=True):
        _demand(slots is None or state != ABSENT, run, "absent pages have no slots")
        _demand(slots is None or len(slots) == run.pages, run, "one slot a page")
    for holder in run.holders:
        _demand(holder.runs.count(run) == 1, run, "a holder lists what it holds, once")


def _audit_below(tree: Tree, found: list[Node]) -> None:
    """Recount ``below`` from the leaves up: ``found`` lists a parent before its children."""
    present: dict[int, list[bool]] = {}
    for node in reversed(found):
        following = [child.runs[0] for child in node.children.values()]
        for run in reversed(node.runs):
            below = [sum(present[each.id][tier] for each in following) for tier in range(tree.tiers)]
            _demand(run.below == below, run, f"below counts the next runs that lead to pages: {below}")
            pairs = zip(run.state, below, strict=True)
            present[run.id] = [state != ABSENT or count > 0 for state, count in pairs]
            following = [run]
