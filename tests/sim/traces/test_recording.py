"""Recordings: any requests survive the way through a file; a cut file is read up to its cut."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache import recording
from hicache.errors import InvalidArgumentError
from hicache.recording import BlockBuilder, Entry, EntryKind
from hicache.sim.traces import Request, open_trace, source
from hicache.sim.traces.writers import coarser, write

IDS = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3)
NAMES = st.text(max_size=8)
REQUESTS = st.lists(
    st.builds(
        Request,
        at_ms=st.integers(0, 10**14),
        input_tokens=st.integers(0, 2**40),
        output_tokens=st.integers(0, 2**40),
        blocks=st.lists(IDS, max_size=12).map(lambda ids: array("q", ids)),
        cls=NAMES,
        turn=st.integers(0, 2**31 - 1),
        session=NAMES,
    ),
    max_size=12,
)


@given(
    REQUESTS,
    st.sampled_from(["t.jsonl", "t.hcrec", "t.jsonl.zst", "t.hcrec.zst", "t.jsonl.gz", "t.xz", "t.bz2"]),
)
def test_any_requests_survive_every_writable_format(
    tmp_path_factory: pytest.TempPathFactory, requests: list[Request], name: str
) -> None:
    path = tmp_path_factory.mktemp("w") / name
    assert write(path, requests, block_tokens=16) == len(requests)
    opened = open_trace(path, format="recording" if ".hcrec" in name else "mooncake")
    assert list(opened) == requests
    assert list(opened) == requests
    assert not opened.problems
    if ".hcrec" in name:
        assert opened.block_tokens == 16


def test_blocks_share_what_entries_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = BlockBuilder()
    ids = array("q", [random.Random(1).getrandbits(62) for _ in range(1000)])
    for turn in range(100):
        builder.add(Entry(EntryKind.LOOKUP, turn, "", 16, ids[: 10 * turn]))
    raw = builder.take()
    assert len(raw) < 8 * 1000 + 3000
    assert not len(builder)


def many(path: Path, count: int = 6000) -> list[Request]:
    rng = random.Random(3)
    made = [Request(i, 16, 1, array("q", [rng.getrandbits(60) for _ in range(5)])) for i in range(count)]
    write(path, made, block_tokens=16)
    return made


@pytest.mark.parametrize("share", [0.0001, 0.2, 0.5, 0.9, 0.9999])
def test_a_cut_recording_is_read_up_to_its_last_whole_block(tmp_path: Path, share: float) -> None:
    path = tmp_path / "t.hcrec"
    made = many(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    opened = open_trace(path, format="recording")
    read = list(opened)
    assert read == made[: len(read)]
    assert len(read) % recording.BLOCK_ENTRIES == 0
    assert opened.problems.total == 1
    with pytest.raises(InvalidArgumentError, match=r"t\.hcrec: block"):
        list(open_trace(path, format="recording", strict=True, block_tokens=16))


def test_damage_to_a_block_s_head_is_seen(tmp_path: Path) -> None:
    """Every byte before the entries: a head that lies about its block must not hide it."""
    path = tmp_path / "t.hcrec"
    made = many(path, 30)
    raw = path.read_bytes()
    for at in range(120):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        opened = open_trace(path, format="recording")
        read = list(opened)
        assert read in (made, [])
        assert opened.problems or read == made, at


@given(st.data())
def test_a_damaged_recording_gives_no_wrong_request(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("d") / "t.hcrec"
    made = many(path, 30)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    opened = open_trace(path, format="recording")
    read = list(opened)
    assert read in (made, [])
    assert opened.problems or read == made


def entry(kind: EntryKind, at_ms: int, ids: list[int], **more: object) -> Entry:
    return Entry(kind, at_ms, "n", 4, array("q", ids), **({"input_tokens": 4 * len(ids)} | more))  # type: ignore[arg-type]


def raw_recording(path: Path, entries: list[Entry]) -> Path:
    builder = BlockBuilder()
    for found in entries:
        builder.add(found)
    path.write_bytes(recording.opening({}) + builder.take())
    return path


def test_a_look_up_and_its_store_come_out_as_one_request(tmp_path: Path) -> None:
    path = raw_recording(
        tmp_path / "r",
        [
            entry(EntryKind.LOOKUP, 0, [1, 2]),
            entry(EntryKind.LOOKUP, 1, [1, 5]),
            entry(EntryKind.STORE, 2, [1, 2, 3], of=2),
            entry(EntryKind.STORE, 3, [8], of=0),
            entry(EntryKind.LOOKUP, 4, [1, 2, 3]),
        ],
    )
    found = list(open_trace(path))
    assert [(r.at_ms, r.blocks.tolist(), r.input_tokens, r.output_tokens) for r in found] == [
        (0, [1, 2, 3], 8, 4),
        (1, [1, 5], 8, 0),
        (3, [8], 0, 4),
        (4, [1, 2, 3], 12, 0),
    ]


def test_a_store_long_after_its_look_up_stands_alone(tmp_path: Path) -> None:
    path = raw_recording(
        tmp_path / "r",
        [
            entry(EntryKind.LOOKUP, 0, [1, 2]),
            entry(EntryKind.LOOKUP, 100_000, [9]),
            entry(EntryKind.STORE, 100_001, [1, 2], of=2),
        ],
    )
    assert [(r.at_ms, r.input_tokens) for r in open_trace(path)] == [(0, 8), (100_000, 4), (100_001, 0)]


def test_namespaces_of_another_grain_are_left_out_and_named(tmp_path: Path) -> None:
    other = Entry(EntryKind.LOOKUP, 1, "other", 16, array("q", [4]))
    path = raw_recording(tmp_path / "r", [entry(EntryKind.LOOKUP, 0, [1]), other, other])
    opened = open_trace(path)
    assert (len(list(opened)), opened.block_tokens) == (1, 4)
    assert [p.text for p in opened.problems] == ["namespace other has pages of 16 tokens: left out"]
    assert len(list(open_trace(path, block_tokens=16))) == 2


def test_coarser_blocks_keep_what_is_shared() -> None:
    request = Request(5, 100, 1, array("q", range(7)), cls="c", turn=2, session="s")
    (found,) = coarser([request], 3)
    assert found == Request(5, 100, 1, array("q", [2, 5]), cls="c", turn=2, session="s")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot write"):
        write(tmp_path / "no" / "t.jsonl", [], block_tokens=1)
    with pytest.raises(InvalidArgumentError, match="cannot write format 'x'"):
        write(tmp_path / "t", [], block_tokens=1, form="x")
    assert source.DAMAGE
