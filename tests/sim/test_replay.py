"""Replays: hit ratios against a plain model, conservation, determinism, and times worked out by hand."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sim_kit import MODEL, SETTINGS, TOKENS, capacity, cell, chat, packed, request, result_of, world_of

from hicache.errors import ConfigError
from hicache.sim.options import Capacity, Settings, Size, Unit
from hicache.sim.packed import pack, symbols
from hicache.sim.traces import Request
from hicache.types import TierKind, WritePolicy


def plain_lru(requests: Sequence[Request], pages: int) -> int:
    """Leaf-first LRU, written down plainly: look up, touch the deepest first, put in what is missing."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for each in requests:
        found = 0
        for block in each.blocks:
            if block not in held:
                break
            found += 1
        hits += found
        for block in reversed(each.blocks):
            held.pop(block, None)
            held[block] = None
        while len(held) > pages:
            held.popitem(last=False)
    return hits


@pytest.mark.parametrize("pages", [40, 80, 200, 5000])
def test_one_tier_of_lru_hits_what_a_plain_model_hits(tmp_path: Path, pages: int) -> None:
    requests = chat(7, 400)
    with packed(tmp_path, requests) as trace:
        found = result_of(trace, cell(capacity(host=pages)))
    assert found["hit_pages"] == plain_lru(requests, pages) > 0
    assert found["asked_pages"] == sum(len(each.blocks) for each in requests)
    assert found["hits_by_tier"] == [found["hit_pages"]]


def test_a_cache_that_holds_everything_hits_the_bound(tmp_path: Path) -> None:
    with packed(tmp_path, chat(1, 300)) as trace:
        found = result_of(trace, cell(capacity(host=trace.facts.unique_blocks)))
        assert found["hit_pages"] == trace.facts.hit_blocks
        assert found["hit_ratio"] == pytest.approx(trace.facts.bound)


@pytest.mark.parametrize("mode", ["instant", "trace", "scaled", "poisson", "back-to-back"])
@pytest.mark.parametrize("write_policy", list(WritePolicy))
def test_capacities_hold_and_pages_are_conserved(
    tmp_path: Path, mode: str, write_policy: WritePolicy
) -> None:
    """After every event no tier holds more than its capacity; in the end what came in is there or was dropped."""
    speed = 20.0 if mode == "scaled" else 1.0
    with packed(tmp_path, chat(3, 120)) as trace:
        what = cell(capacity(device=24, host=40, disk=90), mode, speed=speed)
        world = world_of(trace, what, write_policy=write_policy, running=4)
        engine = world.shell.engine
        handle, seen = world.shell.handle, 0

        def watched(event: Any) -> None:
            nonlocal seen
            handle(event)
            seen += 1
            for tier in engine.stats().tiers:
                assert tier.used_bytes <= tier.capacity_bytes, tier
            if seen % 50 == 0:
                engine.check()

        world.shell.handle = watched  # type: ignore[method-assign]
        world.run()
        stats = engine.stats()
        engine.check()
        assert seen > 300
        assert stats.leases == stats.reservations == stats.copies == stats.waiting == 0
        assert stats.counters.committed_pages == stats.pages + sum(stats.counters.dropped_pages)
        found = world.result()
    assert found["requests"] == 120
    assert found["hit_pages"] + found["late_pages"] == sum(found["hits_by_tier"])


@pytest.mark.parametrize("mode", ["instant", "trace", "poisson", "back-to-back"])
def test_the_same_seed_gives_the_same_result(tmp_path: Path, mode: str) -> None:
    settings = dataclasses.replace(SETTINGS, digest=True)
    with packed(tmp_path, chat(5, 80)) as trace:
        what = cell(capacity(host=30, disk=60), mode, seed=4)
        first, second = (result_of(trace, what, settings) for _ in range(2))
        other = result_of(trace, dataclasses.replace(what, seed=5), settings)
    assert first == second
    assert first["digest"]
    assert (other["digest"] != first["digest"]) == what.seeded == (mode == "poisson")


def test_requests_of_the_warm_up_do_not_count(tmp_path: Path) -> None:
    requests = [request(at, [1, 2, 3]) for at in range(10)]
    with packed(tmp_path, requests) as trace:
        found = result_of(trace, cell(capacity(host=8)), dataclasses.replace(SETTINGS, warmup=0.3))
    assert found["warmup"]["requests"] == 3
    assert found["requests"] == 7
    assert found["hit_ratio"] == 1.0


# --- time, by hand: a token takes 1 ms to compute; a block of 16 tokens 1 ms to the GPU, 2 from it, 4 and 8 at the disk


def ttft_ms(found: dict[str, Any]) -> list[float]:
    return [row[found["columns"].index("ttft_us")] / 1000 for row in found["rows"]]


def test_a_miss_costs_its_prefill_and_a_hit_its_way_to_the_gpu(tmp_path: Path) -> None:
    """16 + 1 tokens: 17 ms. Again: 1 ms for one block from host memory and 1 ms for the last token."""
    requests = [request(0, [1]), request(1000, [1]), request(2000, [1, 2])]
    with packed(tmp_path, requests) as trace:
        for mode in ("instant", "trace"):
            found = result_of(trace, cell(capacity(host=8), mode))
            assert ttft_ms(found) == [17.0, 2.0, 1.0 + 17.0], mode
            assert found["prefill"]["saved_s"] == pytest.approx(0.032)
            assert found["prefill"]["computed_s"] == pytest.approx(0.017 + 0.001 + 0.017)


def test_hits_on_the_gpu_need_no_way(tmp_path: Path) -> None:
    with packed(tmp_path, [request(0, [1]), request(1000, [1])]) as trace:
        for mode in ("instant", "trace"):
            assert ttft_ms(result_of(trace, cell(capacity(device=8), mode))) == [17.0, 1.0], mode


def test_prompts_wait_for_the_model(tmp_path: Path) -> None:
    """Three prompts of 17 ms at once on one replica, then on two."""
    with packed(tmp_path, [request(0, [number]) for number in (1, 2, 3)]) as trace:
        what = cell(capacity(host=8), "trace")
        assert ttft_ms(result_of(trace, what)) == [17.0, 34.0, 51.0]
        two = dataclasses.replace(SETTINGS, replicas=2)
        assert ttft_ms(result_of(trace, what, two)) == [17.0, 17.0, 34.0]


def test_requests_beyond_the_places_wait_for_one(tmp_path: Path) -> None:
    """One place: the second begins when the first has its last token (17 ms and 10 of 3 ms) and is stored (2 ms)."""
    token_us = SETTINGS.token_us
    assert token_us == round(1e6 * 2 * MODEL.active_params / (1e9 * 0.7))
    with packed(tmp_path, [request(0, [1], 10), request(0, [2])]) as trace:
        found = result_of(trace, cell(capacity(host=8), "trace"), dataclasses.replace(SETTINGS, running=1))
    assert ttft_ms(found) == [17.0, 17.0 + max(10 * token_us / 1000, 2.0) + 17.0]
    assert found["load"]["most_waiting"] == 1


def test_pages_on_disk_are_waited_for_unless_computing_is_faster(tmp_path: Path) -> None:
    """Block 1 is pushed to disk by 2 and 3. Coming back it pushes 2 out: 8 ms to disk, 4 from it, 1 to the GPU;
    computing it would take 16 ms.
    """
    requests = [request(at * 1000, [block]) for at, block in enumerate((1, 2, 3, 1))]
    with packed(tmp_path, requests) as trace:
        what = cell(capacity(host=2, disk=9), "trace")
        found = result_of(trace, what)
        assert found["hits_by_tier"] == [0, 1]
        assert ttft_ms(found)[-1] == 8.0 + 4.0 + 1.0 + 1.0
        slow = dataclasses.replace(
            SETTINGS,
            hardware=dataclasses.replace(
                SETTINGS.hardware,
                disk_read=dataclasses.replace(SETTINGS.hardware.disk_read, bytes_per_s=16_384.0),
            ),
        )
        late = result_of(trace, what, slow)  # a second to read: after 16 ms the request computes it
        assert late["late_pages"] == 1
        assert ttft_ms(late)[-1] == 16.0 + 17.0
        assert late["hit_pages"] == 0


def test_a_store_is_found_only_when_it_has_been_copied(tmp_path: Path) -> None:
    """Computed at 17 ms, copied out by 19 ms: a request at 18 ms misses, one at 20 ms hits."""
    for at_ms, hits in ((18, 0), (20, 1)):
        with packed(tmp_path / str(at_ms), [request(0, [1]), request(at_ms, [1])]) as trace:
            assert result_of(trace, cell(capacity(host=8), "trace"))["hit_pages"] == hits, at_ms


def test_twice_the_speed_halves_the_time_between_requests(tmp_path: Path) -> None:
    with packed(tmp_path, [request(at * 100, [at]) for at in range(5)]) as trace:
        spans = [
            result_of(trace, cell(capacity(host=8), mode, speed=speed))["load"]["span_s"]
            for mode, speed in (("trace", 1.0), ("scaled", 2.0), ("back-to-back", 1.0))
        ]
    assert spans[0] == pytest.approx(0.4 + 0.019, abs=0.002)
    assert spans[1] == pytest.approx(0.2 + 0.019, abs=0.002)
    assert spans[2] == pytest.approx(5 * 0.017 + 0.002, abs=0.002)


def test_long_requests_keep_their_leases(tmp_path: Path) -> None:
    """A request that decodes for ten minutes holds its pages all the time: others cannot push them out."""
    tokens = 600_000_000 // SETTINGS.token_us
    requests = [request(0, [1, 2]), request(500, [1, 2], tokens)]
    requests += [request(1000 * at, [100 + at, 200 + at]) for at in range(1, 50)]
    requests.append(request(550_000, [1, 2]))
    with packed(tmp_path, requests) as trace:
        world = world_of(trace, cell(capacity(host=4), "trace"))
        world.run()
        counters = world.shell.engine.stats().counters
        found = world.result()
    assert counters.expired_leases == 0
    assert found["rows"][-1][found["columns"].index("hits")] == 2


def test_a_disk_that_stores_pages_smaller_writes_less_and_holds_more(tmp_path: Path) -> None:
    requests = chat(2, 150)
    with packed(tmp_path, requests) as trace:
        what = cell(capacity(host=40, disk=60))
        plain = result_of(trace, what)
        small = result_of(trace, what, dataclasses.replace(SETTINGS, stored_ratio=2.0))
    assert small["tiers"][1]["capacity_bytes"] == plain["tiers"][1]["capacity_bytes"]
    assert small["hit_pages"] > plain["hit_pages"]
    assert small["moved"]["disk_write_bytes"] < plain["moved"]["disk_write_bytes"]


# --- what it is fed with


def test_a_packed_trace_says_what_was_put_in(tmp_path: Path, rng: random.Random) -> None:
    requests = [
        Request(
            at, rng.randrange(1000), at, chat(at, 1)[0].blocks, cls=rng.choice(["", "a", "b"]), turn=at % 3
        )
        for at in range(50)
    ]
    requests.append(Request(60, 5, 5, requests[0].blocks[:0]))
    with packed(tmp_path, requests) as trace:
        for _ in range(2):
            rows = list(trace)
            assert [row[:4] for row in rows] == [
                (each.at_ms, each.input_tokens, each.output_tokens, each.turn) for each in requests
            ]
            assert [trace.classes[row[4]] for row in rows] == [each.cls for each in requests]
            assert [row[5] for row in rows] == [symbols(each.blocks) for each in requests]
        assert trace.facts.requests == 51


def test_a_symbol_is_the_id_little_endian_and_zeros() -> None:
    assert symbols([1, 258]) == b"\1" + bytes(15) + b"\2\1" + bytes(14)


def test_an_unfinished_file_is_written_anew(tmp_path: Path) -> None:
    def dies() -> Any:
        yield request(0, [1])
        raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        pack(dies(), tmp_path, name="t", sha256="x" * 64, block_tokens=TOKENS)
    with pack([request(0, [1, 2])], tmp_path, name="t", sha256="x" * 64, block_tokens=TOKENS) as trace:
        assert trace.facts.blocks == 2


def test_capacities_in_shares_pages_and_bytes() -> None:
    def pages(size: Size) -> int:
        spec = Capacity("x", (size,)).specs(1000, 16_384)[0]
        return spec.capacity_bytes // (16_384 if size.kind is TierKind.HOST else 20_480)

    assert pages(Size(TierKind.HOST, 0.05, Unit.SHARE)) == 50
    assert pages(Size(TierKind.HOST, 0.0001, Unit.SHARE)) == 1
    assert pages(Size(TierKind.DISK, 7, Unit.PAGES)) == 7
    assert pages(Size(TierKind.HOST, 100_000, Unit.BYTES)) == 6


def test_tiers_come_once_and_fastest_first() -> None:
    host, disk = Size(TierKind.HOST, 1, Unit.PAGES), Size(TierKind.DISK, 1, Unit.PAGES)
    for sizes in ((disk, host), (host, host), ()):
        with pytest.raises(ConfigError, match="fastest first"):
            Capacity("bad", sizes)


@pytest.mark.parametrize("bad", [{"warmup": 1.0}, {"running": 0}, {"replicas": 0}, {"stored_ratio": 0.5}])
def test_settings_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--"):
        Settings(**bad)


def test_the_replay_core_imports_the_standard_library_only() -> None:
    """It runs on a bare checkout: with everything else blocked, a trace is packed and replayed."""
    code = (
        "import sys\n"
        "for name in 'numpy zstandard lmdb grpc google xxhash rich torch'.split(): sys.modules[name] = None\n"
        "import hicache.sim.cell, hicache.sim.sweep, hicache.sim.packed, hicache.sim.serving\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
