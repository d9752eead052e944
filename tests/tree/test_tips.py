"""Tips leave in one step as they would in several: two trees alike, one taken down each way."""

from __future__ import annotations

import itertools
import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache.errors import ViolationError
from hicache.tree import Run, Tree
from hicache.tree.tips import add_tip, drop_tip, is_new, is_tip, last_run, trim_tip
from hicache.types import Residency

ABSENT, RESIDENT = int(Residency.ABSENT), int(Residency.RESIDENT)
WIDTH = 4


def pack(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(WIDTH, "little") for token in tokens)


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(pack), min_size=1, max_size=6)


def grown(prompts: list[bytes]) -> Tree:
    """A tree with these prompts resident in tier 0, and every other run in tier 1, too."""
    tree = Tree(WIDTH, 2, itertools.count(1))
    slots = itertools.count()
    for prompt in prompts:
        found = tree.trace(prompt)
        path = tree.cut(found)
        after = path[-1] if path else None
        pages = len(prompt) // WIDTH - found.pages
        assert not pages or is_new(tree, prompt, after, found.pages)
        if pages:
            run = tree.insert(prompt, after, found.pages, pages)
            for tier in range(1 + (run.id % 3 == 0)):
                tree.set_slots(run, tier, array("q", itertools.islice(slots, pages)))
                tree.set_state(run, tier, RESIDENT)
        run, known = last_run(tree, tree.match(prompt))
        assert known == run.pages
        assert tree.prompt_to(run) == prompt
        if found.pages:
            assert not is_new(tree, prompt, None, 0)
    return tree


def runs_of(tree: Tree) -> list[Run]:
    return sorted((run for node in tree.walk() for run in node.runs), key=tree.prompt_to)


def shape(tree: Tree) -> list[tuple[object, ...]]:
    """All that there is to see, ids aside."""
    return [
        (tree.prompt_to(run), run.pages, run.state, run.slots, run.below, run.live, run.node.holes)
        for run in runs_of(tree)
    ]


@given(PROMPTS, st.integers(0, 1 << 16))
def test_one_step_comes_to_the_same_as_several(prompts: list[bytes], seed: int) -> None:
    """Trees stay alike, and sound, until no tip is left."""
    draw = random.Random(seed)
    quick, slow = grown(prompts), grown(prompts)
    while tips := [at for at, run in enumerate(runs_of(quick)) if is_tip(run, 0)]:
        at = draw.choice(tips)
        one, other = runs_of(quick)[at], runs_of(slow)[at]
        pages = draw.randint(1, one.pages)
        tail = other if pages == other.pages else slow.split_run(other, other.pages - pages)
        places = tail.slots[0]
        slow.set_state(tail, 0, ABSENT)
        slow.set_slots(tail, 0, None)
        if pages < one.pages:
            assert trim_tip(one, 0, pages) == places
        else:
            above, _ = drop_tip(one, 0)
            if above is not None:
                quick.prune(above)
        slow.prune(tail)
        assert shape(quick) == shape(slow)
        quick.check()
        slow.check()


def test_what_is_no_tip_is_refused() -> None:
    """Pages below it would hang in the air."""
    tree = grown([pack([1, 2]), pack([1, 2, 0]), pack([1, 2, 1])])
    (top,) = (run for run in runs_of(tree) if run.pages == 2)
    assert not is_tip(top, 0)
    for refused in (lambda: trim_tip(top, 0, 1), lambda: drop_tip(top, 0), lambda: trim_tip(top, 0, 2)):
        with pytest.raises(ViolationError):
            refused()
    tree.check()


def test_add_tip_is_insert_and_set_state() -> None:
    """The same tree, run by run, and the same word on who ceased to be a leaf."""
    shapes = []
    for quick in (False, True):
        tree = Tree(2, 2, itertools.count(1))
        first = tree.insert(b"aabbcc", None, 0, 3)
        tree.set_slots(first, 1, array("q", [1, 2, 3]))
        tree.set_state(first, 1, RESIDENT)
        told = []
        for after, prompt, page in ((first, b"aabbccddee", 3), (first, b"aabbccff", 3), (None, b"gg", 0)):
            slots = array("q", range(10, 10 + len(prompt) // 2 - page))
            if quick:
                run, covered = add_tip(tree, after, prompt[2 * page :], 1, slots)
            else:
                run = tree.insert(prompt, after, page, len(slots))
                tree.set_slots(run, 1, slots)
                covered = tree.set_state(run, 1, RESIDENT)
            told.append((run.id, covered and covered.id))
        tree.check()
        runs = sorted((run for node in tree.walk() for run in node.runs), key=lambda run: run.id)
        shapes.append(
            (told, [(run.id, run.start, run.state, run.slots, run.below, run.live) for run in runs])
        )
    assert shapes[0] == shapes[1]


def test_add_tip_refuses() -> None:
    tree = Tree(2, 1, itertools.count(1))
    run, _ = add_tip(tree, None, b"aabb", 0, array("q", [1, 2]))
    for after, symbols, slots in ((run, b"cc", []), (run, b"cc", [1, 2]), (None, b"aa", [7])):
        with pytest.raises(ViolationError):
            add_tip(tree, after, symbols, 0, array("q", slots))
    tree.check()


def test_many_hits_are_alike() -> None:
    """From so many on runs merge whatever their hits; below it, and without that word, only equal ones."""
    tree = Tree(2, 1, itertools.count(1))
    head, _ = add_tip(tree, None, b"aabb", 0, array("q", [1, 2]))
    tail, _ = add_tip(tree, head, b"cc", 0, array("q", [3]))
    head.hits, tail.hits = 5, 2
    assert tree.try_merge(head) is None
    assert tree.try_merge(head, 3) is None
    assert tree.try_merge(head, 2) is tail
    assert (head.hits, head.pages, head.slots) == (5, 3, [array("q", [1, 2, 3])])
    tree.check()
