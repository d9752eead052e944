"""Reading: every format, every packing, bad lines, and what a format's first lines tell."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hicache.errors import ConfigError, InvalidArgumentError
from hicache.sim.traces import open_trace, source
from hicache.sim.traces.facts import TraceFacts, facts
from hicache.sim.traces.ids import mixed, signed

REQUESTS = [(1, 2, 3), (1, 2, 4), (9, 2), (1, 2, 3, 5), ()]


def lines_file(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    lines = [{"timestamp": i, "input_length": 1, "hash_ids": ids} for i, ids in enumerate(REQUESTS)]
    return lines_file(tmp_path / "trace.jsonl", lines)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "zstd": zstandard.compress,
    "zstd in frames": lambda raw: zstandard.compress(raw[:40]) + zstandard.compress(raw[40:]),
    "gzip": gzip.compress,
    "xz": lambda raw: lzma.compress(raw, preset=0),
    "bzip2": bz2.compress,
}


@pytest.mark.parametrize("packing", PACKERS)
def test_every_packing_reads_the_same_and_again(trace: Path, packing: str) -> None:
    packed = trace.with_name("any-name")
    packed.write_bytes(PACKERS[packing](trace.read_bytes()))
    opened = open_trace(packed)
    for _ in range(2):
        assert [tuple(request.blocks) for request in opened] == REQUESTS
        assert not opened.problems
    assert opened.sha256() == open_trace(trace).sha256()
    assert opened.block_tokens == 512


@pytest.mark.parametrize("packing", ["zstd", "gzip", "xz", "bzip2"])
def test_a_cut_file_is_read_to_its_cut_and_that_is_noted(tmp_path: Path, packing: str) -> None:
    rng = random.Random(5)
    lines = [json.dumps({"hash_ids": [rng.getrandbits(60) for _ in range(50)]}) for _ in range(2000)]
    whole = PACKERS[packing]("\n".join(lines).encode())
    path = tmp_path / "cut"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    opened = open_trace(path, format="mooncake")
    assert 0 < sum(1 for _ in opened) < 2000
    assert "cannot be read on" in opened.problems[-1].text
    with pytest.raises(InvalidArgumentError, match="cannot be read on"):
        list(open_trace(path, format="mooncake", strict=True))
    with pytest.raises(InvalidArgumentError, match="cannot be read to its end"):
        opened.sha256()


BAD = [
    ("{", "not a Mooncake trace line"),
    ('{"timestamp": 1}', "no 'hash_ids' in it"),
    ('{"hash_ids": [1.5]}', "whole numbers or strings"),
    ('{"hash_ids": [true]}', "whole numbers or strings"),
    ('{"hash_ids": [1, null]}', "whole numbers or strings"),
    ('{"hash_ids": 3}', "must be a list"),
    ('{"hash_ids": [], "timestamp": NaN}', "out of range"),
    ('{"hash_ids": [], "timestamp": "now"}', "must be a number"),
    ('{"hash_ids": [], "turn": -1}', "out of range"),
    ("[1]", "Mooncake"),
    ("7", "Mooncake"),
    ("[" * 100_000, "Mooncake"),
    ("\x00\xff", "Mooncake"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_counted_and_named_or_stops(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'{"hash_ids": [1]}\n\n' + line.encode("latin-1") + b'\n{"hash_ids": [2]}\n')
    opened = open_trace(path)
    assert [tuple(request.blocks) for request in opened] == [(1,), (2,)]
    assert [problem.line for problem in opened.problems] == [3]
    assert opened.problems.total == 1
    assert message in opened.problems[0].text
    with pytest.raises(InvalidArgumentError, match=rf"trace\.jsonl:3: .*{message}"):
        list(open_trace(path, strict=True))


def test_many_problems_are_counted_and_few_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text('{"hash_ids": []}\n' + "nonsense\n" * 500)
    opened = open_trace(path)
    assert len(list(opened)) == 1
    assert (opened.problems.total, len(opened.problems)) == (500, 100)


def test_a_line_beyond_all_bounds_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LINE_BYTES_MAX", 100)
    path = tmp_path / "t"
    path.write_text('{"hash_ids": [1]}\n{"hash_ids": [' + "1," * 1000 + '1]}\n{"hash_ids": [2]}\n')
    opened = open_trace(path, format="mooncake")
    assert [tuple(request.blocks) for request in opened] == [(1,), (2,)]
    assert [problem.line for problem in opened.problems] == [2]


@given(st.binary(max_size=400), st.sampled_from(["mooncake", "bailian", "lmcache", "tokens", "recording"]))
def test_garbage_never_crashes(tmp_path_factory: pytest.TempPathFactory, raw: bytes, form: str) -> None:
    path = tmp_path_factory.mktemp("garbage") / "file"
    path.write_bytes(raw)
    opened = open_trace(path, format=form)
    list(opened)
    if raw.strip(b"\n\r\t \x0b\x0c") and form == "recording":
        assert opened.problems


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        *("timestamp", "input_length", "output_length", "turn", "type", "chat_id", "parent_chat_id"),
        *("hash_ids", "chunk_hashes", "chunk_size", "seq_len", "token_ids"),
    ]
)


@given(st.dictionaries(KEYS, JSON, max_size=8), st.sampled_from(["mooncake", "bailian", "lmcache", "tokens"]))
def test_any_json_is_a_request_or_a_problem(
    tmp_path_factory: pytest.TempPathFactory, line: dict[str, Any], form: str
) -> None:
    opened = open_trace(lines_file(tmp_path_factory.mktemp("any") / "file", [line]), format=form)
    assert len(list(opened)) + opened.problems.total == 1


def test_ids_beyond_64_bits_and_strings_stay_different(tmp_path: Path) -> None:
    ids = [2**70, 2**70 + 1, -(2**80), "a", "b", 5]
    opened = open_trace(lines_file(tmp_path / "t", [{"hash_ids": ids}, {"hash_ids": ids[:3]}]))
    first, second = opened
    assert len(set(first.blocks)) == 6
    assert second.blocks == first.blocks[:3]


def test_a_bailian_trace_is_chained_timed_in_ms_and_knows_its_conversations(tmp_path: Path) -> None:
    common = {"input_length": 40, "output_length": 3, "type": "text"}
    lines = [
        common | {"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.114, "turn": 1, "hash_ids": [7, 8]},
        common | {"chat_id": 2, "parent_chat_id": 1, "timestamp": 62.5, "turn": 2, "hash_ids": [7, 8, 9]},
        common | {"chat_id": 3, "parent_chat_id": 2, "timestamp": 63, "turn": 3, "hash_ids": [6, 8]},
        common | {"chat_id": 5, "parent_chat_id": -1, "timestamp": 64, "turn": 1, "hash_ids": [8]},
    ]
    opened = open_trace(lines_file(tmp_path / "qwen_traceA_blksz_16.jsonl", lines))
    one, two, three, four = opened
    assert opened.block_tokens == 16
    assert one.blocks == two.blocks[:2]
    assert one.blocks[1] != three.blocks[1]  # the same block after another one
    assert len({one.blocks[1], three.blocks[1], four.blocks[0]}) == 3
    assert [r.at_ms for r in opened] == [61_114, 62_500, 63_000, 64_000]
    assert [r.session for r in opened] == ["1", "1", "1", "5"]
    assert (two.turn, two.cls, two.input_tokens, two.output_tokens) == (2, "text", 40, 3)


def test_an_lmcache_log_tells_its_own_chunk_size(tmp_path: Path) -> None:
    line = {
        "timestamp": 1711929600.123,
        "request_id": "req-001",
        "model_name": "m",
        "chunk_size": 128,
        "seq_len": 300,
        "dtypes": ["bfloat16"],
        "shapes": [[32, 128, 128]],
        "chunk_hashes": ["0xabcd", "0xef56"],
    }
    lines = [line, line | {"timestamp": 1711929601.5, "chunk_hashes": ["0xabcd"]}, line | {"chunk_size": 64}]
    opened = open_trace(lines_file(tmp_path / "lookup_hashes_1.jsonl", lines))
    one, two = opened
    assert opened.block_tokens == 128
    assert (one.at_ms, two.at_ms, one.input_tokens, one.cls) == (0, 1377, 300, "m")
    assert two.blocks == one.blocks[:1]
    assert "chunk_size 64 in a trace of 128-token blocks" in opened.problems[0].text


def test_token_ids_become_chained_blocks_of_the_size_that_is_asked(tmp_path: Path) -> None:
    prompts = [list(range(10)), [*range(8), 99, 98, 97, 96], [4, 5, 6, 7]]
    opened = open_trace(
        lines_file(tmp_path / "t", [{"token_ids": found, "output_length": 2} for found in prompts]),
        block_tokens=4,
    )
    one, two, three = opened
    assert (len(one.blocks), len(two.blocks), one.input_tokens, one.output_tokens) == (2, 3, 10, 2)
    assert one.blocks == two.blocks[:2]
    assert three.blocks[0] not in one.blocks
    bad = open_trace(lines_file(tmp_path / "b", [{"token_ids": [2**40]}, {"token_ids": ["x"]}]))
    assert not list(bad)
    assert bad.problems.total == 2


def test_text_goes_through_a_tokenizer(tmp_path: Path) -> None:
    path = lines_file(
        tmp_path / "t",
        [
            {"prompt": "a b c d e"},
            {"text": "a b c d f"},
            {"messages": [{"role": "user", "content": "a b"}]},
            {"messages": 3},
        ],
    )
    with pytest.raises(ConfigError, match="--tokenizer"):
        list(open_trace(path))
    tokenizers = pytest.importorskip("tokenizers", reason="no tokenizer is installed")
    words = {word: n for n, word in enumerate(["[?]", "a", "b", "c", "d", "e", "f", "user", ":"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[?]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    opened = open_trace(path, block_tokens=2, tokenizer=str(tmp_path / "tokenizer.json"))
    one, two, three = opened
    assert one.input_tokens == 5
    assert one.blocks == two.blocks
    assert len(three.blocks) == 2
    assert opened.problems.total == 1
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot load"):
        open_trace(path, tokenizer=str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("line", "form"),
    [
        ({"hash_ids": []}, "mooncake"),
        ({"hash_ids": [], "parent_chat_id": 1}, "bailian"),
        ({"chunk_hashes": []}, "lmcache"),
        ({"input_ids": []}, "tokens"),
        ({"messages": []}, "text"),
    ],
)
def test_the_first_lines_tell_the_format(tmp_path: Path, line: dict[str, Any], form: str) -> None:
    path = tmp_path / "t"
    path.write_text(f"# exported\n\n{json.dumps({'note': 1})}\n{json.dumps(line)}\n")
    assert open_trace(path).format == form  # type: ignore[attr-defined]


def test_what_cannot_be_told_or_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("hello\n")
    with pytest.raises(InvalidArgumentError, match="no trace format that is known"):
        open_trace(tmp_path / "t")
    with pytest.raises(InvalidArgumentError, match=r"cannot read .*nowhere"):
        open_trace(tmp_path / "nowhere")
    with pytest.raises(InvalidArgumentError, match="no trace format named 'x'"):
        open_trace(tmp_path / "t", format="x")


@given(st.integers(0, (1 << 64) - 1))
def test_mixing_is_one_to_one(value: int) -> None:
    """Each step has an inverse; undone here from its definition."""

    def unshift(found: int, by: int) -> int:
        out = found
        for _ in range(64 // by + 1):
            out = found ^ (out >> by)
        return out

    mask = (1 << 64) - 1
    back = unshift(mixed(value), 31)
    back = unshift(back * pow(0x94D049BB133111EB, -1, 1 << 64) & mask, 27)
    back = unshift(back * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & mask, 30)
    assert (back - 0x9E3779B97F4A7C15) & mask == value
    assert array("q", [signed(value)]).tobytes() == value.to_bytes(8, "little")


def test_the_bound_counts_leading_ids_seen_before(trace: Path) -> None:
    """Request 2 finds 1, 2; request 3 starts with an unknown id; request 4 finds 1, 2, 3."""
    found = facts(open_trace(trace))
    assert found == TraceFacts(requests=5, blocks=12, unique_blocks=6, hit_blocks=5)
    assert found.bound == pytest.approx(5 / 12)


SHARED = Path(__file__).resolve().parents[4] / "shared" / "traces"
PUBLISHED = {
    "mooncake_conversation.jsonl.zst": (12_031, 288_500, 182_790, 0.3664),
    "claudecode_v6_512.jsonl.zst": (25_448, 4_505_312, 186_550, 0.9586),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_real_traces_have_their_published_bound(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the recorded trace is not here: {path}")
    opened = open_trace(path)
    found = facts(opened)
    assert (found.requests, found.blocks, found.unique_blocks, round(found.bound, 4)) == PUBLISHED[name]
    assert not opened.problems
