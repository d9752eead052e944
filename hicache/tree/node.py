"""Nodes, runs and matches: the tree's data, and the steps between neighbouring runs.

A node's edge is its pages' symbols in one bytes object; its runs cover the edge without gaps. The *next* runs
of a run are the run after it in its node or, for the last run, the first run of every child node. Seen that
way the runs form a tree of their own, over which ``below`` counts.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from hicache.keys import KEY_BYTES
from hicache.types import Residency

if TYPE_CHECKING:
    from hicache.tree.tree import Tree

#: Plain ints: an enum member costs a lookup wherever it is named, and these stand in the hottest lines.
ABSENT = int(Residency.ABSENT)
RESIDENT = int(Residency.RESIDENT)
LIVE = frozenset((int(Residency.RESIDENT), int(Residency.DRAINING)))

_START = attrgetter("start")


class Holder(Protocol):
    """Whoever holds runs (a lease, a reservation, a copy) and must follow their splits."""

    runs: list[Run]


class Node:
    """Consecutive pages between two branching points.

    ``edge`` is bytes, or a bytearray once a long edge was shortened (so that shortening it again moves
    nothing). The root has an empty edge and no runs.
    """

    __slots__ = ("children", "edge", "holes", "parent", "runs")

    def __init__(self, edge: bytes | bytearray, parent: Node | None) -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[bytes, Node] = {}  # by the first symbol of the child's edge
        self.runs: list[Run] = []  # in page order
        self.holes = 0  # runs with live == 0

    def __repr__(self) -> str:
        return f"Node({len(self.edge)} bytes, {len(self.runs)} runs, {len(self.children)} children)"


class Run:
    """Consecutive pages of one node with one residency and one history.

    Plain and mutable, but ``state``, ``slots``, ``below``, ``live`` and the place in the node change through
    the tree only. Lists are indexed by tier.
    """

    __slots__ = (
        "anchors",
        "below",
        "extra",
        "hits",
        "holders",
        "id",
        "live",
        "node",
        "packed_keys",
        "pages",
        "pins",
        "slots",
        "start",
        "state",
        "tick",
        "tree",
        "use",
    )

    def __init__(self, tree: Tree, node: Node, start: int, pages: int) -> None:
        tiers = tree.tiers
        self.id = next(tree.ids)
        self.tree = tree
        self.node = node
        self.start = start  # page offset in the node
        self.pages = pages
        self.state = [ABSENT] * tiers
        self.slots: list[array[int] | None] = [None] * tiers  # one entry a page
        self.pins = [0] * tiers
        self.below = [0] * tiers  # next runs that lead to a page not ABSENT, in their own state or below
        self.live = 0  # tiers in which the pages are RESIDENT or DRAINING
        self.tick = 0
        self.hits = 0
        self.anchors = 0  # holds on the run's end, below which pages are going to hang
        self.packed_keys: bytes | None = (
            None  # the page keys, joined, once they are known: a third of a list's room
        )
        self.holders: list[Holder] = []
        self.extra: object | None = None  # the engine's
        self.use: object | None = None  # the engine's, too: one object for many runs

    @property
    def keys(self) -> list[bytes] | None:
        """The page keys if they are known: a new list. O(pages)."""
        packed = self.packed_keys
        if packed is None:
            return None
        return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]

    @property
    def last_key(self) -> bytes | None:
        """The key of the last page if it is known."""
        return None if self.packed_keys is None else self.packed_keys[-KEY_BYTES:]

    def __repr__(self) -> str:
        return f"Run({self.id}, pages {self.start}..{self.start + self.pages}, state {self.state})"


class Match:
    """How far a prompt is known: ``nodes`` from the root down, the last one for ``last_pages`` of its pages.

    Valid until the tree next changes.
    """

    __slots__ = ("last_pages", "nodes", "pages")

    def __init__(self, pages: int, nodes: list[Node], last_pages: int) -> None:
        self.pages = pages
        self.nodes = nodes
        self.last_pages = last_pages

    def __repr__(self) -> str:
        return f"Match({self.pages} pages, {len(self.nodes)} nodes, {self.last_pages} pages of the last)"


def index_at(node: Node, page: int) -> int:
    """Index of the first run that starts at or after ``page``. O(log runs)."""
    return bisect_left(node.runs, page, key=_START)


def present(run: Run, tier: int) -> bool:
    """Whether the run or anything that follows it is not ABSENT in the tier. O(1)."""
    return run.state[tier] != ABSENT or run.below[tier] > 0


def parent_run(run: Run) -> Run | None:
    """The run just before this one, None at the root. O(log runs of the node)."""
    node = run.node
    if run.start:
        return node.runs[index_at(node, run.start) - 1]
    above = node.parent
    return above.runs[-1] if above is not None and above.runs else None


def next_runs(run: Run) -> list[Run]:
    """The runs just after this one. O(log runs of the node + children)."""
    node = run.node
    if node.runs[-1] is not run:
        return [node.runs[index_at(node, run.start) + 1]]
    return [child.runs[0] for child in node.children.values()]


def count_above(above: Run | None, tier: int, step: int) -> Run | None:
    """Tell the runs from ``above`` up that the one below has appeared (1) in a tier or vanished (-1) from it.

    Returns the present run whose count went from or to zero by that, if there is one.
    """
    while above is not None:
        before = above.below[tier]
        above.below[tier] = before + step
        flipped = before + min(step, 0) == 0
        if above.state[tier] != ABSENT:
            return above if flipped else None
        if not flipped:
            return None  # it was and stays present there: nothing changes further up
        above = parent_run(above)
    return None
