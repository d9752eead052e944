"""Shards: how a capacity is divided, which shard gets what, how room is given back, what is kept aside."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

lmdb = pytest.importorskip("lmdb", reason="the disk tier needs lmdb")
pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from hicache.errors import ConfigError, InvalidArgumentError  # noqa: E402
from hicache.keys import chain_keys, fingerprint  # noqa: E402
from hicache.tier import folder as folder_module  # noqa: E402
from hicache.tier.disk import DiskStore, Layout  # noqa: E402
from hicache.tier.geometry import SHARD_FILES_BYTES, divide  # noqa: E402
from hicache.tier.lmdb_env import Medium  # noqa: E402
from hicache.tier.ops import delete_order  # noqa: E402
from hicache.tier.rows import pack_namespace  # noqa: E402
from hicache.tier.shards import create_shard, list_shards, open_shard  # noqa: E402
from hicache.tier.shelf import Look  # noqa: E402
from hicache.types import Namespace, Op, Outcome, PageRecord  # noqa: E402

OK, MISS, CORRUPT, FULL, FAULT = Outcome.OK, Outcome.MISS, Outcome.CORRUPT, Outcome.FULL, Outcome.FAULT
SPACE = Namespace("m", 4, 5000)
SEED = fingerprint(SPACE)


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def chain(pages: int, first: int = 0) -> tuple[list[bytes], list[PageRecord]]:
    """Keys and records of one prompt."""
    symbols = [(first + n).to_bytes(16, "little") for n in range(pages)]
    keys = chain_keys(SEED, b"".join(symbols), 16)
    parents = [SEED, *keys]
    return keys, [PageRecord(SEED, parents[n], symbols[n]) for n in range(pages)]


def quiet(store: DiskStore) -> None:
    deadline = time.monotonic() + 30
    while store.progress():
        assert time.monotonic() < deadline, store.progress()
        time.sleep(0.005)


def shards_of(store: DiskStore, page_key: bytes) -> list[int]:
    with Look(store._shelf) as look:
        return [shard.info.number for shard in look.find(page_key)]


# -- geometry


@given(st.integers(4 << 20, 1 << 44), st.integers(0, 1 << 30))
def test_the_parts_fit_into_the_capacity(capacity: int, quarantine: int) -> None:
    found = divide(capacity, quarantine)
    shards = (found.data_bytes - found.reserve_bytes) // (found.shard_bytes + SHARD_FILES_BYTES)
    assert 1 <= shards <= 64
    assert found.data_bytes + found.quarantine_bytes < capacity
    assert found.usable_bytes <= shards * found.shard_bytes
    assert found.usable_bytes > 0.7 * capacity
    assert found.reserve_bytes in (0, found.shard_bytes + SHARD_FILES_BYTES)
    assert found.map_bytes(0, found.data_bytes) % 4096 == 0


# -- placing


def test_page_sizes_are_kept_apart(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path, 16 << 20, layout=Layout(shard_bytes=1 << 20))
    small = {key(n): noise(n, 3000) for n in range(40)}
    large = {key(n): noise(n, 50_000) for n in range(100, 120)}
    assert set(store.put(small).outcomes) | set(store.put(large).outcomes) == {OK}
    here = {shards_of(store.store, k)[0] for k in small}
    there = {shards_of(store.store, k)[0] for k in large}
    assert not here & there
    infos = {info.number: info for info in list_shards(tmp_path)}
    assert {infos[n].size_class_bytes for n in here} == {3000}
    assert {infos[n].size_class_bytes for n in there} == {50_000}


def test_a_class_gets_the_shard_that_another_one_no_longer_fills(tmp_path: Path, drive: Any, du: Any) -> None:
    capacity = 8 << 20
    store = drive(tmp_path, capacity, layout=Layout(shard_bytes=1 << 20))
    old = {key(n): noise(n, 20_000) for n in range(220)}
    assert set(store.put(old).outcomes) == {OK}
    kept = [k for n, k in enumerate(old) if n % 10 == 0]
    store.delete([k for n, k in enumerate(old) if n % 10])
    new = {key(n): noise(n, 50_000) for n in range(1000, 1070)}
    for first in range(0, 70, 10):
        assert set(store.put(dict(list(new.items())[first : first + 10])).outcomes) == {OK}
        assert du(tmp_path) <= capacity
        quiet(store.store)
    assert store.store.stats.evacuations > 0
    assert store.get(kept, 20_000) == [old[k] for k in kept]
    assert store.get(list(new), 50_000) == list(new.values())


def test_a_parent_is_never_committed_after_its_child(tmp_path: Path, drive: Any) -> None:
    """Die before every commit in turn: what is there has its ancestors, and what was acknowledged is there."""
    keys, records = chain(60)
    pages = [noise(n, 20_000) for n in range(60)]
    for steps in range(40):
        medium = Dying(steps)
        home = tmp_path / str(steps)
        store = drive(home, 8 << 20, layout=Layout(shard_bytes=512 << 10, medium=medium))
        store.store.put_namespace(SEED, SPACE)
        batches = [
            store.submit(Op.PUT, keys[n : n + 7], pages[n : n + 7], records=records[n : n + 7])
            for n in range(0, 60, 7)
        ]
        outcomes = [outcome for batch in batches for outcome in store.wait(batch).outcomes]
        doomed = keys[30:] if steps % 2 else keys[:29:-1]
        if FAULT not in outcomes:
            store.delete(doomed)
        store.store.close()
        recovery = drive(home, 8 << 20, layout=Layout(shard_bytes=512 << 10)).store.recover()
        chains = list(recovery)
        assert [c.parent for c in chains] in ([], [-1])
        found = chains[0].keys if chains else []
        assert found == keys[: len(found)]
        acknowledged = [k for k, outcome in zip(keys, outcomes, strict=True) if outcome is OK]
        assert set(acknowledged) - set(doomed) <= set(found)


class Dying(Medium):
    """The process is dead after so many commits."""

    def __init__(self, commits: int) -> None:
        self.left = commits

    def before(self, step: str, path: Path) -> None:
        if self.left <= 0:
            raise lmdb.DiskError("dead")
        self.left -= step == "commit"


@given(st.data())
def test_deletes_go_shard_by_shard_children_first(data: Any) -> None:
    class Place:
        def __init__(self, number: int) -> None:
            self.info = self
            self.number = number

    places = [Place(n) for n in range(3)]
    count = data.draw(st.integers(1, 30))
    names = [bytes([n]) for n in range(count)]
    order = data.draw(st.permutations(range(count)))
    parents = {names[n]: names[data.draw(st.integers(0, n - 1))] if n else b"root" for n in range(count)}
    homes: dict[bytes, Any] = {
        names[n]: tuple(data.draw(st.lists(st.sampled_from(places), max_size=2, unique=True))) for n in order
    }
    steps = delete_order(homes, parents)
    assert sorted((k, s.number) for s, keys in steps for k in keys) == sorted(  # type: ignore[attr-defined]
        (k, s.number) for k, found in homes.items() for s in found
    )
    present = {k: len(found) for k, found in homes.items()}
    for _, keys in steps:
        for k in keys:
            present[k] -= 1
        gone = {k for k, left in present.items() if not left and homes[k]}
        assert all(present[k] == 0 for k in names if parents[k] in gone)


# -- giving back


def test_compaction_gives_disk_space_back(tmp_path: Path, drive: Any, du: Any) -> None:
    store = drive(tmp_path, 32 << 20, layout=Layout(shard_bytes=4 << 20))
    pages = {key(n): noise(n, 50_000) for n in range(400)}
    assert set(store.put(pages).outcomes) == {OK}
    kept = list(pages)[::8]
    store.delete([k for k in pages if k not in set(kept)])
    before = du(tmp_path)
    store.store.compact()
    store.flush()
    quiet(store.store)
    assert du(tmp_path) < before / 2
    assert store.get(kept, 50_000) == [pages[k] for k in kept]


def test_pages_are_found_while_they_move(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path, 32 << 20, layout=Layout(shard_bytes=4 << 20), readers=3)
    pages = {key(n): noise(n, 20_000) for n in range(900)}
    assert set(store.put(pages).outcomes) == {OK}
    kept = list(pages)[::4]
    store.delete([k for k in pages if k not in set(kept)])
    rng = random.Random(1)
    store.store.compact()
    for _ in range(60):
        some = rng.sample(kept, 20)
        assert store.get(some, 20_000) == [pages[k] for k in some]
    quiet(store.store)
    assert store.store.stats.evacuated_pages > 0
    assert store.get(kept, 20_000) == [pages[k] for k in kept]


def test_a_smaller_capacity_keeps_the_warmest_pages(tmp_path: Path, drive: Any, du: Any) -> None:
    layout = Layout(shard_bytes=1 << 20)
    store = drive(tmp_path, 32 << 20, layout=layout, wall_ms=lambda: 5)
    store.store.put_namespace(SEED, SPACE)
    prompts = [chain(10, first=100 * n) for n in range(100)]
    for keys, records in prompts:
        data = {k: noise(k[0], 20_000) for k in keys}
        assert set(store.put(data, records=records).outcomes) == {OK}
    warm = prompts[::10]
    store.store.put_heat([keys[-1] for keys, _ in warm], [1000 + n for n in range(10)], [7] * 10)
    store.flush()
    store.store.close()
    store = drive(tmp_path, 8 << 20, layout=layout)
    recovery = store.store.recover()
    chains = {c.keys[-1]: c for c in recovery if len(c.keys) == 10}
    for n, (keys, _) in enumerate(warm):
        assert (chains[keys[-1]].last_use_ms, chains[keys[-1]].hits) == (1000 + n, 7)
    assert recovery.orphans
    store.delete(recovery.orphans)
    quiet(store.store)
    assert du(tmp_path) <= 8 << 20
    for keys, _ in warm:
        assert store.get(keys, 20_000) == [noise(k[0], 20_000) for k in keys]
    assert set(store.get(recovery.orphans, 20_000)) == {MISS}
    assert set(store.put({key(1): noise(1, 20_000)}).outcomes) == {OK}


def test_what_a_crash_left_twice_is_there_once_after_the_recovery(tmp_path: Path, drive: Any) -> None:
    layout = Layout(shard_bytes=1 << 20)
    store = drive(tmp_path, 16 << 20, layout=layout)
    store.store.put_namespace(SEED, SPACE)
    keys, records = chain(5)
    store.put({k: noise(1, 5000) for k in keys}, records=records)
    [old] = list_shards(tmp_path)
    store.store.close()
    info = create_shard(tmp_path, 7, size_class_bytes=5000, map_bytes=1 << 20)
    source = open_shard(old.path, map_bytes=old.map_bytes)
    target = open_shard(info.path, map_bytes=info.map_bytes, readonly=False)
    with source.env.begin() as one, target.env.begin(write=True) as two:
        for k in keys[:3]:
            two.put(k, one.get(k, db=source.pages), db=target.pages)
            two.put(k, one.get(k, db=source.meta), db=target.meta)
    source.env.close()
    target.env.close()
    store = drive(tmp_path, 16 << 20, layout=layout)
    assert len(shards_of(store.store, keys[0])) == 2
    [found] = list(store.store.recover())
    assert found.keys == keys
    store.flush()
    assert [len(shards_of(store.store, k)) for k in keys] == [1] * 5
    assert store.get(keys, 5000) == [noise(1, 5000)] * 5


# -- upgrade


def make_version_1(home: Path, keys: list[bytes], records: list[PageRecord]) -> dict[bytes, bytes]:
    """A folder as version 1 left it: one environment at the top, rows without heat."""
    from hicache.tier.codec import encode

    pages = {k: noise(n, 5000) for n, k in enumerate(keys)}
    home.mkdir(exist_ok=True)
    (home / "FORMAT").write_text(json.dumps({"format": "hicache-disk", "version": 1}))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (home / "STATE").write_text(json.dumps({"boot": boot, "clean": True, "sync": False}))
    env = lmdb.open(str(home), map_size=4 << 20, max_dbs=4)
    dbs = {name: env.open_db(name) for name in (b"pages", b"pieces", b"meta", b"namespaces")}
    with env.begin(write=True) as txn:
        txn.put(SEED, pack_namespace(SPACE), db=dbs[b"namespaces"])
        for k, record in zip(keys, records, strict=True):
            txn.put(k, encode(memoryview(pages[k]), k).record, db=dbs[b"pages"])
            row = (8192).to_bytes(8, "little") + record.namespace + record.parent_key + record.symbol
            txn.put(k, row, db=dbs[b"meta"])
        txn.put(b"x" * 32, b"page without a record", db=dbs[b"pages"])
        txn.put(b"x" * 32, (4096).to_bytes(8, "little"), db=dbs[b"meta"])
    env.close()
    return pages


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_folder_of_version_1_is_taken_over(tmp_path: Path, drive: Any, interrupted: bool) -> None:
    keys, records = chain(20)
    pages = make_version_1(tmp_path, keys, records)
    assert [info.number for info in list_shards(tmp_path)] == [-1]
    if interrupted:
        create_shard(tmp_path, 0, size_class_bytes=0, map_bytes=4 << 20)
    store = drive(tmp_path, 16 << 20)
    assert not store.store.wiped
    assert store.get(keys, 5000) == list(pages.values())
    store.store.put_heat([keys[9]], [77], [3])
    store.flush()
    recovery = store.store.recover()
    [found] = list(recovery)
    assert (found.keys, found.charges, found.last_use_ms, found.hits) == (keys, [8192] * 20, 77, 3)
    assert recovery.orphans == [b"x" * 32]
    assert set(store.put({key(1): noise(1, 5000)}).outcomes) == {OK}
    store.store.close()
    assert json.loads((tmp_path / "FORMAT").read_text())["version"] == 2
    store = drive(tmp_path, 16 << 20)
    assert store.get(keys, 5000) == list(pages.values())


def test_what_an_interrupted_start_left_is_cleared(tmp_path: Path, drive: Any) -> None:
    drive(tmp_path).store.close()
    for name in ("3.new", "4.old", "5"):
        (tmp_path / "shards" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "shards" / name / "data.mdb").write_bytes(b"half")
    store = drive(tmp_path)
    assert set(store.put({key(1): noise(1, 5000)}).outcomes) == {OK}
    assert [f.name for f in (tmp_path / "shards").iterdir()] == ["0"]


# -- quarantine


def damage(store: DiskStore, page_key: bytes, change: Any) -> bytes:
    """Change a record behind the store's back; what it became."""
    with Look(store._shelf) as look:
        db = next(look.find(page_key)).db
    with db.env.begin(write=True, db=db.pages) as txn:
        record = change(bytes(txn.get(page_key)))
        txn.put(page_key, record)
    return bytes(record)


def test_damaged_records_are_counted_and_kept_for_study(tmp_path: Path, drive: Any, du: Any) -> None:
    store = drive(tmp_path, 16 << 20)
    pages = {key(n): noise(n, 5000) for n in range(4)}
    store.put(pages)
    flipped = damage(store.store, key(0), lambda r: r[:3000] + bytes([r[3000] ^ 1]) + r[3001:])
    short = damage(store.store, key(1), lambda r: r[:50])
    swapped: list[bytes] = []
    damage(store.store, key(2), lambda r: (swapped.append(r), r)[1])
    foreign = damage(store.store, key(3), lambda r: swapped[0])
    assert store.get([key(0), key(1), key(3)], 5000) == [CORRUPT] * 3
    assert store.get([key(0), key(1), key(2), key(3)], 5000) == [MISS, MISS, pages[key(2)], MISS]
    files = {file.name.partition(".")[0]: file for file in (tmp_path / "quarantine").iterdir()}
    assert files[key(0).hex()].read_bytes() == flipped
    assert files[key(1).hex()].read_bytes() == short
    assert files[key(3).hex()].read_bytes() == foreign
    stats = store.store.stats
    assert stats.quarantined_pages == stats.purged_pages == sum(stats.corrupt.values()) == 3
    assert stats.corrupt == {"page-checksum": 1, "size": 1, "foreign-key": 1}
    assert {file.suffix[1:] for file in files.values()} == set(stats.corrupt)
    assert set(store.put(pages).outcomes) == {OK}
    assert store.get(list(pages), 5000) == list(pages.values())


@pytest.mark.parametrize("bound", [0, 1 << 20])
def test_the_quarantine_has_a_bound_inside_the_capacity(
    tmp_path: Path, drive: Any, du: Any, bound: int
) -> None:
    store = drive(tmp_path, 16 << 20, layout=Layout(quarantine_bytes=bound))
    for first in range(0, 60, 20):
        pages = {key(n): noise(n, 9000) for n in range(first, first + 20)}
        store.put(pages)
        for k in pages:
            damage(store.store, k, lambda r: r[:-1] + bytes([r[-1] ^ 1]))
        assert store.get(list(pages), 9000) == [CORRUPT] * 20
    kept = list((tmp_path / "quarantine").iterdir()) if bound else []
    assert sum(file.stat().st_blocks * 512 for file in kept) <= (16 << 20) // 64
    assert not bound or (len(kept) > 10 and f"{key(59).hex()}" in {file.stem for file in kept})
    assert bound or not (tmp_path / "quarantine").exists()
    assert du(tmp_path) <= 16 << 20
    store.store.close()
    drive(tmp_path, 16 << 20, layout=Layout(quarantine_bytes=0))
    assert not list(tmp_path.glob("quarantine/*"))


# -- folder, faults, heat


def test_a_folder_of_another_user_is_refused(tmp_path: Path, drive: Any, monkeypatch: Any) -> None:
    drive(tmp_path).store.close()
    monkeypatch.setattr(folder_module.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="was made by user"):
        drive(tmp_path)


def test_a_file_system_that_is_too_small_is_told_at_the_start(
    tmp_path: Path, drive: Any, caplog: Any
) -> None:
    drive(tmp_path, 1 << 50)
    assert "the file system has" in caplog.text


def test_a_full_disk_is_called_that(tmp_path: Path, drive: Any) -> None:
    class Full(Medium):
        on = False

        def before(self, step: str, path: Path) -> None:
            if self.on and step in ("commit", "file"):
                raise OSError(28, "No space left on device")

    medium = Full()
    store = drive(tmp_path, layout=Layout(medium=medium))
    store.put({key(1): noise(1, 5000)})
    medium.on = True
    done = store.put({key(2): noise(2, 5000)})
    assert list(done.outcomes) == [FAULT] and "no space left on device" in done.error.lower()
    assert list(store.wait(store.submit(Op.PROBE, [])).outcomes) == [FAULT]
    medium.on = False
    assert list(store.wait(store.submit(Op.PROBE, [])).outcomes) == [OK]
    assert list(store.put({key(2): noise(2, 5000)}).outcomes) == [OK]
    assert not (tmp_path / "probe").exists()


def test_a_page_whose_parent_was_refused_is_refused(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path)
    store.store.put_namespace(SEED, SPACE)
    keys, records = chain(3)
    data = [noise(n, 5000) for n in range(3)]
    from xxhash import xxh3_64_intdigest

    sums = [xxh3_64_intdigest(page) for page in data]
    sums[0] ^= 1
    done = store.wait(store.submit(Op.PUT, keys, data, records=records, checksums=sums))
    assert list(done.outcomes) == [CORRUPT, FULL, FULL]
    assert "page before it" in done.error
    again = store.put(dict(zip(keys, data, strict=True)), records=records)
    assert set(again.outcomes) == {OK}


def test_heat_of_unknown_pages_is_passed_over(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path)
    store.store.put_heat([key(1)], [5], [1])
    with pytest.raises(InvalidArgumentError):
        store.store.put_heat([key(1)], [], [])
    assert not store.flush().error
    assert list(store.store.recover()) == []
