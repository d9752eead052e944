"""Reading traces, plain and compressed, and counting their infinite-cache bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from hicache.cli import traces
from hicache.errors import InvalidArgumentError

REQUESTS = [(1, 2, 3), (1, 2, 4), (9, 2), (1, 2, 3, 5), ()]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    lines = [
        json.dumps({"timestamp": i, "input_length": 1, "hash_ids": ids}) for i, ids in enumerate(REQUESTS)
    ]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def test_plain_and_compressed_read_the_same(trace: Path) -> None:
    packed = trace.with_suffix(".zst")
    packed.write_bytes(zstandard.compress(trace.read_bytes()))
    read = [request.hash_ids for request in traces.read(trace)]
    assert read == REQUESTS
    assert [request.hash_ids for request in traces.read(packed)] == read
    assert [request.hash_ids for request in traces.read(packed, limit=2)] == read[:2]


def test_the_bound_counts_leading_ids_seen_before(trace: Path) -> None:
    """Request 2 finds 1, 2; request 3 starts with an unknown id; request 4 finds 1, 2, 3."""
    facts = traces.facts(traces.read(trace))
    assert facts == traces.TraceFacts(requests=5, blocks=12, unique_blocks=6, hit_blocks=5)
    assert facts.bound == pytest.approx(5 / 12)


def test_symbols_are_the_same_in_every_process_and_for_one_salt_only() -> None:
    symbols = traces.Symbols("a")
    assert symbols.of((1, 2)) == traces.Symbols("a").of((1,)) + traces.Symbols("a").of((2,))
    assert traces.Symbols("b").of((1,)) != symbols.of((1,))
    assert len(symbols.of((0, -1, 2**70))) == 3 * traces.SYMBOL_BYTES


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace.jsonl:2: not a Mooncake trace line"),
        ('{"timestamp": 1}', "no 'hash_ids' in it"),
        ('{"hash_ids": [1.5]}', "hash_ids must be whole numbers"),
        ('{"hash_ids": 3}', "trace.jsonl:2"),
        ("[1]", "trace.jsonl:2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1]}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=message):
        list(traces.read(path))


def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"--trace: cannot read .*nowhere"):
        list(traces.read(tmp_path / "nowhere"))
    packed = tmp_path / "cut.zst"
    packed.write_bytes(zstandard.compress(b'{"hash_ids": [1]}\n' * 1000)[:-3] + b"xxx")
    with pytest.raises(InvalidArgumentError, match="neither JSON lines nor zstd"):
        list(traces.read(packed))


CONVERSATION = Path(__file__).resolve().parents[3] / "shared" / "traces" / "mooncake_conversation.jsonl.zst"


@pytest.mark.skipif(not CONVERSATION.exists(), reason=f"the recorded trace is not here: {CONVERSATION}")
def test_the_conversation_trace_has_the_published_bound() -> None:
    facts = traces.facts(traces.read(CONVERSATION))
    assert (facts.requests, facts.blocks, facts.unique_blocks) == (12_031, 288_500, 182_790)
    assert round(facts.bound, 4) == 0.3664
