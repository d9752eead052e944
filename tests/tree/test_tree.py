"""The tree's edges: long and deep trees, what a split copies, what each broken invariant looks like."""

from __future__ import annotations

import gc
import itertools
from array import array
from collections.abc import Callable

import pytest

from hicache.errors import ViolationError
from hicache.keys import chain_keys
from hicache.tree import Run, Tree
from hicache.tree.edit import LONG_EDGE_BYTES
from hicache.types import Residency

WIDTH = 4
ABSENT, FILLING, RESIDENT, DRAINING = (int(state) for state in Residency)


def symbols(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(WIDTH, "little") for number in numbers)


def new_tree(tiers: int = 2) -> Tree:
    return Tree(WIDTH, tiers, itertools.count(1))


def add(tree: Tree, prompt: bytes, *, after: Run | None = None, tier: int = 0) -> Run:
    """The rest of the prompt, resident in a tier."""
    first = tree.depth_pages(after) + after.pages if after is not None else 0
    run = tree.insert(prompt, after, first, len(prompt) // WIDTH - first)
    tree.set_state(run, tier, RESIDENT)
    tree.set_slots(run, tier, array("q", range(run.pages)))
    return run


def drop(tree: Tree, run: Run, tier: int = 0) -> list[Run]:
    tree.set_slots(run, tier, None)
    tree.set_state(run, tier, ABSENT)
    return tree.prune(run)


def test_a_match_ends_before_a_hole() -> None:
    """Pages behind a hole are not matched, wherever in a node it stands, and are again once it is filled."""
    tree = new_tree()
    prompt = symbols(*range(9))
    head = add(tree, prompt)
    middle = tree.split_run(head, 3)
    tree.split_run(middle, 3)
    tree.set_slots(middle, 0, None)
    tree.set_state(middle, 0, ABSENT)
    assert tree.match(prompt).pages == 3
    assert tree.trace(prompt).pages == 9
    tree.set_state(middle, 1, FILLING)
    assert tree.match(prompt).pages == 3
    tree.set_state(middle, 1, RESIDENT)
    assert tree.match(prompt).pages == 9
    tree.set_slots(head, 0, None)
    tree.set_state(head, 0, ABSENT)
    assert (tree.match(prompt).pages, tree.match(prompt).nodes) == (0, [])
    tree.check()


def test_a_hole_at_the_start_of_a_child_leaves_the_parent_matched() -> None:
    """A child that cannot be read is no part of the match."""
    tree = new_tree()
    stem = add(tree, symbols(1, 2))
    add(tree, symbols(1, 2, 3), after=stem)
    hole = add(tree, symbols(1, 2, 4), after=stem)
    tree.set_state(hole, 0, FILLING)
    match = tree.match(symbols(1, 2, 4))
    assert repr(match) == "Match(2 pages, 1 nodes, 2 pages of the last)"
    assert (match.pages, match.nodes, match.last_pages) == (2, [stem.node], 2)


def test_a_page_that_drains_is_matched() -> None:
    """A copy on its way out can still be read (and rescued)."""
    tree = new_tree()
    run = add(tree, symbols(1, 2))
    tree.set_state(run, 0, DRAINING)
    assert tree.match(symbols(1, 2)).pages == 2


def test_a_prompt_may_end_anywhere() -> None:
    """Empty, shorter and longer prompts match what they share, and an unknown first page nothing."""
    tree = new_tree()
    add(tree, symbols(*range(100)))
    for pages in (0, 1, 37, 99, 100):
        assert tree.match(symbols(*range(pages))).pages == pages
        assert tree.match(symbols(*range(pages), 777, 778)).pages == pages
    assert tree.runs(tree.match(b"")) == ([], 0)
    assert tree.cut(tree.match(symbols(5))) == []


def test_deep_trees_need_no_recursion() -> None:
    """Five thousand nodes below one another: every call works, and pruning the leaf clears the whole path."""
    depth = 5000
    tree = new_tree()
    prompt = symbols(*range(depth))
    path: list[Run] = []
    for page in range(depth):
        above = path[-1] if path else None
        path.append(add(tree, prompt[: (page + 1) * WIDTH], after=above))
        add(tree, prompt[: page * WIDTH] + symbols(depth + page), after=above)
    assert len(tree.match(prompt).nodes) == depth
    assert tree.cut(tree.match(prompt)) == path
    assert tree.page_keys(path[-1], b"seed") == chain_keys(b"seed", prompt, WIDTH)[-1:]
    assert tree.prompt_to(path[-1]) == prompt
    assert sum(1 for _ in tree.walk()) == 2 * depth
    tree.set_state(path[0], 1, RESIDENT)
    assert tree.set_state(path[-1], 1, RESIDENT) is path[0]
    tree.check()
    assert tree.set_state(path[-1], 1, ABSENT) is path[0]
    tree.set_state(path[0], 1, ABSENT)
    for node in list(tree.walk()):
        if not node.children and node.runs[0] is not path[-1]:
            drop(tree, node.runs[0])
    for run in path[:-1]:
        tree.set_slots(run, 0, None)
        tree.set_state(run, 0, ABSENT)
    tree.check()
    assert drop(tree, path[-1]) == path[::-1]
    assert list(tree.walk()) == []
    gc.collect()


def test_set_state_names_the_run_that_becomes_or_ceases_to_be_a_leaf() -> None:
    """Only the nearest run above that is in the tier can change, and only with the first or last below it."""
    tree = new_tree()
    top = add(tree, symbols(1))
    fork = add(tree, symbols(1, 2), after=top)
    one, two = (add(tree, symbols(1, 2, n), after=fork) for n in (3, 4))
    tree.set_state(top, 1, RESIDENT)
    assert tree.set_state(one, 1, FILLING) is top  # fork is not in the tier
    assert tree.set_state(two, 1, RESIDENT) is None
    assert tree.set_state(one, 1, RESIDENT) is None
    assert tree.set_state(one, 1, ABSENT) is None
    assert tree.set_state(two, 1, ABSENT) is top
    assert tree.set_state(one, 0, DRAINING) is None
    tree.check()


def test_a_long_run_leaves_in_small_pieces() -> None:
    """Trimming a long edge page by page keeps what is left matchable, and it can grow again."""
    pages = LONG_EDGE_BYTES // WIDTH + 10
    tree = new_tree(1)
    prompt = symbols(*range(pages))
    run = add(tree, prompt)
    for left in range(pages - 1, pages - 60, -1):
        tail = tree.split_run(run, run.pages - 1)
        edge = run.node.edge
        assert drop(tree, tail) == [tail]
        assert tree.match(prompt).pages == left
        assert run.node.edge is edge or left == pages - 1, "copied more than once"
    tree.check()
    grown = add(tree, prompt, after=run)
    assert grown.node is run.node
    assert tree.match(prompt).pages == pages
    other = tree.split_run(run, 5)
    fork = add(tree, prompt[: 5 * WIDTH] + symbols(9999), after=run)
    assert (fork.node.parent, other.node.parent) == (run.node, run.node)
    assert tree.match(prompt).pages == pages
    tree.check()


def test_a_long_edge_is_not_extended() -> None:
    """Growing a long prompt page by page never copies what it has: new pages get a node of their own."""
    pages = LONG_EDGE_BYTES // WIDTH
    tree = new_tree(1)
    prompt = symbols(*range(pages + 2))
    long = add(tree, prompt[: pages * WIDTH])
    more = add(tree, prompt[:-WIDTH], after=long)
    last = add(tree, prompt, after=more)
    assert more.node.parent is long.node
    assert last.node is more.node
    tree.check()


def test_a_split_leaves_arrays_alone_that_others_may_hold() -> None:
    """Slots handed to a copy under way are not shortened under it."""
    tree = new_tree()
    run = add(tree, symbols(*range(6)))
    slots = run.slots[0]
    run.extra = "mine"
    tail = tree.split_run(run, 2)
    assert slots == array("q", range(6))
    assert (run.slots[0], tail.slots[0]) == (array("q", [0, 1]), array("q", [2, 3, 4, 5]))
    assert tail.extra == "mine"


@pytest.mark.parametrize("difference", ["state", "tick", "hits", "extra", "pins", "anchors", "holders"])
@pytest.mark.parametrize("side", [0, 1])
def test_runs_that_differ_are_not_merged(difference: str, side: int) -> None:
    """Each of the things that keep two neighbours apart does so on either side."""
    tree = new_tree()
    head = add(tree, symbols(*range(4)))
    tail = tree.split_run(head, 2)
    run = (head, tail)[side]
    if difference == "state":
        tree.set_state(run, 1, FILLING)
    elif difference == "pins":
        run.pins[1] = 1
    elif difference == "holders":
        run.holders.append(Holder([run]))
    else:
        setattr(run, difference, 1)
    assert tree.try_merge(head) is None
    tree.check()


class Holder:
    """Holds runs."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs


def test_alike_runs_are_merged() -> None:
    """A split that made no difference is undone, slots, keys and counts included."""
    tree = new_tree()
    head = add(tree, symbols(*range(4)))
    leaf = add(tree, symbols(*range(5)), after=head, tier=1)
    tree.page_keys(head, b"seed")
    tail = tree.split_run(head, 2)
    assert tree.try_merge(head) is tail
    assert head.slots[0] == array("q", range(4))
    assert head.keys == chain_keys(b"seed", symbols(*range(4)), WIDTH)
    assert head.below == [0, 1]
    assert tree.try_merge(head) is None
    assert tree.try_merge(leaf) is None
    tree.check()


def test_alike_holes_are_merged() -> None:
    """Two halves of a hole are one hole again, and counted as one."""
    tree = new_tree()
    head = tree.insert(symbols(*range(4)), None, 0, 4)
    tail = tree.split_run(head, 2)
    assert head.node.holes == 2
    assert tree.try_merge(head) is tail
    assert head.node.holes == 1
    tree.check()


def test_a_held_run_is_not_pruned() -> None:
    """Anchors, holders and pins each keep a run that is otherwise of no use, and what is above it."""
    tree = new_tree()
    head = add(tree, symbols(1, 2))
    run = add(tree, symbols(1, 2, 3), after=head)
    assert drop(tree, head) == []
    run.anchors = 1
    assert drop(tree, run) == []
    run.anchors, run.pins[1] = 0, 1
    assert tree.prune(run) == []
    run.pins[1], head.anchors = 0, 1
    assert tree.prune(run) == [run]
    head.anchors = 0
    assert tree.prune(head) == [head]
    assert tree.prune(head) == []
    assert not tree.root.children


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda tree, run: tree.insert(symbols(1, 2), None, 0, 1), id="first page known"),
        pytest.param(lambda tree, run: tree.insert(symbols(1, 2, 3), run, 2, 2), id="beyond the prompt"),
        pytest.param(lambda tree, run: tree.insert(symbols(1, 2, 3), run, 2, 0), id="no pages"),
        pytest.param(lambda tree, run: tree.insert(symbols(1, 2, 3), None, 2, 1), id="after nothing"),
        pytest.param(lambda tree, run: tree.insert(symbols(1, 2, 3), run, 0, 1), id="first after a run"),
        pytest.param(lambda tree, run: new_tree().insert(symbols(1, 2, 3), run, 2, 1), id="another tree"),
        pytest.param(lambda tree, run: tree.split_run(run, 0), id="split off all"),
        pytest.param(lambda tree, run: tree.split_run(run, 2), id="split off nothing"),
        pytest.param(lambda tree, run: tree.set_slots(run, 0, array("q", [1])), id="too few slots"),
    ],
)
def test_a_mistake_is_a_violation_and_changes_nothing(call: Callable[[Tree, Run], object]) -> None:
    """Calls that break a precondition raise and leave the tree as it was."""
    tree = new_tree()
    run = add(tree, symbols(1, 2))
    with pytest.raises(ViolationError):
        call(tree, run)
    tree.check()
    assert tree.match(symbols(1, 2, 3)).pages == 2
    assert tree.child_runs(run) == []


def corruptions() -> dict[str, Callable[[Tree, Run, Run], object]]:
    """What can be wrong with a tree: a head of two pages, and a leaf of two below it."""
    return {
        "root with runs": lambda tree, head, leaf: tree.root.runs.append(head),
        "wrong parent": lambda tree, head, leaf: setattr(leaf.node, "parent", tree.root),
        "wrong symbol": lambda tree, head, leaf: head.node.children.update({b"xxxx": leaf.node}),
        "no runs": lambda tree, head, leaf: leaf.node.runs.clear(),
        "wrong node": lambda tree, head, leaf: setattr(leaf, "node", head.node),
        "gap": lambda tree, head, leaf: setattr(leaf, "start", 1),
        "short run": lambda tree, head, leaf: setattr(leaf, "pages", 1),
        "short edge": lambda tree, head, leaf: setattr(leaf.node, "edge", leaf.node.edge[:-1]),
        "holes": lambda tree, head, leaf: setattr(leaf.node, "holes", 1),
        "same id": lambda tree, head, leaf: setattr(leaf, "id", head.id),
        "wrong tree": lambda tree, head, leaf: setattr(leaf, "tree", new_tree()),
        "missing tier": lambda tree, head, leaf: leaf.pins.pop(),
        "no such state": lambda tree, head, leaf: leaf.state.__setitem__(0, 7),
        "live": lambda tree, head, leaf: setattr(leaf, "live", 2),
        "negative pins": lambda tree, head, leaf: leaf.pins.__setitem__(0, -1),
        "negative anchors": lambda tree, head, leaf: setattr(leaf, "anchors", -1),
        "missing key": lambda tree, head, leaf: setattr(leaf, "packed_keys", b"key"),
        "slots without pages": lambda tree, head, leaf: tree.set_slots(leaf, 1, array("q", [1, 2])),
        "missing slot": lambda tree, head, leaf: leaf.slots.__setitem__(0, array("q", [1])),
        "one-sided hold": lambda tree, head, leaf: leaf.holders.append(Holder([])),
        "below": lambda tree, head, leaf: head.below.__setitem__(0, 3),
        "state set by hand": lambda tree, head, leaf: leaf.state.__setitem__(1, FILLING),
    }


@pytest.mark.parametrize("name", corruptions())
def test_check_sees_what_is_broken(name: str) -> None:
    """Every invariant has a test that fails when it does not hold."""
    tree = new_tree()
    head = add(tree, symbols(1, 2))
    add(tree, symbols(1, 2, 9), after=head)
    leaf = add(tree, symbols(1, 2, 3, 4), after=head)
    tree.split_run(head, 1)
    tree.check()
    corruptions()[name](tree, head.node.runs[1], leaf)
    with pytest.raises(ViolationError, match="broken rule"):
        tree.check()
