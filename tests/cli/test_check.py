"""``hicache check``: finds what is wrong with a folder, changes nothing unasked, and outlives any garbage."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
from pathlib import Path

import lmdb
import pytest

pytest.importorskip("lmdb", reason="the disk tier needs lmdb")

from disk_folders import CAPACITY_BYTES, Shop, hicache, make_folder, pages_of, tree_state

from hicache.types import Op, Outcome

GARBAGES = 12


def data_of(folder: Path) -> Path:
    return folder / "shards" / "0" / "data.mdb"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nobody changes."""
    folder = tmp_path_factory.mktemp("check") / "disk"
    make_folder(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(sound, tmp_path / "disk"))


def change(folder: Path, changes: dict[bytes, bytes | None], table: bytes = b"pages") -> None:
    with lmdb.open(str(data_of(folder).parent), max_dbs=4, map_size=CAPACITY_BYTES, lock=False) as env:
        db = env.open_db(table, create=False)
        with env.begin(db=db, write=True) as txn:
            for key, value in changes.items():
                txn.put(key, value) if value is not None else txn.delete(key)


def test_a_sound_folder_is_fine_and_stays_as_it_is(sound: Path) -> None:
    before = tree_state(sound)
    done = hicache("check", sound, "--disk-bytes", "32MiB")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("check: fine\n")
    assert "80 sound; 80 reachable, 0 stranded" in done.stdout
    assert tree_state(sound) == before


def test_every_kind_is_found_and_named(folder: Path) -> None:
    made = pages_of(10, 8)
    with (
        lmdb.open(str(data_of(folder).parent), max_dbs=4, readonly=True, lock=False) as env,
        env.begin(db=env.open_db(b"pages", create=False)) as txn,
    ):
        record = {bytes(key): bytes(value) for key, value in txn.cursor()}
    keys = [each.key for each in made]
    flipped = bytearray(record[keys[0]])
    flipped[-5] ^= 4
    change(
        folder,
        {
            keys[0]: bytes(flipped),
            keys[8]: record[keys[8]][:-100],
            keys[16]: record[keys[17]],
            keys[24]: b"nobody's" * 40,
            keys[32]: None,
        },
    )
    change(folder, {keys[40]: b"garbage", keys[48]: None}, b"meta")
    done = hicache("check", folder, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["faults"] == {
        "corrupt": 1,
        "truncated": 1,
        "swapped": 1,
        "foreign": 1,
        "no-record": 1,
        "bad-row": 1,
        "no-row": 1,
    }
    assert {bad["key"] for bad in found["bad_pages"]} == {keys[at].hex() for at in range(0, 56, 8)}
    assert found["pages"] == 73
    assert found["stranded_pages"] == 7 * 7, "what was below them"
    assert len(found["problems"]) == 7


def test_repair_takes_them_out_and_the_rest_stays(folder: Path) -> None:
    made = pages_of(10, 8)
    change(folder, {made[3].key: b"nobody's" * 40})
    before = tree_state(folder)
    assert hicache("check", folder).returncode == 1
    assert tree_state(folder) == before, "nothing changes unasked"
    done = hicache("check", folder, "--repair")
    assert done.returncode == 1
    assert "repaired: shards/0: 1 bad pages taken out" in done.stdout
    assert [file.read_bytes() for file in (folder / "quarantine").iterdir()] == [b"nobody's" * 40]
    assert hicache("check", folder).returncode == 0
    shop = Shop(folder)
    read = shop.get(made)
    shop.store.close()
    assert read[3] is Outcome.MISS
    assert [page for at, page in enumerate(read) if at != 3] == [
        each.content for at, each in enumerate(made) if at != 3
    ]


def test_a_folder_that_is_in_use_is_refused_with_the_holder(folder: Path) -> None:
    with (folder / "hicache.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711\n")
        lock.flush()
        done = hicache("check", folder)
    assert done.returncode == 2
    assert "in use by process 4711" in done.stderr
    assert "stop that sidecar first" in done.stderr


def test_what_cannot_be_looked_at_is_two(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong, words in ((tmp_path / "absent", "not a folder"), (empty, "not a disk folder")):
        done = hicache("check", wrong)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    (folder / "FORMAT").write_text('{"format": "hicache-disk", "version": 99}')
    done = hicache("check", folder)
    assert done.returncode == 2
    assert "format version 99" in done.stderr
    done = hicache("check", folder, "--disk-bytes", "10G")
    assert done.returncode == 2
    assert "--disk-bytes" in done.stderr


def test_more_than_the_bound_is_a_problem(folder: Path) -> None:
    done = hicache("check", folder, "--disk-bytes", "100KiB")
    assert done.returncode == 1
    assert "more than its 102400" in done.stdout


def test_it_says_what_the_next_start_would_not_keep(folder: Path) -> None:
    (folder / "STATE").write_text('{"boot": "another", "clean": false, "sync": false}')
    done = hicache("check", folder)
    assert done.returncode == 1
    assert "without sync" in done.stdout


@pytest.mark.parametrize("keep", [0, 100, 4096, 4500, 8192, 20_000, 0.5, 0.99])
def test_a_truncated_file_is_a_problem_not_a_crash(folder: Path, keep: float) -> None:
    """Cut below what LMDB counts; beyond that there may be a hole, of which nothing is missed."""
    with lmdb.open(str(data_of(folder).parent), readonly=True, lock=False) as env:
        counted = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    whole = data_of(folder).read_bytes()[:counted]
    data_of(folder).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    done = hicache("check", folder)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM: shards/0: " in done.stdout


@pytest.mark.parametrize("style", ["random bytes", "flipped bits", "flipped words", "moved pages", "zeroed"])
def test_no_garbage_kills_it(sound: Path, tmp_path: Path, rng: random.Random, style: str) -> None:
    """In one process, as the command does it; what LMDB dies of happens in a child of it."""
    from hicache.tier.inspect import hold_folder, inspect_folder

    whole, folder, killed = data_of(sound).read_bytes(), tmp_path / "disk", 0
    shutil.copytree(sound, folder)
    for _ in range(GARBAGES):
        data_of(folder).write_bytes(garbage(bytearray(whole), style, rng))
        before = tree_state(folder)
        with hold_folder(folder):
            report = inspect_folder(folder, bodies=True)
        assert tree_state(folder) == before
        killed += any("kills" in shard.problem for shard in report.shards)
        assert report.pages + len(report.faults) <= 80 or report.problems()
    print(f"{style}: {killed} of {GARBAGES} would have killed the process")


def garbage(raw: bytearray, style: str, rng: random.Random) -> bytes:
    if style == "random bytes":
        keep = rng.choice((0, 152, 8192))
        return bytes(raw[:keep]) + rng.randbytes(len(raw) - keep)
    if style == "flipped bits":
        for _ in range(rng.choice((1, 30, 3000))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif style == "flipped words":  # page numbers, sizes, offsets
        for _ in range(rng.choice((1, 10, 200))):
            at = rng.randrange(len(raw) // 8) * 8
            raw[at : at + 8] = rng.choice(
                (b"\xff" * 8, rng.randbytes(8), rng.randrange(1 << 20).to_bytes(8, "little"))
            )
    elif style == "moved pages":
        for _ in range(20):
            to, of = (rng.randrange(2, len(raw) // 4096) * 4096 for _ in range(2))
            raw[to : to + 4096] = raw[of : of + 4096]
    else:
        for _ in range(10):
            at = rng.randrange(len(raw) // 4096) * 4096
            raw[at : at + 4096] = bytes(4096)
    return bytes(raw)


def test_a_folder_of_version_1_is_read_as_it_is(tmp_path: Path, sound: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(data_of(sound), old / "data.mdb")
    (old / "FORMAT").write_text('{"format": "hicache-disk", "version": 1}')
    (old / "STATE").write_text('{"boot": "another", "clean": true, "sync": false}')
    before = tree_state(old)
    done = hicache("check", old)
    assert done.returncode == 0, done.stdout
    assert "80 sound" in done.stdout
    assert tree_state(old) == before


def test_pages_that_take_more_than_they_are_charged(folder: Path) -> None:
    from hicache.tier.rows import pack_row

    made = pages_of(10, 8)
    change(folder, {each.key: pack_row(1000, each.record) for each in made[:5]}, b"meta")
    done = hicache("check", folder)
    assert done.returncode == 1
    assert "PROBLEM: 5 pages that take more than they are charged" in done.stdout


def test_a_deleted_parent_leaves_stranded_pages_which_are_no_problem(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "disk", 3, 5)
    shop = Shop(tmp_path / "disk")
    shop.do(Op.DELETE, [made[1]], [])
    shop.store.close()
    done = hicache("check", tmp_path / "disk")
    assert done.returncode == 0
    assert "11 reachable, 3 stranded" in done.stdout
