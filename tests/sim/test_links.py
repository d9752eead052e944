"""Virtual time: the agenda's order, servers and links against queues worked out by hand."""

from __future__ import annotations

import random

import pytest

from hicache.errors import ConfigError
from hicache.sim.hardware import HARDWARE, find_hardware, with_constants
from hicache.sim.links import Agenda, Link, LinkSpec, Server
from hicache.sim.models import MODELS, find_model
from hicache.types import TierKind


def run(agenda: Agenda) -> None:
    while agenda.next_us is not None:
        agenda.step()


def test_calls_come_in_order_of_time_and_then_of_asking() -> None:
    agenda, seen = Agenda(), []
    for name, moment in (("c", 30), ("a", 10), ("b", 10), ("d", 30)):
        agenda.at(moment, lambda name=name: seen.append((name, agenda.now_us)))
    run(agenda)
    assert seen == [("a", 10), ("b", 10), ("c", 30), ("d", 30)]


def test_a_moment_that_has_passed_means_now() -> None:
    agenda, seen = Agenda(), []
    agenda.at(50, lambda: agenda.at(10, lambda: seen.append(agenda.now_us)))
    run(agenda)
    assert seen == [50]


def test_one_lane_works_first_come_first_served() -> None:
    agenda, ends = Agenda(), []
    server = Server(agenda, 1)
    for work in (100, 50, 10):
        server.give(work, lambda: ends.append(agenda.now_us))
    run(agenda)
    assert ends == [100, 150, 160]
    assert server.busy_us == 160
    assert server.waited_us == 0 + 100 + 150


def test_two_lanes_take_the_next_piece_when_either_is_free() -> None:
    agenda, ends = Agenda(), {}
    server = Server(agenda, 2)
    for name, work in (("a", 100), ("b", 30), ("c", 50), ("d", 10)):
        server.give(work, lambda name=name: ends.__setitem__(name, agenda.now_us))
    run(agenda)
    assert ends == {"a": 100, "b": 30, "c": 80, "d": 90}


def test_a_transfer_takes_latency_and_its_lane_s_share_of_the_bandwidth() -> None:
    spec = LinkSpec(bytes_per_s=2_000_000, latency_us=7, lanes=2)
    assert spec.carry_us(1_000) == 7 + 1_000
    agenda = Agenda()
    link = Link(agenda, spec)
    assert [link.carry(1_000, lambda: None) for _ in range(3)] == [1_007, 1_007, 2_014]
    assert link.carried_bytes == 3_000


def test_a_server_never_does_more_than_its_lanes_can(rng: random.Random) -> None:
    agenda = Agenda()
    server = Server(agenda, 3)
    done = 0

    def finish() -> None:
        nonlocal done
        done += 1

    moment = total = 0
    for _ in range(500):
        moment += rng.randrange(40)
        work = rng.randrange(1, 200)
        total += work
        agenda.at(moment, lambda work=work: server.give(work, finish))
    run(agenda)
    assert done == 500
    assert server.busy_us == total
    assert agenda.now_us >= total / 3


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("llama-3-8b", 131_072),
        ("llama-3-70b-tp4", 327_680),
        ("qwen2.5-7b", 57_344),
        ("deepseek-v3-mla", 70_272),
    ],
)
def test_kv_bytes_of_published_shapes(name: str, token_bytes: int) -> None:
    assert find_model(name).token_bytes == token_bytes


def test_prefill_flops_add_up_and_grow_with_depth() -> None:
    for model in MODELS.values():
        whole = model.prefill_flops(0, 3000)
        assert whole == pytest.approx(model.prefill_flops(0, 1000) + model.prefill_flops(1000, 3000))
        assert model.prefill_flops(1000, 2000) > model.prefill_flops(0, 1000) > 2000 * model.active_params
        assert model.prefill_flops(5, 5) == 0


def test_flops_of_one_position_by_hand() -> None:
    llama = find_model("llama-3-8b")
    # position 9 looks at 10 positions, in 32 layers of 32 heads, 2 * (128 + 128) FLOPs a look
    assert llama.prefill_flops(9, 10) == pytest.approx(2 * 8.03e9 + 32 * 32 * 2 * 256 * 10)


def test_every_preset_names_its_source_and_links_every_pair_of_tiers() -> None:
    for hardware in HARDWARE.values():
        assert len(hardware.source) > 20
        for src in (None, *TierKind):
            for dst in (None, *TierKind):
                assert hardware.link(src, dst)[1].bytes_per_s > 0
    assert all(len(model.source) > 10 for model in MODELS.values())


def test_constants_of_a_bench_result_replace_the_preset_s() -> None:
    base = find_hardware("h200")
    host = with_constants(base, {"mib": 512, "copy_verified_s": 0.25}, "host.json")
    assert host.to_gpu.bytes_per_s == host.from_gpu.bytes_per_s == 512 * (1 << 20) * 4
    assert host.disk_read == base.disk_read
    assert "host.json" in host.source
    disk = with_constants(base, {"links": {"disk_read": {"bytes_per_s": 5e9, "latency_us": 90}}}, "d.json")
    assert disk.disk_read == LinkSpec(5e9, 90, base.disk_read.lanes)


@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"links": {}},
        {"links": {"warp": {}}},
        {"links": {"to_gpu": {"speed": 1}}},
        {"mib": 1, "copy_verified_s": 0},
    ],
)
def test_constants_that_say_nothing_are_refused(constants: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"x\.json"):
        with_constants(find_hardware("h200"), constants, "x.json")


def test_unknown_presets_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="abacus") as refused:
        find_hardware("abacus")
    assert "h200" in refused.value.hint
    with pytest.raises(ConfigError, match="gpt-0"):
        find_model("gpt-0")
