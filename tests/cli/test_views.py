"""What stats and tree show, for a sidecar that is made up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from hicache.cli import doctor, report, stats, tree
from hicache.cli.drive import Tally
from hicache.rpc.client.results import CheckResult, LatencyStats, Stats, TierStats, Tree, TreeNode

TIERS = [("device", "device"), ("host", "host"), ("disk", "disk")]


def tier(name: str, **changed: Any) -> TierStats:
    values: dict[str, Any] = {
        "name": name,
        "kind": name,
        "state": "ok",
        "capacity_bytes": 4 << 30,
        "used_bytes": 1 << 30,
        "pages": 1234,
        "hit_pages": 99,
        "bytes_in": 5 << 30,
        "bytes_out": 2 << 30,
        "evicted_pages": 7,
        "dropped_pages": 0,
        "corrupt_pages": 0,
    }
    return TierStats(**values | changed)


def figures(**changed: Any) -> Stats:
    values: dict[str, Any] = {
        "server_version": "0.1.0",
        "state": "serving",
        "uptime_ms": 61_000,
        "tiers": (tier("device"), tier("host"), tier("disk", state="read-only", dropped_pages=3)),
        "counters": {"refused_calls": 2, "waited_calls": 5},
        "latencies": (LatencyStats("Fetch", 1000, 0.71, 3.25),),
        "sessions": 2,
        "leases": 3,
        "reservations": 1,
        "waiting": 0,
        "copies_in_flight": 4,
        "namespaces": 1,
        "tree_nodes": 10,
        "tree_runs": 20,
        "tree_pages": 3000,
    }
    return Stats(**values | changed)


def shown(renderable: object) -> str:
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_stats_show_tiers_calls_and_counters() -> None:
    text = shown(stats.render(figures(), None))
    for word in (
        "hicache 0.1.0",
        "serving",
        "3,000 pages",
        "leases 3",
        "read-only",
        "5.00 GiB",
        "Fetch",
        "3.2 ms",
    ):
        assert word in text, word
    assert "███░░░" in text


def test_stats_say_what_is_wrong_with_a_tier_and_since_when() -> None:
    ill = tier("disk", state="read-only", reason="[Errno 28] No space left on device", degraded_ms=90_000)
    text = shown(stats.render(figures(tiers=(tier("host"), ill)), None))
    assert "tier disk is degraded: it takes no pages, for 90.0 s now: [Errno 28] No space left" in text
    assert "tier host is" not in text
    assert "neither takes pages nor gives any" in stats.ill(tier("disk", state="off"))
    assert "degraded" not in shown(stats.render(figures(tiers=(tier("host"),)), None))


def test_stats_say_how_far_a_recovery_is() -> None:
    counters = {
        "recovering": 1,
        "recovery_read_pages": 4096,
        "recovery_total_pages": 9000,
        "recovered_pages": 7,
    }
    found = figures(counters=counters)
    assert "recovering: 7 pages are back, 4,096 of 9,000 read" in shown(stats.render(found, None))
    assert not stats.recovery_line(figures(counters=counters | {"recovering": 0}))


def test_the_doctor_looks_at_a_running_sidecars_tiers() -> None:
    sick = figures(tiers=(tier("host"), tier("disk", state="off", reason="EIO", degraded_ms=5)))
    checks = {check.name: check for check in doctor.judge_sidecar(sick)}
    assert checks["tier host"].verdict is doctor.Verdict.FINE
    assert checks["tier disk"].verdict is doctor.Verdict.CHANGE
    assert "EIO" in checks["tier disk"].found
    back = doctor.judge_sidecar(figures(tiers=(), counters={"recovering": 1, "recovery_total_pages": 3}))
    assert [check.name for check in back] == ["recovery"]


def test_stats_show_rates_since_the_last_look() -> None:
    later = figures(
        uptime_ms=63_000,
        tiers=(tier("device", bytes_in=(5 << 30) + (20 << 20)),),
        counters={"refused_calls": 9},
    )
    text = shown(stats.render(later, figures()))
    assert "(10.0 MiB/s)" in text
    assert "+7" in text


@pytest.mark.parametrize(("share", "text"), [(-1, "░░░░"), (0.5, "██░░"), (1, "████"), (7, "████")])
def test_a_bar_stays_in_its_width(share: float, text: str) -> None:
    assert stats.bar(share, 4) == text


def node(number: int, parent: int, **changed: Any) -> TreeNode:
    values: dict[str, Any] = {
        "id": number,
        "parent": parent,
        "namespace": "" if parent else "llama [bf16]",
        "depth_pages": 0,
        "pages": 16,
        "first_symbol_digest": bytes([number % 256] * 8),
        "tier_pages": (4, 16, 0),
        "pinned_pages": 0,
        "hits": 42,
        "idle_ms": 1200,
        "children": 0,
    }
    return TreeNode(**values | changed)


CACHED = Tree(
    nodes=(
        node(1, 0, children=3),
        node(2, 1, depth_pages=16, pages=9, pinned_pages=9),
        node(3, 1, depth_pages=16),
        node(4, 0, namespace="other"),
    ),
    omitted_nodes=5,
)


def test_the_tree_shows_where_pages_lie() -> None:
    first, second = (shown(branch) for branch in tree.render(CACHED, TIERS))
    assert "llama [bf16]" in first
    assert "41 pages" in first
    assert (
        "01010101  16 pages, 0..16  D██······ H████████ ········".replace(" ········", " K········") in first
    )
    assert "42 uses, idle 1.2 s" in first
    assert "9 pinned" in first
    assert "... 1 more" in first
    assert first.index("02020202") < first.index("03030303")
    assert "other" in second


def test_a_long_chain_is_not_indented() -> None:
    chain = tuple(node(i, i - 1, depth_pages=i, children=int(i < 2999)) for i in range(1, 3000))
    (branch,) = tree.render(Tree(chain, 0), TIERS)
    text = shown(branch)
    assert text.count(tree.CONTINUES) == 2998
    assert max(map(len, text.splitlines())) < 120


def test_the_tree_as_json_names_tiers() -> None:
    plain = json.loads(json.dumps(tree.as_json(CACHED, [name for name, _ in TIERS])))
    assert plain["omitted_nodes"] == 5
    assert plain["nodes"][0]["tier_pages"] == {"device": 4, "host": 16, "disk": 0}
    assert plain["nodes"][1]["first_symbol_digest"] == "02" * 8


def test_tallies_add_up_and_give_a_verdict() -> None:
    total = Tally()
    for worker in range(2):
        one = Tally(requests=1, asked=10, granted=5, verified_bytes=640, latencies_ms={"fetch": [1.0, 3.0]})
        one.hits["host"] = 4 + worker
        total.add(one)
    assert (total.requests, total.asked, total.hits["host"], total.hit_ratio) == (2, 20, 9, 0.5)
    assert total.percentiles()["fetch"] == {"count": 4, "p50_ms": 2.0, "p99_ms": 3.0}
    fine = CheckResult(ok=True, problem="", action_digest="")
    assert report.verdict(total, fine) == []
    assert "0 wrong bytes in 1.25 KiB read" in report.verdict_line(total, fine)
    total.wrong_bytes = 3
    broken = CheckResult(ok=False, problem="a slot has two owners", action_digest="")
    assert report.verdict(total, broken) == ["3 wrong bytes", "the sidecar's own check found a violation"]
    assert "WRONG" in report.verdict_line(total, broken)
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        report.print_report(console, total, figures(), broken)
    for word in (
        "hits in host",
        "45.0%",
        "stores refused",
        "dropped (left the last tier)",
        "a slot has two owners",
    ):
        assert word in capture.get(), word
