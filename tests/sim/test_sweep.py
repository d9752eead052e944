"""Sweeps that stop and go on, the command line, the files and the report."""

from __future__ import annotations

import csv
import html.parser
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sim_kit import SETTINGS, capacity, cell, chat, packed

from hicache.cli.main import main
from hicache.cli.sim import parse_capacity, parse_mode
from hicache.errors import ConfigError
from hicache.sim.bounds import optimum
from hicache.sim.cell import Cell
from hicache.sim.options import Arrivals, Size, Unit
from hicache.sim.packed import PackedTrace
from hicache.sim.sweep import RESULTS, Sweep, stored_results
from hicache.types import TierKind

CELLS = [cell(capacity(host=pages), policy=policy) for pages in (40, 80) for policy in ("lru", "sieve")]


def zero() -> int:
    return 0


def sweep(trace: PackedTrace, folder: Path, cells: list[Cell], jobs: int = 1) -> tuple[list[Any], list[bool]]:
    """The results, and for each cell whether it was computed now."""
    fresh: list[bool] = []
    run = Sweep(SETTINGS, trace, folder, now_ns=zero)
    results = run.run(cells, jobs=jobs, on_done=lambda cell, result, *, new: fresh.append(new))
    assert not run.failures
    return results, fresh


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with packed(tmp_path, chat(1, 60)) as trace:
        first, fresh = sweep(trace, tmp_path, CELLS[:2])
        assert fresh == [True, True]
        with (tmp_path / RESULTS).open("a") as out:
            out.write('{"key": "cut off by a ki')
        second, fresh = sweep(trace, tmp_path, CELLS)
        assert fresh == [False, False, True, True]
        assert second[:2] == first
        _, fresh = sweep(trace, tmp_path, CELLS)
        assert not any(fresh)
    assert len(stored_results(tmp_path)) == 4


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    with packed(tmp_path, chat(1, 60)) as trace:
        alone, _ = sweep(trace, tmp_path / "a", CELLS)
        together, _ = sweep(trace, tmp_path / "b", CELLS, jobs=2)
    assert alone == together
    assert [found["config"]["policy"] for found in alone] == ["lru", "sieve", "lru", "sieve"]


def test_a_result_is_found_again_only_for_the_same_question(tmp_path: Path) -> None:
    with packed(tmp_path, chat(1, 20)) as trace:
        sha, tokens = trace.facts.sha256, trace.facts.block_tokens
        base = CELLS[0].key(SETTINGS, sha, tokens)
        assert CELLS[0].key(SETTINGS, sha, tokens) == base
        others = {each.key(SETTINGS, sha, tokens) for each in CELLS[1:]}
        others |= {CELLS[0].key(SETTINGS, "0" * 64, tokens), CELLS[0].key(SETTINGS, sha, tokens + 1)}
        import dataclasses

        others.add(CELLS[0].key(dataclasses.replace(SETTINGS, warmup=0.1), sha, tokens))
    assert base not in others
    assert len(others) == 6


def test_a_cell_that_fails_is_told_and_not_kept(tmp_path: Path) -> None:
    bad = cell(capacity(host=40), policy="no-such-policy")
    with packed(tmp_path, chat(1, 20)) as trace:
        for jobs in (1, 2):
            run = Sweep(SETTINGS, trace, tmp_path / str(jobs), now_ns=zero)
            results = run.run([bad, CELLS[0]], jobs=jobs, on_done=lambda *_, new: None)
            assert len(results) == 1
            assert [failed for failed, _ in run.failures] == [bad]
            assert "no-such-policy" in run.failures[0][1]
            assert len(stored_results(tmp_path / str(jobs))) == 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_optimum_bounds_every_policy_and_is_kept(tmp_path: Path, jobs: int) -> None:
    with packed(tmp_path, chat(6, 200)) as trace:
        found = dict(optimum(trace, [80, 40, 5000, 40], tmp_path, jobs=jobs))
        assert list(found) == [40, 80, 5000]
        results, _ = sweep(trace, tmp_path, CELLS)
        for what, result in zip(CELLS, results, strict=True):
            assert result["hit_ratio"] < found[int(what.capacity.sizes[0].amount)]
        assert found[5000] == pytest.approx(trace.facts.bound)
        (kept,) = tmp_path.glob("*.optimum.json")
        kept.write_text(json.dumps({"40": 0.125, "80": 0.25}))
        assert optimum(trace, [40, 80], tmp_path, jobs=jobs) == [(40, 0.125), (80, 0.25)]


# --- the command line


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    lines = [
        {
            "timestamp": each.at_ms,
            "input_length": each.input_tokens,
            "output_length": 5,
            "hash_ids": list(each.blocks),
        }
        for each in chat(4, 150)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def sim(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        if words[:1] != ("compare",):
            words = ("--trace", str(trace_file), "--out", str(tmp_path / "out"), "--jobs", "1", *words)
        code = main(["sim", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_sweep_says_what_a_new_user_wants_to_know(sim: Callable[..., Any], tmp_path: Path) -> None:
    code, out, err = sim("--policy", "lru,sieve", "--capacity", "10%,60p", "--mode", "instant,trace")
    assert (code, err) == (0, "")
    assert "chat.jsonl: 150 requests" in out
    assert "an infinite cache hits 0." in out
    assert len([line for line in out.splitlines() if re.match(r"(lru|sieve) +(10%|60p) ", line)]) == 8
    assert "against lru" in out
    assert "report.html: the report" in out
    folder = tmp_path / "out"
    assert len(json.loads((folder / "results.json").read_text())) == 8
    with (folder / "results.csv").open(newline="") as raw:
        rows = list(csv.DictReader(raw))
    assert len(rows) == 8
    assert {row["policy"] for row in rows} == {"lru", "sieve"}
    for row in rows:
        assert (
            0 <= float(row["hit_ratio_low"]) <= float(row["hit_ratio"]) <= float(row["hit_ratio_high"]) <= 1
        )
        assert (row["against_baseline"] == "") == (row["policy"] == "lru")
        assert len(row["trace_sha256"]) == 64
    assert len(list(folder.glob("cell-*.json"))) == 8


def test_every_result_says_where_it_comes_from(sim: Callable[..., Any], tmp_path: Path) -> None:
    sim("--capacity", "10%", "--warmup", "20%")
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(result["trace"]["sha256"]) == 64
    assert result["config"]["seed"] == 1
    assert result["version"]
    assert result["warmup"] == {"rule": "the first 20% of the requests are not counted", "requests": 30}
    assert result["config"]["constants"]["to_gpu"]["bytes_per_s"] > 0


def test_json_goes_to_standard_output_alone(sim: Callable[..., Any]) -> None:
    code, out, err = sim("--capacity", "10%", "--json")
    assert code == 0
    assert [each["config"]["policy"] for each in json.loads(out)] == ["lru"]
    assert "an infinite cache hits" in err


def test_seeds_repeat_only_what_depends_on_chance(sim: Callable[..., Any], tmp_path: Path) -> None:
    sim("--capacity", "10%", "--mode", "instant,poisson:2", "--seeds", "3")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(each["config"]["mode"], each["config"]["seed"]) for each in found] == [
        ("instant", 1), ("poisson:2", 1), ("poisson:2", 2), ("poisson:2", 3),
    ]  # fmt: skip


def test_compare_pairs_two_results(sim: Callable[..., Any], tmp_path: Path) -> None:
    sim("--policy", "lru,sieve", "--capacity", "10%")
    files = sorted(map(str, (tmp_path / "out").glob("cell-*.json")))
    code, out, _ = sim("compare", *files)
    assert code == 0
    assert "A: policy lru" in out
    assert "B: policy sieve" in out
    assert "hit ratio" in out
    gaps = json.loads(sim("compare", *files, "--json")[1])
    assert gaps["hit_ratio"]["low"] <= gaps["hit_ratio"]["value"] <= gaps["hit_ratio"]["high"]
    code, out, _ = sim("compare", files[0], files[0])
    assert "no clear difference" in out
    assert "the same settings" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--policy", "nonsense"), "nonsense"),
        (("--policy", ","), "--policy names nothing"),
        (("--capacity", "5"), "hold no block"),
        (("--capacity", "0%"), "without room"),
        (("--capacity", "disk:5%+host:5%"), "fastest first"),
        (("--capacity", "tape:5%"), "tape"),
        (("--mode", "warp"), "warp"),
        (("--mode", "scaled"), "speed"),
        (("--mode", "scaled:0"), "more than 0"),
        (("--model", "gpt-0"), "gpt-0"),
        (("--hardware", "abacus"), "abacus"),
        (("--warmup", "100%"), "--warmup"),
        (("--seeds", "x"), "--seeds"),
        (("--stored-ratio", "nan"), "--stored-ratio"),
        (("--constants", "/no/such/file"), "cannot read"),
        (("extra",), "does not know"),
    ],
)
def test_bad_settings_are_one_clear_line(sim: Callable[..., Any], words: tuple[str, ...], told: str) -> None:
    code, _, err = sim(*words)
    assert code == 2
    assert told in err
    assert err.startswith("hicache: error: ")


def test_compare_refuses_what_it_cannot_pair(sim: Callable[..., Any], tmp_path: Path) -> None:
    sim("--capacity", "10%")
    (mine,) = (tmp_path / "out").glob("cell-*.json")
    other = tmp_path / "other.json"
    changed = json.loads(mine.read_text())
    changed["trace"]["sha256"] = "0" * 64
    other.write_text(json.dumps(changed))
    assert "different traces" in sim("compare", str(mine), str(other))[2]
    other.write_text("[1, 2]")
    assert "2 results" in sim("compare", str(mine), str(other))[2]
    other.write_text("{}")
    assert "not a result" in sim("compare", str(mine), str(other))[2]
    assert "cannot read" in sim("compare", str(mine), "/no/such")[2]
    assert "compare A.json B.json" in sim("compare", str(mine))[2]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_is_refused_before_anything_is_run(
    sim: Callable[..., Any], tmp_path: Path
) -> None:
    code, _, err = sim("--capacity", "10%", "--parquet")
    assert code == 2
    assert "pip install pyarrow" in err
    assert not (tmp_path / "out").exists()


def test_without_a_trace_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sim"]) == 2
    assert "--trace is missing" in capsys.readouterr().err


def test_capacities_and_modes_as_people_write_them() -> None:
    assert parse_capacity("5%").sizes == (Size(TierKind.HOST, 0.05, Unit.SHARE),)
    assert parse_capacity("device:8GiB+host:2000p+disk:1TiB").sizes == (
        Size(TierKind.DEVICE, 8 << 30, Unit.BYTES),
        Size(TierKind.HOST, 2000, Unit.PAGES),
        Size(TierKind.DISK, 1 << 40, Unit.BYTES),
    )
    assert parse_mode("scaled:2.5").speed == 2.5
    assert parse_mode("poisson").arrivals is Arrivals.POISSON
    for text in ("instant", "trace", "scaled:2", "poisson:0.5", "back-to-back"):
        assert parse_mode(text).label == text
    with pytest.raises(ConfigError, match="speed"):
        parse_mode("instant:2")


# --- the report


class Reader(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps what a browser would fetch."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: dict[str, int] = {}
        self.series: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.fetched += [
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "srcset"}
        ]
        self.series |= {value or "" for name, value in attrs if name == "data-series"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_the_report_is_whole_and_needs_nothing_from_elsewhere(
    sim: Callable[..., Any], tmp_path: Path
) -> None:
    sim("--policy", "lru,sieve", "--capacity", "host:5%+disk:20%,10%,60p", "--mode", "instant,trace")
    text = (tmp_path / "out" / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert reader.fetched == []
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", text)
    assert {"lru", "sieve", "lru, exact", "oracle", "unbounded"} <= reader.series
    for heading in (
        "In short", "Miss ratio by capacity", "Against the baseline", "Hits by tier", "Bytes moved", "Prefill saved",
        "Time to first token", "Cost of a hit", "Capacity that a policy is worth", "All cells", "How to run it again",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in text, heading
    assert "nan" not in text.lower().replace("nanum", "")
    assert "prefers-color-scheme: dark" in text


def test_a_report_of_one_cell_is_whole_too(sim: Callable[..., Any], tmp_path: Path) -> None:
    code, _, _ = sim("--capacity", "60p", "--limit", "1")
    assert code == 0
    reader = Reader()
    reader.feed((tmp_path / "out" / "report.html").read_text())
    assert reader.open == []
