"""What people read when they ask for something that cannot be: where, what, and what to do. Never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from hicache.cli import stats
from hicache.cli.main import main
from hicache.rpc.client.session import _short


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "t.jsonl"
    path.write_text('{"hash_ids": [1]}\n{"hash_ids": [1, 2]}\n')
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trace", "stats", "{trace}", "--plot", "{tmp}/no/s.html"], "--plot: cannot write"),
        (["trace", "stats", "{trace}", "--json", "{tmp}/no/s.json"], "there is no folder"),
        (["trace", "stats", "{trace}", "--plot", "{tmp}"], "Is a directory"),
        (["trace", "stats", "{empty}"], "empty.jsonl is empty"),
        (["sim", "--trace", "{trace}", "--out", "{trace}/out"], "Not a directory"),
        (["sim", "compare"], "takes two results, not 0"),
        (["sim", "compare", "nowhere", "nowhere"], "cannot read nowhere: No such file"),
        (["sim", "compare", "{trace}", "{trace}"], "it is no JSON"),
        (["sim", "--trace", "{trace}", "--capacity", "0%"], "a tier without room"),
        (["sim", "--trace", "{trace}", "--constants", "{empty}"], "it is no JSON"),
        (["sim", "forecast"], "does not know 'forecast'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    words: list[str], message: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert main([word.format(trace=trace, tmp=tmp_path, empty=empty) for word in words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("hicache: error: ")
    assert message in told[0]


def test_an_error_that_is_a_bug_is_not_made_pretty(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> int:
        raise OSError(5, "no file in it")

    monkeypatch.setattr("hicache.cli.doctor.run", fails)
    with pytest.raises(OSError, match="no file in it"):
        main(["doctor"])


@pytest.mark.parametrize(
    ("name", "value", "cells"),
    [
        ("refused_calls", 1234, ("refused calls", "1,234")),
        ("committed_bytes", 3 << 30, ("committed", "3.00 GiB")),
        ("disk_oldest_batch_ms", 250, ("disk oldest batch", "250 ms")),
        ("disk_degraded_ms", 0, ("disk degraded", "0")),
        ("scrub_last_pass_ms", 1_795_232_568_048, ("scrub last pass", "2026-11-21 03:42:48 UTC")),
    ],
)
def test_counters_are_shown_with_their_units(name: str, value: int, cells: tuple[str, str]) -> None:
    assert stats.counter_cells(name, value) == cells


def test_a_failed_connection_is_told_without_how_grpc_tried() -> None:
    grpc_says = (
        "failed to connect to all addresses; last error: FAILED_PRECONDITION: unix:/x.sock: connect failed: "
        "addr: unix:/x.sock error: No such file or directory"
    )
    assert _short(grpc_says) == "No such file or directory"
    assert _short("an error: of another kind") == "an error: of another kind"
