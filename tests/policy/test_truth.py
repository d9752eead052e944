"""Our policies against libCacheSim's figures (``truth.json``, by ``bench/truth.py``), and the tree against ANCHORS."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import pytest

from hicache.policy import make_policy
from hicache.sim.flat import flat_hits
from hicache.sim.leaf import LeafCache
from hicache.sim.oracle import belady, lookahead, unbounded

HERE = Path(__file__).resolve().parent
TRACES = next((found for up in HERE.parents if (found := up / "shared" / "traces").is_dir()), HERE)
TRUTH = json.loads((HERE / "truth.json").read_text())["traces"]
OURS = {"LRU": "lru", "FIFO": "fifo", "LFU": "lfu:ageing=0", "ARC": "arc", "GDSF": "gdsf", "Belady": ""}
LOOSE = {"ARC": 0.002, "GDSF": 0.002}


@functools.cache
def requests_of(trace):
    path = TRACES / f"{TRUTH[trace]['file']}.jsonl.zst"
    if not path.is_file():
        pytest.skip("the shared traces are not here")
    zstandard = pytest.importorskip("zstandard")
    with path.open("rb") as file:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file))
        return [json.loads(line)["hash_ids"] for line in lines]


def flat(trace, name, share):
    requests = requests_of(trace)
    capacity = TRUTH[trace]["distinct"] * share // 100
    if not OURS[name]:
        return belady([[block] for blocks in requests for block in blocks], capacity).ratio
    hits, blocks = flat_hits(make_policy(OURS[name]), capacity, requests)
    return hits / blocks


@pytest.mark.parametrize(
    ("name", "share"), [("LRU", 1), ("FIFO", 5), ("LFU", 1), ("ARC", 5), ("GDSF", 10), ("Belady", 1)]
)
def test_flat_equals_libcachesim_on_the_conversation_trace(name, share):
    """Block hit ratios within 0.001 (ARC and GDSF 0.002); one size each, all sizes in the soak test."""
    expected = TRUTH["conversation"]["hits"][name][str(share)]
    assert flat("conversation", name, share) == pytest.approx(expected, abs=LOOSE.get(name, 0.001))


@pytest.mark.soak
@pytest.mark.parametrize("share", [1, 5, 10, 25, 50])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("trace", sorted(TRUTH))
def test_flat_equals_libcachesim(trace, name, share):
    """The same at all sizes on both traces."""
    expected = TRUTH[trace]["hits"][name][str(share)]
    assert flat(trace, name, share) == pytest.approx(expected, abs=LOOSE.get(name, 0.001))


def leaf(trace, policy, share):
    capacity = TRUTH[trace]["distinct"] * share // 100
    return LeafCache(make_policy(policy), capacity).replay(requests_of(trace)).ratio


#: shared/design/ANCHORS.md, section 6: prefix hits, leaf-first, the running request pinned.
LEAF_LRU = {
    "conversation": {1: 0.052, 5: 0.196, 10: 0.279, 25: 0.353},
    "agent": {1: 0.304, 5: 0.878, 10: 0.939},
}
PINNED_BELADY = {"conversation": {1: 0.240, 5: 0.366, 10: 0.366}, "agent": {1: 0.599, 5: 0.930, 10: 0.955}}


AGENT = pytest.param("agent", marks=pytest.mark.slow)


@pytest.mark.parametrize("trace", ["conversation", AGENT])
def test_leaf_lru_equals_the_anchors(trace):
    """Within 0.002."""
    for share, expected in LEAF_LRU[trace].items():
        assert leaf(trace, "lru", share) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("trace", ["conversation", pytest.param("agent", marks=pytest.mark.soak)])
def test_pinned_belady_equals_the_anchors(trace):
    """Within 0.002; unbounded is the ceiling of both."""
    requests = requests_of(trace)
    ceiling = unbounded(requests).ratio
    for share, expected in PINNED_BELADY[trace].items():
        ratio = belady(requests, TRUTH[trace]["distinct"] * share // 100).ratio
        assert ratio == pytest.approx(expected, abs=0.002)
        assert ratio <= ceiling


#: The same section, a serving engine's rule: two uses protect a run for good. Ours protects at the first and has a cap.
TWO_USES = {1: 0.053, 5: 0.172, 10: 0.267, 25: 0.353}


@pytest.mark.parametrize("share", [5, 10])
def test_slru_is_below_the_anchors_by_its_definition(share):
    """With that rule ours gives that figure; at the first use and with a cap of 0.8 it gives less."""
    assert leaf("conversation", "slru:protected=1,uses=2", share) == pytest.approx(TWO_USES[share], abs=0.001)
    assert leaf("conversation", "slru", share) < TWO_USES[share] - 0.03


@pytest.mark.parametrize(
    ("trace", "share"),
    [("conversation", 1), *(pytest.param("agent", each, marks=pytest.mark.soak) for each in (1, 5, 10))],
)
def test_gdsf_differs_by_when_room_is_made(trace, share):
    """libCacheSim stores first and evicts after, so what came may go at once: done so, nothing is left to differ."""
    requests = requests_of(trace)
    capacity = TRUTH[trace]["distinct"] * share // 100
    hits, blocks = flat_hits(make_policy("gdsf"), capacity, requests, store_first=True)
    assert hits / blocks == pytest.approx(TRUTH[trace]["hits"]["GDSF"][str(share)], abs=0.00001)


#: The bars of the default, and never more than 0.005 below LRU.
BARS = {"conversation": {1: 0.100, 5: 0.225}, "agent": {1: 0.37, 5: 0.876, 10: 0.938}}


@pytest.mark.parametrize("trace", ["conversation", AGENT])
def test_adaptive_passes_its_bars(trace):
    """The figures promised in docs/POLICIES.md."""
    for share, bar in BARS[trace].items():
        assert leaf(trace, "adaptive", share) >= bar


@pytest.mark.soak
@pytest.mark.parametrize("share", [1, 2, 5, 10, 25, 50])
@pytest.mark.parametrize("trace", sorted(BARS))
def test_adaptive_is_never_much_below_lru(trace, share):
    """At all sizes."""
    assert leaf(trace, "adaptive", share) >= leaf(trace, "lru", share) - 0.005


def test_oracles_by_hand():
    """Three prompts through two pages: who is used last leaves; seeing less, it is LRU; unbounded never evicts."""
    requests = [[1], [2], [3], [1], [2], [3], [1]]
    assert unbounded(requests).hits == 4
    assert belady(requests, 2).hits == 2
    assert belady(requests, 2, bypass=True).hits >= 2
    assert lookahead(requests, 2, 0).hits == LeafCache(make_policy("lru"), 2).replay(requests).hits == 0
    assert lookahead(requests, 2, 10).hits == belady(requests, 2).hits
    assert (
        belady([[1, 2, 3], [1, 2, 3], [1, 2]], 2).hits == 4
    )  # what is pinned stays, the third finds no room
