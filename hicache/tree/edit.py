"""Adding pages to nodes and taking them away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hicache.errors import ViolationError
from hicache.tree.node import ABSENT, Node, Run, index_at

if TYPE_CHECKING:
    from hicache.tree.tree import Tree

#: Longer edges are not extended (each time would copy them), and are shortened in place.
LONG_EDGE_BYTES = 64 * 1024


def add_pages(tree: Tree, after: Run | None, symbols: bytes) -> Run:
    """A new run of these symbols just after ``after``. Raises ViolationError if they already have a place."""
    node = _end_node(tree, after, symbols)
    width = tree.symbol_bytes
    if after is not None and not node.children and len(node.edge) < LONG_EDGE_BYTES:
        start = len(node.edge) // width
        node.edge += symbols
    else:
        start = 0
        node.children[symbols[:width]] = node = Node(symbols, node)
    run = Run(tree, node, start, len(symbols) // width)
    node.runs.append(run)
    node.holes += 1
    return run


def hang_node(tree: Tree, after: Run | None, symbols: bytes) -> Run | None:
    """A new run in a node of its own after ``after``; None where that takes more than hanging it there."""
    node = tree.root if after is None else after.node
    if after is not None and node.runs[-1] is not after:
        return None
    first = symbols[: tree.symbol_bytes]
    if first in node.children:
        return None
    node.children[first] = node = Node(symbols, node)
    run = Run(tree, node, 0, len(symbols) // tree.symbol_bytes)
    node.runs.append(run)
    node.holes = 1
    return run


def _end_node(tree: Tree, after: Run | None, symbols: bytes) -> Node:
    """The node at whose end pages go that follow ``after``: split off if the run is not its node's last."""
    width = tree.symbol_bytes
    first = symbols[:width]
    node = tree.root if after is None else after.node
    if after is None or node.runs[-1] is after:
        if first in node.children:
            raise ViolationError(f"insert: the page after {after} already has a place")
        return node
    end = (after.start + after.pages) * width
    if node.edge[end : end + width] == first:
        raise ViolationError(f"insert: the page after {after} already has a place")
    return _split_node(node, index_at(node, after.start) + 1, width)


def _split_node(node: Node, index: int, width: int) -> Node:
    """Move the runs before ``index`` into a new node above. O(runs of the node).

    The lower part keeps the node object, so that children, of which there may be many, are not touched.
    """
    parent = node.parent
    assert parent is not None and 0 < index < len(node.runs)
    pages = node.runs[index].start
    upper = Node(node.edge[: pages * width], parent)
    parent.children[bytes(upper.edge[:width])] = upper
    upper.runs = node.runs[:index]
    for run in upper.runs:
        run.node = upper
        upper.holes += not run.live
    del node.runs[:index]
    for run in node.runs:
        run.start -= pages
    node.holes -= upper.holes
    node.edge = node.edge[pages * width :]
    node.parent = upper
    upper.children[bytes(node.edge[:width])] = node
    return upper


def removable(run: Run) -> bool:
    """Whether nothing would miss the run: ABSENT everywhere, nothing after it, and not held. O(tiers)."""
    node = run.node
    return (
        not node.children
        and bool(node.runs)
        and node.runs[-1] is run
        and run.state.count(ABSENT) == len(run.state)
        and not (run.anchors or run.holders or any(run.pins))
    )


def drop_last_run(run: Run, width: int) -> None:
    """Remove the last run of a childless node, and the node if it was its only one."""
    node = run.node
    parent = node.parent
    assert parent is not None
    if not run.start:
        del parent.children[bytes(node.edge[:width])]
    node.runs.pop()
    node.holes -= not run.live
    shorten(node, run.start * width)


def shorten(node: Node, keep: int) -> None:
    """Let a node's edge end after ``keep`` bytes."""
    if isinstance(node.edge, bytearray):
        del node.edge[keep:]
    elif len(node.edge) < LONG_EDGE_BYTES:
        node.edge = node.edge[:keep]
    else:  # one copy now, so that taking a long edge away in small pieces stays cheap
        node.edge = bytearray(node.edge[:keep])
