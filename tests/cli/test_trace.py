"""``hicache trace``: its actions, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hicache.cli import sidecar
from hicache.cli.main import main
from hicache.sim.traces import generated, open_trace
from hicache.sim.traces.facts import facts


def test_generate_convert_and_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, kept, back = tmp_path / "t.jsonl.zst", tmp_path / "t.hcrec", tmp_path / "b.jsonl"
    assert main(["trace", "generate", "--preset", "rag", "--requests", "400", "--seed", "9", str(made)]) == 0
    assert main(["trace", "convert", str(made), str(kept)]) == 0
    assert main(["trace", "convert", str(kept), str(back), "--coarser", "2"]) == 0
    expected = list(generated("rag", requests=400, seed=9))
    assert list(open_trace(made)) == expected
    assert list(open_trace(kept)) == expected
    assert [len(request.blocks) for request in open_trace(back)] == [len(r.blocks) // 2 for r in expected]
    assert "blocks of 1024 tokens" in capsys.readouterr().out
    told, page = tmp_path / "s.json", tmp_path / "s.html"
    assert main(["trace", "stats", str(kept), "--json", str(told), "--plot", str(page)]) == 0
    found = json.loads(told.read_text())
    assert (found["requests"], found["block_tokens"], found["bad_lines"]) == (400, 512, 0)
    assert found["sha256"] == open_trace(kept).sha256()
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "http" not in text
    assert "400 requests" in capsys.readouterr().out
    assert main(["trace", "stats", str(kept), "--limit", "10", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 10


def test_bad_lines_are_told_and_strict_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"hash_ids": [1]}\n' + "nonsense\n" * 12 + '{"hash_ids": [1, 2]}\n')
    assert main(["trace", "stats", str(path)]) == 1
    out = capsys.readouterr().out
    assert "12 lines could not be used" in out
    assert "t.jsonl:2: not a Mooncake trace line" in out
    assert main(["trace", "convert", str(path), str(tmp_path / "o.jsonl")]) == 1
    assert main(["trace", "stats", "--strict", str(path)]) == 2
    assert "t.jsonl:2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stats", "{t}", "--limit", "x"], "--limit"),
        (["convert", "{t}", "{t}"], "same file"),
        (["convert", "{t}", "{o}", "--coarser", "0"], "--coarser"),
        (["stats", "nowhere"], "cannot read nowhere"),
        (["generate", "{o}", "--seed", "-"], "--seed"),
    ],
)
def test_wrong_usage_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"hash_ids": [1]}\n')
    filled = [word.format(t=path, o=tmp_path / "o") for word in words]
    assert main(["trace", *filled]) == 2
    assert message in capsys.readouterr().err
    assert path.read_text() == '{"hash_ids": [1]}\n'


def test_a_replay_recorded_by_the_sidecar_is_the_trace_again(tmp_path: Path) -> None:
    """The whole path: trace, replay, sidecar, recording, trace; and the sidecar's hits are the trace's own."""
    sent, kept, result = tmp_path / "t.jsonl", tmp_path / "r.hcrec", tmp_path / "result.json"
    assert main(["trace", "generate", "--requests", "80", "--seed", "4", str(sent)]) == 0
    with sidecar.temporary(["--host-bytes", "64MiB", "--record", str(kept)], disk_bytes="") as started:
        words = ["replay", "--trace", str(sent), "--target", started.target, "--json", str(result)]
        assert main(words) == 0
    one, two = open_trace(sent), open_trace(kept, strict=True)
    # a request without a whole block asks for nothing, and leaves nothing
    assert [len(r.blocks) for r in two] == [len(r.blocks) for r in one if r.blocks]
    assert facts(two).hit_blocks == facts(one).hit_blocks > 0
    hits = json.loads(result.read_text())["hit_ratio"] * facts(one).blocks
    assert round(hits) == facts(two).hit_blocks
