"""The exact LRU curve against a plain stack, and against the engine itself; intervals against what is known."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim_kit import capacity, cell, chat, packed, result_of

from hicache.errors import InvalidArgumentError
from hicache.sim import statistics
from hicache.sim.curve import inversions, lru_curve, previous


@given(st.lists(st.integers(-1, 60)))
def test_inversions_are_counted_as_by_hand(values: list[int]) -> None:
    """Entries other than -1 must differ, as places of last accesses do."""
    values = [each if each < 0 or each not in values[:at] else -1 for at, each in enumerate(values)]
    values = [each if each < len(values) else -1 for each in values]
    found = inversions(np.asarray(values, np.int64))
    for at, each in enumerate(values):
        if each >= 0:
            assert found[at] == sum(other > each for other in values[:at])


@given(st.lists(st.integers(0, 9)))
def test_previous_is_the_last_place_of_the_same(values: list[int]) -> None:
    found = previous(np.asarray(values, np.int64))
    for at, each in enumerate(values):
        assert found[at] == max([place for place in range(at) if values[place] == each], default=-1)


@st.composite
def prefix_chained(draw: st.DrawFn) -> list[list[int]]:
    """Requests over a small trie."""
    ids: dict[tuple[int, int], int] = {}
    requests = []
    for path in draw(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=25)):
        parent, blocks = 0, []
        for step in path:
            parent = ids.setdefault((parent, step), len(ids) + 1)
            blocks.append(parent)
        requests.append(blocks)
    return requests


@given(prefix_chained(), st.integers(0, 5))
def test_the_curve_is_that_of_a_stack(requests: list[list[int]], warm: int) -> None:
    """A stack, the last used on top; a request counts what lies above each of its blocks, then moves them up."""
    warm = min(warm, len(requests))
    curve = lru_curve(requests, counted_from=warm)
    distances, stack, asked = [], [], 0
    for number, blocks in enumerate(requests):
        if number >= warm:
            asked += len(blocks)
            distances += [stack.index(block) for block in blocks if block in stack]
        for block in reversed(blocks):
            if block in stack:
                stack.remove(block)
            stack.insert(0, block)
    assert curve.asked == asked
    for pages in range(len(stack) + 3):
        assert curve.hits(pages) == sum(distance < pages for distance in distances)


def test_the_engine_lies_on_the_curve(tmp_path) -> None:  # type: ignore[no-untyped-def]
    requests = chat(11, 300)
    curve = lru_curve([each.blocks for each in requests])
    with packed(tmp_path, requests) as trace:
        for pages in (40, 60, 100, 300):  # a request has at most 33 blocks
            assert result_of(trace, cell(capacity(host=pages)))["hit_pages"] == curve.hits(pages)
        assert curve.bound == pytest.approx(trace.facts.bound)


def test_pages_for_a_ratio_is_the_fewest() -> None:
    curve = lru_curve([[1, 2], [1, 2], [3], [1, 2]])
    assert [curve.hits(pages) for pages in range(5)] == [0, 1, 3, 4, 4]
    assert [curve.pages_for(hits / 7) for hits in (0, 1, 2, 3, 4)] == [0, 1, 2, 2, 3]
    assert curve.pages_for(0.9) == -1
    assert lru_curve([]).ratio(5) == 0.0


# --- intervals

COLUMNS = ("requests", "asked", "hits")


def rows(rng: random.Random, count: int, ratio: float) -> list[list[int]]:
    return [[10, 100, sum(rng.random() < ratio for _ in range(100))] for _ in range(count)]


def test_an_interval_covers_the_truth_about_as_often_as_it_says(rng: random.Random) -> None:
    covered = sum(
        found.low <= 0.3 <= found.high
        for found in (statistics.interval(rows(rng, 40, 0.3), COLUMNS) for _ in range(200))
    )
    assert 170 <= covered <= 200


def test_more_requests_narrow_an_interval(rng: random.Random) -> None:
    few, many = (statistics.interval(rows(rng, count, 0.3), COLUMNS) for count in (20, 200))
    assert few.high - few.low > many.high - many.low > 0


def test_pairs_see_a_difference_that_intervals_hide(rng: random.Random) -> None:
    """Stretches differ much more than the two results do."""
    first = [[10, 100, rng.randrange(90)] for _ in range(100)]
    second = [[10, 100, row[2] + 1] for row in first]
    alone = [statistics.interval(each, COLUMNS) for each in (first, second)]
    assert alone[0].high > alone[1].low
    gap = statistics.difference(second, first, COLUMNS)
    assert gap.clear
    assert gap.low == pytest.approx(gap.high) == pytest.approx(0.01)


def test_the_same_result_twice_differs_by_nothing(rng: random.Random) -> None:
    same = rows(rng, 30, 0.5)
    gap = statistics.difference(same, same, COLUMNS)
    assert (gap.value, gap.low, gap.high, gap.clear) == (0.0, 0.0, 0.0, False)


def test_results_of_other_requests_do_not_pair_up(rng: random.Random) -> None:
    with pytest.raises(InvalidArgumentError, match="pair up"):
        statistics.difference(rows(rng, 30, 0.5), rows(rng, 31, 0.5), COLUMNS)
    other = [[9, *row[1:]] for row in rows(rng, 30, 0.5)]
    with pytest.raises(InvalidArgumentError, match="pair up"):
        statistics.difference(rows(rng, 30, 0.5), other, COLUMNS)
