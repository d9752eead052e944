"""The disk tier: bound, trouble, folder, and what survives."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

lmdb = pytest.importorskip("lmdb", reason="the disk tier needs lmdb")
pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from hicache.errors import ConfigError, InvalidArgumentError, UnavailableError, ViolationError  # noqa: E402
from hicache.keys import fingerprint  # noqa: E402
from hicache.tier import folder as folder_module  # noqa: E402
from hicache.tier.disk import MIN_CAPACITY_BYTES, DiskStore, Layout  # noqa: E402
from hicache.tier.lmdb_env import Medium  # noqa: E402
from hicache.tier.shelf import Look  # noqa: E402
from hicache.types import Batch, Namespace, Op, Outcome, PageRecord  # noqa: E402

OK, MISS, CORRUPT, FULL, FAULT = Outcome.OK, Outcome.MISS, Outcome.CORRUPT, Outcome.FULL, Outcome.FAULT


def shard_of(store: DiskStore, page_key: bytes) -> Any:
    """The open shard that holds a page; tests change it behind the store's back."""
    with Look(store._shelf) as look:
        return next(look.find(page_key))


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


# -- the bound


class Sampler:
    """The highest disk use seen while it ran."""

    def __init__(self, folder: Path, du: Any) -> None:
        self.highest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(folder, du))

    def _run(self, folder: Path, du: Any) -> None:
        while not self._stop.wait(0.001):
            self.highest = max(self.highest, du(folder))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def test_churn_of_mixed_sizes_within_the_usable_part_is_never_refused(
    tmp_path: Path, drive: Any, du: Any, rng: random.Random
) -> None:
    capacity = 32 << 20
    store = drive(tmp_path, capacity, compress_workers=1)
    live: list[tuple[bytes, int]] = []
    used, put = 0, 0
    with Sampler(tmp_path, du) as sampler:
        for _ in range(120):
            size = rng.choice([9_000, 30_000, 65_536, 200_000])
            pages = {key(put + i): noise(put + i, size) for i in range(8)}
            put += 8
            while used + 8 * (size + 9000) > store.store.usable_bytes:
                victim, charge = live.pop(rng.randrange(len(live)))
                store.submit(Op.DELETE, [victim])
                used -= charge
            done = store.put(pages)
            assert set(done.outcomes) == {OK}, done.error
            live += zip(pages, done.charges, strict=True)
            used += sum(done.charges)
    assert sampler.highest <= capacity
    # charges cover what the file really holds, but for the roots of its trees
    assert store.store.used_bytes <= used + 32_768
    assert used < store.store.used_bytes * 1.1


def test_a_store_that_is_overfilled_refuses_stays_within_its_bound_and_recovers(
    tmp_path: Path, drive: Any, du: Any
) -> None:
    capacity = 8 << 20
    store = drive(tmp_path, capacity)
    held: list[bytes] = []
    with Sampler(tmp_path, du) as sampler:
        for first in range(0, 240, 8):
            pages = {key(n): noise(n, 100_000) for n in range(first, first + 8)}
            done = store.put(pages)
            assert set(done.outcomes) <= {OK, FULL}
            assert FULL not in done.outcomes or "full" in done.error
            held += [k for k, outcome in zip(pages, done.outcomes, strict=True) if outcome is OK]
    assert sampler.highest <= capacity
    assert len(held) * 100_000 > 0.8 * capacity
    assert store.store.stats.refused_pages > 100
    assert MISS not in store.get(held, 100_000)
    assert set(store.delete(held[: len(held) // 2]).outcomes) == {OK}
    again = {key(n): noise(n, 100_000) for n in range(1000, 1000 + len(held) // 3)}
    store.flush()
    assert set(store.put(again).outcomes) == {OK}
    assert store.get(list(again), 100_000) == list(again.values())


def fragmented(drive: Any, tmp_path: Path, rng: random.Random) -> tuple[Any, list[bytes]]:
    """A store full of small pages, half of them deleted at random: much room, none of it long."""
    store = drive(tmp_path, 16 << 20)
    small = [key(n) for n in range(1200)]
    for first in range(0, 1200, 50):
        done = store.put({k: noise(1, 9_000) for k in small[first : first + 50]})
        assert set(done.outcomes) == {OK}
    rng.shuffle(small)
    store.delete(small[500:])
    return store, small[:500]


def test_large_pages_find_room_between_small_ones(tmp_path: Path, drive: Any, rng: random.Random) -> None:
    store, small = fragmented(drive, tmp_path, rng)
    large = {key(n): noise(n, 500_000) for n in range(5000, 5012)}
    done = store.put(large)
    assert set(done.outcomes) == {OK}
    assert store.store.stats.map_full
    assert store.store.stats.pieces_pages
    assert sum(done.charges) >= 12 * 500_000
    assert store.get(list(large), 500_000) == list(large.values())
    assert store.get(small, 9_000) == [noise(1, 9_000)] * len(small)


def test_damage_to_pages_in_pieces_is_noticed_and_leaves_nothing_behind(
    tmp_path: Path, drive: Any, rng: random.Random
) -> None:
    store, _ = fragmented(drive, tmp_path, rng)
    pages = {key(n): noise(n, 100_000) for n in range(5000, 5060)}
    store.put(pages)
    db = shard_of(store.store, key(5000)).db
    with db.env.begin() as txn:
        cut = [k for k in pages if len(txn.get(k, db=db.pages)) < 100]
    assert len(cut) >= 6
    rotten, missing, mislabelled, replaced, *others = cut
    with db.env.begin(write=True) as txn:
        piece = bytearray(txn.get(rotten + b"\0\0\0\2", db=db.pieces))
        piece[99] ^= 1
        txn.put(rotten + b"\0\0\0\2", piece, db=db.pieces)
        txn.delete(missing + b"\0\0\0\3", db=db.pieces)
        txn.put(mislabelled, b"HKVS\x08\0\0\0" + (1 << 30).to_bytes(8, "little"), db=db.pages)
    assert store.get([rotten, missing, mislabelled], 100_000) == [CORRUPT] * 3
    assert store.get([rotten, missing, mislabelled], 100_000) == [MISS] * 3
    assert list(store.put({replaced: noise(4, 500)}).outcomes) == [OK]
    assert store.get([replaced], 500) == [noise(4, 500)]
    assert set(store.delete(others).outcomes) == {OK}
    with db.env.begin() as txn:
        assert not txn.stat(db.pieces)["entries"]


def test_compression_counts_in_the_charge(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path)
    floats = np.random.default_rng(0).standard_normal(1 << 18, dtype=np.float32)
    page = (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    [charge] = store.put({key(1): page}).charges
    assert len(page) / charge > 1.4
    [raw] = store.put({key(2): noise(1, len(page))}).charges
    assert len(page) < raw < len(page) + 9000


def test_a_lower_capacity_at_the_next_start_is_kept(tmp_path: Path, drive: Any, du: Any) -> None:
    store = drive(tmp_path, 16 << 20)
    store.put({key(n): noise(n, 100_000) for n in range(100)})
    store.store.close()
    store = drive(tmp_path, 4 << 20)
    assert list(store.put({key(1000): noise(1, 100_000)}).outcomes) == [OK]
    assert store.store.progress() == ""
    assert store.store.stats.evacuations
    assert du(tmp_path) <= 4 << 20
    assert store.get([key(1000)], 100_000) == [noise(1, 100_000)]


def test_a_higher_capacity_keeps_everything(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path, 4 << 20)
    store.put({key(1): noise(1, 1000)})
    store.store.close()
    store = drive(tmp_path, 64 << 20)
    assert store.get([key(1)], 1000) == [noise(1, 1000)]


# -- trouble


def flip(store: Any, page_key: bytes, offset: int) -> None:
    db = shard_of(store.store, page_key).db
    with db.env.begin(write=True, db=db.pages) as txn:
        record = bytearray(txn.get(page_key))
        record[offset] ^= 4
        txn.put(page_key, record)


def test_a_corrupt_page_is_reported_once_then_missing_then_storable(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path)
    pages = {key(n): noise(n, 5000) for n in range(3)}
    store.put(pages)
    flip(store, key(1), 3000)
    assert store.get(list(pages), 5000) == [noise(0, 5000), CORRUPT, noise(2, 5000)]
    assert store.store.stats.purged_pages == 1
    assert store.get([key(1)], 5000) == [MISS]
    assert list(store.put({key(1): noise(1, 5000)}).outcomes) == [OK]
    assert store.get([key(1)], 5000) == [noise(1, 5000)]


def test_a_page_replaced_while_its_corruption_was_on_its_way_is_kept(tmp_path: Path, drive: Any) -> None:
    from hicache.tier.ops import Purge
    from hicache.tier.outbox import Pending

    store = drive(tmp_path)
    store.put({key(1): noise(1, 5000)})
    batch = Batch(999, Op.GET, 5000, keys=[key(1)], buffers=[memoryview(bytearray(5000))])
    store.store._writer.submit([Purge(Pending(batch, 1, store.store._outbox), (0,))])
    store.wait(999)
    assert store.get([key(1)], 5000) == [noise(1, 5000)]


def test_two_pages_swapped_on_disk_are_both_corrupt(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path)
    store.put({key(1): noise(1, 5000), key(2): noise(2, 5000)})
    db = shard_of(store.store, key(1)).db
    with db.env.begin(write=True, db=db.pages) as txn:
        one, two = txn.get(key(1)), txn.get(key(2))
        txn.put(key(1), two)
        txn.put(key(2), one)
    assert store.get([key(1), key(2)], 5000) == [CORRUPT, CORRUPT]


class Failing(Medium):
    """A medium whose write transactions fail like a broken disk, for a while."""

    def __init__(self) -> None:
        self.step = ""
        self.error: Exception = lmdb.DiskError("Input/output error")

    def before(self, step: str, path: Path) -> None:
        if step == self.step:
            raise self.error


@pytest.mark.parametrize("step", ["begin", "put", "commit"])
def test_an_io_error_is_a_fault_with_its_text_and_reads_go_on(tmp_path: Path, drive: Any, step: str) -> None:
    medium = Failing()
    store = drive(tmp_path, layout=Layout(medium=medium))
    store.put({key(1): noise(1, 5000)})
    medium.step = step
    namespace = Namespace("m", 4, 5000)
    store.store.put_namespace(fingerprint(namespace), namespace)
    done = store.put({key(2): noise(2, 5000)})
    assert list(done.outcomes) == [FAULT]
    assert "Input/output error" in done.error
    assert "Input/output error" in store.store.last_error
    if step != "put":
        assert list(store.delete([key(1)]).outcomes) == [FAULT]
    assert list(store.wait(store.submit(Op.PROBE, [])).outcomes) == [FAULT]
    if step != "put":
        assert store.get([key(1)], 5000) == [noise(1, 5000)]
    assert store.get([key(2)], 5000) == [MISS]
    medium.step = ""
    assert list(store.wait(store.submit(Op.PROBE, [])).outcomes) == [OK]
    assert list(store.put({key(2): noise(2, 5000)}).outcomes) == [OK]
    store.store.close()
    assert drive(tmp_path).store.namespaces() == {fingerprint(namespace): namespace}


def test_a_disk_that_is_smaller_than_the_capacity_faults_and_keeps_serving(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for ENOSPC: writes beyond it fail, in the middle of a commit."""
    code = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from conftest import Driver
from pathlib import Path
from hicache.types import Outcome
import os
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Driver(Path(sys.argv[1]), 64 << 20)
keys = [bytes([n]) * 32 for n in range(40)]
pages = {k: os.urandom(200_000) for k in keys}
first = {k: pages[k] for k in keys[:10]}
assert set(store.put(first).outcomes) == {Outcome.OK}
limit = os.stat(Path(sys.argv[1]) / "shards/0/data.mdb").st_size + 300_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
done = store.put({k: pages[k] for k in keys[10:]})
assert set(done.outcomes) == {Outcome.FAULT} and done.error, done
assert store.get(keys[:10], 200_000) == list(first.values())
assert store.get(keys[10:11], 200_000) == [Outcome.MISS]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert set(store.put({k: pages[k] for k in keys[10:]}).outcomes) == {Outcome.OK}
assert store.get(keys, 200_000) == list(pages.values())
store.store.close()
print("fine", done.error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout.startswith("fine"), ran.stderr


def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path)
    for keys, buffers, fields in (
        ([b"short"], [b"page"], {}),
        ([key(1)], [b""], {}),
        ([key(1)], [b"page"], {"records": [PageRecord(b"", b"", b"")]}),
        ([key(1)], [b"page"], {"records": [PageRecord(key(1), key(1), b"s")] * 2}),
    ):
        with pytest.raises(InvalidArgumentError):
            store.submit(Op.PUT, keys, buffers, **fields)
    with pytest.raises(InvalidArgumentError):
        store.store.put_namespace(key(1), Namespace("m", 4, 5000))


def test_a_forked_child_may_not_use_the_store(tmp_path: Path, drive: Any, monkeypatch: Any) -> None:
    store = drive(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(ViolationError):
            store.flush()
        store.store.close()  # does nothing
    assert not store.flush().error
    store.store.close()
    with pytest.raises(UnavailableError):
        store.flush()


# -- the folder


def test_a_second_open_is_refused_and_names_the_holder(tmp_path: Path, drive: Any) -> None:
    drive(tmp_path)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        drive(tmp_path)
    code = f"from hicache.tier.disk import DiskStore; DiskStore({str(tmp_path)!r}, 16 << 20, print)"
    ran = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=30
    )
    assert f"in use by process {os.getpid()}" in ran.stderr


def test_a_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, drive: Any) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        drive(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ['{"format": "hicache-disk", "version": 3}', "garbage", "", "[]"])
def test_a_newer_or_unreadable_format_is_refused(tmp_path: Path, drive: Any, content: str) -> None:
    drive(tmp_path).store.close()
    (tmp_path / "FORMAT").write_text(content)
    with pytest.raises(ConfigError, match=r"version 3|unreadable"):
        drive(tmp_path)


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path, drive: Any) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(ConfigError):
            drive(path)


def test_options_that_make_no_sense_are_refused(tmp_path: Path, drive: Any) -> None:
    with pytest.raises(ConfigError):
        drive(tmp_path, MIN_CAPACITY_BYTES - 1)
    with pytest.raises(ConfigError):
        drive(tmp_path, page_codec="zip")


def test_network_file_systems_are_refused(tmp_path: Path, drive: Any, monkeypatch: Any) -> None:
    assert folder_module.filesystem(tmp_path)
    assert folder_module.filesystem(Path("/proc/self")) == "proc"
    for kind in ("nfs", "nfs4", "cifs", "fuse.sshfs"):
        monkeypatch.setattr(folder_module, "filesystem", lambda _path, kind=kind: kind)
        with pytest.raises(ConfigError, match="network file system"):
            drive(tmp_path)


def stored(tmp_path: Path, drive: Any) -> Path:
    """A folder with one page in it, closed; its data file."""
    store = drive(tmp_path)
    store.put({key(n): noise(n, 50_000) for n in range(20)})
    store.store.close()
    return tmp_path / "shards" / "0" / "data.mdb"


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 5000, 8192, 100_000])
def test_a_truncated_data_file_starts_empty(tmp_path: Path, drive: Any, size: int) -> None:
    os.truncate(stored(tmp_path, drive), size)
    store = drive(tmp_path)
    assert bool(store.store.wiped) == bool(size)
    assert store.get([key(1)], 50_000) == [MISS]
    assert set(store.put({key(1): noise(1, 50_000)}).outcomes) == {OK}


def test_garbage_in_the_data_file_starts_empty(tmp_path: Path, drive: Any) -> None:
    data = stored(tmp_path, drive)
    data.write_bytes(noise(1, data.stat().st_size))
    store = drive(tmp_path)
    assert "not usable" in store.store.wiped
    assert set(store.put({key(1): noise(1, 50_000)}).outcomes) == {OK}


# -- restart


def crashed_state(tmp_path: Path, **changes: object) -> None:
    """Make the folder look as it would after an unclean end."""
    state = json.loads((tmp_path / "STATE").read_text())
    (tmp_path / "STATE").write_text(json.dumps({**state, "clean": False, **changes}))


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),  # the process died, the machine did not
        ({"clean": True, "boot": "another"}, True),
        ({"boot": "another"}, False),
        ({"boot": "another", "sync": True}, True),
    ],
)
def test_what_is_trusted_after_a_restart(tmp_path: Path, drive: Any, changes: Any, kept: bool) -> None:
    stored(tmp_path, drive)
    crashed_state(tmp_path, **changes)
    store = drive(tmp_path)
    assert bool(store.store.wiped) != kept
    assert store.get([key(1)], 50_000) == [noise(1, 50_000) if kept else MISS]


def test_a_folder_without_a_state_is_not_trusted(tmp_path: Path, drive: Any) -> None:
    stored(tmp_path, drive)
    (tmp_path / "STATE").write_text("{")
    assert drive(tmp_path).store.wiped


def test_a_synced_store_works_the_same(tmp_path: Path, drive: Any) -> None:
    store = drive(tmp_path, sync=True)
    store.put({key(n): noise(n, 1000) for n in range(50)})
    store.store.close()
    store = drive(tmp_path, sync=True)
    assert store.get([key(7)], 1000) == [noise(7, 1000)]


def test_raw_pages_stay_raw(tmp_path: Path, drive: Any) -> None:
    namespace = Namespace("m", 4, 5000, codec="raw")
    name = fingerprint(namespace)
    store = drive(tmp_path)
    store.store.put_namespace(name, namespace)
    [charge] = store.put({key(1): bytes(5000)}, records=[PageRecord(name, name, bytes(16))]).charges
    assert charge > 5000
    [charge] = store.put({key(2): bytes(5000)}).charges
    assert charge < 4096


def test_readers_leave_nothing_behind(tmp_path: Path, drive: Any) -> None:
    store: DiskStore = drive(tmp_path).store
    assert store._shelf.check_readers() == 0
