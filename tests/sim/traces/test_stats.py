"""Statistics against plain models."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache.sim.traces import Request, generated
from hicache.sim.traces.distances import ReuseDistances, smaller_before
from hicache.sim.traces.facts import facts
from hicache.sim.traces.stats import Spread, trace_stats


@given(st.lists(st.integers(-(2**40), 2**40), unique=True, min_size=1, max_size=80))
def test_smaller_before_counts_them(values: list[int]) -> None:
    expected = [sum(other < value for other in values[:at]) for at, value in enumerate(values)]
    assert smaller_before(np.array(values)).tolist() == expected


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12))
def test_reuse_distances_are_those_of_a_plain_count(requests: list[list[int]]) -> None:
    distances = ReuseDistances()
    for blocks in requests:
        distances.add(array("q", blocks))
    uses = [block for blocks in requests for block in blocks]
    expected = []
    for at, block in enumerate(uses):
        before = [other for other in range(at) if uses[other] == block]
        if before:
            expected.append(len(set(uses[before[-1] + 1 : at])))
    assert distances.all().tolist() == expected


def lru_hits(uses: list[int], capacity: int) -> int:
    kept: dict[int, None] = {}
    hits = 0
    for block in uses:
        if block in kept:
            hits += 1
            del kept[block]
        kept[block] = None
        if len(kept) > capacity:
            del kept[next(iter(kept))]
    return hits


def test_the_curve_is_what_lru_finds() -> None:
    rng = random.Random(4)
    uses = [int(rng.paretovariate(0.7)) % 500 for _ in range(5000)]
    distances = ReuseDistances()
    for start in range(0, len(uses), 7):
        distances.add(array("q", uses[start : start + 7]))
    for capacity, share in distances.curve(len(set(uses))):
        assert share == pytest.approx(lru_hits(uses, capacity) / len(uses))


def test_an_empty_trace_has_statistics() -> None:
    found = trace_stats([])
    assert (found.requests, found.blocks, found.bound, found.hit_curve) == (0, 0, 0.0, ())
    assert found.reuse_distance.count == 0


def test_all_numbers_of_a_small_trace() -> None:
    requests = [
        Request(0, 10, 1, array("q", [1, 2, 3]), "a", 1, "s"),
        Request(5, 20, 2, array("q", [1, 2, 4, 5]), "a", 2, "s"),
        Request(9, 30, 3, array("q", [9]), "b"),
        Request(9, 30, 3, array("q", [1, 2, 3]), "a", 1, "t"),
    ]
    found = trace_stats(requests)
    assert (found.requests, found.blocks, found.unique_blocks, found.hit_blocks) == (4, 11, 6, 5)
    assert (found.span_ms, found.sessions, found.unchained_blocks) == (9, 2, 0)
    assert found.classes == (("a", 3), ("b", 1))
    assert found.arrival_gap_ms == Spread.of([5, 4, 0])
    assert found.reuse_gap_ms == Spread.of([5, 9])
    assert found.reuse_distance == Spread.of([2, 2, 4, 4, 5])
    assert dict(found.uses)["1"] == pytest.approx(3 / 6)
    assert dict(found.uses)["3"] == pytest.approx(2 / 6)
    assert [(r.depth, r.requests, r.blocks, r.shared_blocks) for r in found.sharing] == [
        (1, 4, 2, 1),
        (2, 3, 1, 1),
        (4, 1, 1, 0),
    ]
    assert found.sharing[1].fan_out == 2.0
    assert found.turns == Spread.of([1, 2])


def test_ids_at_two_places_are_told() -> None:
    found = trace_stats([Request(0, 1, 1, array("q", [1, 2])), Request(0, 1, 1, array("q", [2, 1]))])
    assert found.unchained_blocks == 1


def test_statistics_and_facts_agree() -> None:
    trace = generated("mix", requests=1500)
    found, plain = trace_stats(trace), facts(trace)
    assert (found.requests, found.blocks, found.unique_blocks, found.hit_blocks) == (
        plain.requests,
        plain.blocks,
        plain.unique_blocks,
        plain.hit_blocks,
    )
    assert not found.unchained_blocks
    assert found.hit_curve[-1][0] == plain.unique_blocks
