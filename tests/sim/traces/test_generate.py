"""Generated traces: the same from the same seed, shaped like what they are named after."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache.errors import InvalidArgumentError
from hicache.sim.traces import Request, generated
from hicache.sim.traces.arrivals import PROCESSES, Arrivals, arrival_times
from hicache.sim.traces.facts import facts
from hicache.sim.traces.generate import Generated, Mix
from hicache.sim.traces.kinds import Kind, Length
from hicache.sim.traces.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_seeds_give_equal_traces_and_others_do_not(preset: str) -> None:
    one, same, other = (list(generated(preset, requests=300, seed=seed)) for seed in (5, 5, 6))
    assert one == same
    assert one != other
    assert len(one) == 300
    again = generated(preset, requests=300, seed=5)
    assert again.sha256() == generated(preset, requests=300, seed=5).sha256()
    assert again.sha256() != generated(preset, requests=300, seed=6).sha256()
    assert list(again) == list(again)


def test_a_trace_does_not_change_from_release_to_release() -> None:
    """Results name the preset and the seed: what they stand for must stay, or this test be changed on purpose."""
    first = next(iter(generated("rag", seed=1)))
    assert (first.at_ms, first.input_tokens, len(first.blocks)) == RAG_FIRST


RAG_FIRST = (0, 6699, 13)


@pytest.mark.parametrize("preset", PRESETS)
def test_requests_are_in_order_chained_and_within_bounds(preset: str) -> None:
    before: dict[int, int] = {}
    requests = list(generated(preset, requests=2000, seed=3))
    assert all(one.at_ms <= two.at_ms for one, two in pairwise(requests))
    for request in requests:
        assert 0 <= len(request.blocks) <= request.input_tokens // 512
        assert request.turn >= 1
        assert len(set(request.blocks)) == len(request.blocks)
        previous = -1
        for block in request.blocks:
            assert 0 <= block < 1 << 62
            assert before.setdefault(block, previous) == previous
            previous = block


def test_turns_of_a_session_go_on_from_each_other() -> None:
    kind = Kind("k", first=Length(3000, 0.5), stay=0.9, stay_more=0.9)
    sessions: dict[str, list[Request]] = defaultdict(list)
    for request in Generated(Mix("m", ((kind, 1.0),), requests=500)):
        sessions[request.session].append(request)
    assert max(map(len, sessions.values())) > 5
    for turns in sessions.values():
        assert [request.turn for request in turns] == list(range(1, len(turns) + 1))
        for one, two in pairwise(turns):
            assert two.blocks[: len(one.blocks)] == one.blocks
            assert two.input_tokens > one.input_tokens
            assert two.at_ms > one.at_ms


def test_sessions_share_heads_and_documents_and_nothing_else() -> None:
    kind = Kind(
        "k",
        heads=1,
        head=Length(1100, 0),
        documents=3,
        documents_each=2,
        document=Length(2000, 0.3),
        first=Length(5000, 0),
        stay=0,
    )
    requests = list(Generated(Mix("m", ((kind, 1.0),), requests=200)))
    depths = facts(requests)
    assert all(request.blocks[:2] == requests[0].blocks[:2] for request in requests)
    assert len({request.blocks[3] for request in requests}) == 3
    assert len({request.blocks[-1] for request in requests}) == 200
    assert 0.2 < depths.bound < 0.8


def test_long_talks_are_summed_up_begun_again_and_branched() -> None:
    long = Kind(
        "k", first=Length(5000, 0), stay=1.0, stay_more=1.0, context_max=20_000, summary=Length(600, 0)
    )
    lengths = [r.input_tokens for r in islice(Generated(Mix("m", ((long, 1.0),), requests=4000)), 4000)]
    assert max(lengths) < 20_000 + 20_000
    branched = dataclasses.replace(long, branch=0.5, restart=0.1)
    found = facts(Generated(Mix("m", ((branched, 1.0),), requests=500)))
    straight = facts(Generated(Mix("m", ((long, 1.0),), requests=500)))
    assert found.unique_blocks != straight.unique_blocks


def test_a_prompts_end_may_not_come_back() -> None:
    kind = Kind("k", first=Length(3000, 0), stay=1.0, stay_more=1.0, rewrites_end=True)
    sessions: dict[str, list[Request]] = defaultdict(list)
    for request in Generated(Mix("m", ((kind, 1.0),), requests=100)):
        sessions[request.session].append(request)
    for turns in sessions.values():
        for one, two in pairwise(turns):
            assert one.blocks[:-1] == two.blocks[: len(one.blocks) - 1]
            assert one.blocks[-1] not in two.blocks


@pytest.mark.parametrize("process", PROCESSES)
def test_arrivals_have_their_mean_and_order(process: str) -> None:
    made = Arrivals(process, every_ms=1000.0)
    times = list(islice(arrival_times(made, Random(1)), 20_000))
    assert times == sorted(times)
    assert times[0] == 0
    if process != "daily":
        assert times[-1] / len(times) == pytest.approx(1000, rel=0.1)
    else:  # the rate at noon is nine times the rate at midnight
        day = [at % 86_400_000 for at in islice(arrival_times(made, Random(1)), 300_000)]
        night = sum(1 for at in day if not 3_600_000 < at < 82_800_000)
        noon = sum(1 for at in day if 39_600_000 < at < 46_800_000)
        assert noon > 4 * night


@given(st.floats(max_value=0) | st.just(float("nan")))
def test_arrivals_that_cannot_be_are_refused(every_ms: float) -> None:
    with pytest.raises(InvalidArgumentError):
        arrival_times(Arrivals("even", every_ms=every_ms), Random(1))
    with pytest.raises(InvalidArgumentError, match="no arrival process"):
        arrival_times(Arrivals("x"), Random(1))


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="one of conversation-like"):
        generated("x")


#: What the real traces have (docs/TRACES.md), and how near a preset stays: it is no copy.
REAL = {"conversation-like": (0.3664, 24.0), "agent-like": (0.9586, 177.0)}


@pytest.mark.parametrize("preset", REAL)
@pytest.mark.parametrize("seed", [1, 2])
def test_presets_stay_near_what_they_are_named_after(preset: str, seed: int) -> None:
    bound, each = REAL[preset]
    found = facts(generated(preset, requests=12_000, seed=seed))
    assert found.bound == pytest.approx(bound, abs=0.04)
    assert found.blocks / found.requests == pytest.approx(each, rel=0.3)
