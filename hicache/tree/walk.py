"""Matching: the read-only walk from the root along a prompt.

One memcmp a node. Only where the prompt leaves an edge is the page found by bisection; runs are looked at
only in a node that has holes.
"""

from __future__ import annotations

from hicache.tree.node import Match, Node


def walk_live(root: Node, prompt: bytes, width: int) -> Match:
    """The longest known prefix without a hole. O(pages) in memcmp, O(nodes) in Python."""
    nodes: list[Node] = []
    children = root.children
    edge: bytes | bytearray = b""
    offset = 0
    startswith = prompt.startswith
    while (child := children.get(prompt[offset : offset + width])) is not None:
        if child.holes or not startswith(child.edge, offset):
            return _end_within(child, prompt, offset, nodes, width)
        edge = child.edge
        offset += len(edge)
        nodes.append(child)
        children = child.children
    return Match(offset // width, nodes, len(edge) // width)


def walk_all(root: Node, prompt: bytes, width: int) -> Match:
    """The longest prefix that has a place in the tree, holes included. Costs as ``walk_live``."""
    nodes: list[Node] = []
    node = root
    offset = 0
    while (child := node.children.get(prompt[offset : offset + width])) is not None:
        nodes.append(child)
        if not prompt.startswith(child.edge, offset):
            pages = _common_pages(child.edge, prompt, offset, width)
            return Match(offset // width + pages, nodes, pages)
        offset += len(child.edge)
        node = child
    return Match(offset // width, nodes, len(node.edge) // width)


def _end_within(node: Node, prompt: bytes, offset: int, nodes: list[Node], width: int) -> Match:
    """The match that ends in ``node``, at a hole or where the prompt differs; ``nodes`` come before it."""
    pages = _common_pages(node.edge, prompt, offset, width)
    if node.holes:
        pages = min(pages, next(run.start for run in node.runs if not run.live))
    if pages:
        nodes.append(node)
        return Match(offset // width + pages, nodes, pages)
    return Match(offset // width, nodes, len(nodes[-1].edge) // width if nodes else 0)


def _common_pages(edge: bytes | bytearray, prompt: bytes, offset: int, width: int) -> int:
    """Whole pages at the start of ``edge`` that ``prompt`` has at ``offset``.

    Bisection over page boundaries; each step compares only what the last one left open, so the bytes compared
    and copied sum up to about one edge.
    """
    low = 0
    high = min(len(edge), len(prompt) - offset) // width
    probe = high  # first ask for everything: the usual reason to be here is that the prompt ends first
    while low < high:
        if prompt.startswith(edge[low * width : probe * width], offset + low * width):
            low = probe
        else:
            high = probe - 1
        probe = (low + high + 1) // 2
    return low
