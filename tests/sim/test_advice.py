"""The sampled curve against the exact one, shadow caches against the plain policy, and advice end to end."""

from __future__ import annotations

import json
import random
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim_kit import chat

from hicache.cli import sidecar
from hicache.cli.main import main
from hicache.policy import POLICIES, make_policy
from hicache.policy.curve import NEVER, SampledCurve, reuse_distances, shadow_ratio
from hicache.rpc.client import Client
from hicache.runtime.advice import LEAST_USES, RING_USES, Window, folded
from hicache.sim.curve import lru_curve
from hicache.sim.packed import symbols
from hicache.types import SymbolKind, TierKind, TierSpec


@given(st.lists(st.integers(0, 12)))
def test_distances_are_those_of_a_stack(idents: list[int]) -> None:
    stack: list[int] = []
    for ident, found in zip(idents, reuse_distances(idents), strict=True):
        assert found == (stack.index(ident) if ident in stack else NEVER)
        if ident in stack:
            stack.remove(ident)
        stack.insert(0, ident)


def test_watching_every_page_gives_the_exact_curve() -> None:
    requests = [each.blocks for each in chat(9, 300)]
    curve = SampledCurve([block for blocks in requests for block in reversed(blocks)], 1.0)
    exact = lru_curve([[block] for blocks in requests for block in reversed(blocks)])
    for pages in (0, 1, 10, 50, 200, 10_000):
        assert curve.ratio(pages) == pytest.approx(exact.ratio(pages))
    assert curve.bound == pytest.approx(exact.bound)


def test_a_sample_comes_near_the_exact_curve() -> None:
    """A skewed load of 60,000 uses over 20,000 pages, one page in sixteen watched."""
    rng = random.Random(
        20261121
    )  # which of the hottest pages are watched is chance, and their share of uses large
    pages = [int(20_000 * rng.random() ** 2) for _ in range(60_000)]
    watched = {page for page in range(20_000) if rng.random() < 1 / 16}
    exact = lru_curve([[page] for page in pages])
    sample = SampledCurve([page for page in pages if page in watched], 1 / 16, asked=len(pages))
    for room in (500, 1_000, 2_000, 5_000, 10_000):
        assert sample.ratio(room) == pytest.approx(exact.ratio(room), abs=0.05)


def test_a_curve_of_nothing_is_flat() -> None:
    assert SampledCurve([], 0.5).ratio(10) == SampledCurve([], 0.5).bound == 0.0


def test_a_shadow_of_lru_is_lru(rng: random.Random) -> None:
    uses = [(rng.getrandbits(3) * 0x1234567890ABCDEF, 0) for _ in range(400)]
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for at, (page, _) in enumerate(uses):
        hits += page in held and at >= 100
        held[page] = None
        held.move_to_end(page)
        if len(held) > 5:
            held.popitem(last=False)
    assert shadow_ratio(make_policy("lru"), uses, 5, skip=100) == hits / 300


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_can_be_a_shadow(name: str, rng: random.Random) -> None:
    pages = [rng.getrandbits(62) for _ in range(60)]
    uses = [(pages[int(60 * rng.random() ** 2)], at % 7) for at in range(800)]
    assert 0.2 < shadow_ratio(make_policy(name), uses, 20) < 1.0
    assert shadow_ratio(make_policy(name), uses, 60) == (800 - len({page for page, _ in uses})) / 800


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=40))
def test_a_fold_has_one_byte_a_page_which_depends_on_that_page(pages: list[bytes]) -> None:
    fold = folded(b"".join(pages), 16)
    assert len(fold) == len(pages)
    assert fold == b"".join(folded(page, 16) for page in pages)


def window(pages: int) -> Window:
    made = Window([TierSpec("host", TierKind.HOST, pages * 4096, pages * 4096)])
    made.open(4096)
    return made


def test_a_small_tier_has_more_of_its_pages_watched() -> None:
    assert window(100).rate == 0.25
    assert window(4096).rate == 1 / 16
    assert window(1 << 22).rate == 1 / 256


def test_a_page_is_watched_wherever_it_comes_back_and_known_by_all_that_is_before_it() -> None:
    ring = window(100)
    prompt = symbols([7 * number + 3 for number in range(400)])
    other = symbols([5, *[7 * number + 3 for number in range(1, 400)]])
    counts = []
    for each in (prompt, prompt, other):
        ring.saw(1, each, 16, 0)
        counts.append(ring.count)
    assert 40 < counts[0] < 160
    assert counts[1] == 2 * counts[0]
    uses = ring.uses()
    first, second, third = uses[: counts[0]], uses[counts[0] : counts[1]], uses[counts[1] :]
    assert first == second
    assert [depth for _, depth in first] == sorted((depth for _, depth in first), reverse=True)
    assert not {page for page, _ in first} & {page for page, _ in third}
    ring.saw(2, prompt, 16, 0)
    assert not {page for page, _ in first} & {page for page, _ in ring.uses()[-counts[0] :]}


def test_the_ring_holds_the_newest_uses_and_no_more() -> None:
    ring = window(100)
    for number in range(300):
        ring.saw(1, symbols(list(range(number << 20, (number << 20) + 2000))), 16, number)
    assert ring.count > RING_USES
    uses, before = ring.uses(), ring.count
    assert len(uses) == RING_USES
    ring.saw(2, symbols(list(range(2000))), 16, 999)
    added = ring.count - before
    assert added > 100
    assert ring.uses()[:-added] == uses[added:]
    assert sys.getsizeof(ring._idents) == pytest.approx(8 * RING_USES, rel=0.1)


def test_advice_is_near_the_truth_and_grows_with_room(rng: random.Random) -> None:
    requests = [each.blocks for each in chat(3, 6000, sessions=400)]
    ring = window(2000)
    for at, blocks in enumerate(requests):
        # ids of a real client are hashes; the ids of a small trace are spread as those would be
        ring.saw(1, symbols([block * 0x9E3779B97F4A7C15 % (1 << 62) for block in blocks]), 16, at)
    advice = ring.advise("lru", 6000)
    exact = lru_curve(requests, counted_from=1500)
    found = {each.factor: each.hit_ratio for each in advice.sizes}
    assert list(found.values()) == sorted(found.values())
    for factor, ratio in found.items():
        assert ratio == pytest.approx(exact.ratio(int(2000 * factor)), abs=0.08), factor
    assert sum(each.current for each in advice.policies) == 1
    assert {each.name for each in advice.policies} >= {"lru", "adaptive", "arc"}
    assert advice.span_ms == 6000


def test_too_few_uses_say_nothing() -> None:
    ring = window(100)
    ring.saw(1, symbols(list(range(100, 256))), 16, 5)
    advice = ring.advise("lru", 10)
    assert (advice.sizes, advice.policies) == ((), ())
    assert 0 < advice.uses < LEAST_USES


def test_a_running_sidecar_gives_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--host-bytes", "1MiB"]
    with sidecar.temporary(flags, disk_bytes="") as started, Client(started.target) as client:
        assert main(["advise", "--target", started.target]) == 0
        assert "too few to say anything yet" in capsys.readouterr().out
        namespace = client.namespace(
            model="m", page_tokens=16, page_bytes=4096, symbol_kind=SymbolKind.HASHES, symbol_hash_bytes=16
        )
        for at in range(100):
            blocks = [(at % 20 * 1000 + number) * 0x9E3779B97F4A7C15 % (1 << 62) for number in range(50)]
            with namespace.fetch(symbols(blocks)):
                pass
        assert main(["advise", "--target", started.target]) == 0
        out = capsys.readouterr().out
        assert "page look-ups in the sample" in out
        assert "as it is" in out
        assert "(in use)" in out
        assert main(["advise", "--json", "--target", started.target]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {each["tier"] for each in found["sizes"]} == {"host"}
        assert found["rate"] == 0.25
        bigger = {each["factor"]: each["hit_ratio"] for each in found["sizes"]}
        assert bigger[8.0] > bigger[0.25]  # 20 prompts of 50 pages: 1,000 pages, four times what fits
