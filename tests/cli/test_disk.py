"""``hicache disk``: stats, compact, export and import of a folder that no sidecar has open."""

from __future__ import annotations

import fcntl
import json
import random
from pathlib import Path

import pytest

pytest.importorskip("lmdb", reason="the disk tier needs lmdb")

from disk_folders import PAGE_BYTES, SPACE, Shop, hicache, make_folder, pages_of, tree_state

from hicache.types import Namespace, Op, Outcome

OTHER = Namespace("qwen-test", 4, 3_000)


@pytest.mark.parametrize(
    "words", [("disk", "stats"), ("disk", "compact"), ("disk", "export"), ("disk", "import")]
)
def test_help_teaches(words: tuple[str, ...]) -> None:
    done = hicache(*words, "--help")
    assert done.returncode == 0
    assert "DIR" in done.stdout
    assert len(done.stdout) > 400


def test_stats_counts_by_namespace_and_by_shard(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    shop = Shop(folder, 64 << 20, shard_bytes=4 << 20)
    shop.put(pages_of(10, 8))
    shop.put(pages_of(3, 5, OTHER), OTHER)
    shop.store.close()
    before = tree_state(folder)
    done = hicache("disk", "stats", folder)
    assert done.returncode == 0, done.stdout
    assert "llama-test" in done.stdout
    assert "quarantine: 0 records" in done.stdout
    assert "last used" in done.stdout
    found = json.loads(hicache("disk", "stats", folder, "--json").stdout)
    spaces = {space["model"]: space for space in found["namespaces"]}
    assert (spaces["llama-test"]["pages"], spaces["qwen-test"]["pages"]) == (80, 15)
    assert spaces["llama-test"]["raw_bytes"] == 80 * PAGE_BYTES
    assert spaces["llama-test"]["raw_bytes"] > 1.3 * spaces["llama-test"]["stored_bytes"]
    assert {shard["size_class_bytes"] for shard in found["shards"]} >= {PAGE_BYTES, 3_000}
    assert sum(shard["sound_pages"] for shard in found["shards"]) == found["pages"] == 95
    assert all(shard["charge_bytes"] >= shard["stored_bytes"] for shard in found["shards"])
    assert tree_state(folder) == before


def test_compact_gives_room_back_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    made = make_folder(folder, 40, 10)
    shop = Shop(folder)
    shop.do(Op.DELETE, made[100:], [])
    shop.store.close()
    data = folder / "shards" / "0" / "data.mdb"
    before = data.stat().st_size
    (folder / "shards" / "0.new").mkdir()  # of a try that was killed
    (folder / "shards" / "0.new" / "data.mdb").write_bytes(b"half")
    done = hicache("disk", "compact", folder)
    assert done.returncode == 0, done.stderr + done.stdout
    assert data.stat().st_size < before / 2
    assert not (folder / "shards" / "0.new").exists()
    assert hicache("check", folder).returncode == 0
    shop = Shop(folder)
    assert shop.get(made) == [each.content for each in made[:100]] + [Outcome.MISS] * 300
    shop.put(made[100:])
    shop.store.close()


def test_compact_leaves_a_broken_file_alone(tmp_path: Path) -> None:
    make_folder(tmp_path / "disk")
    data = tmp_path / "disk" / "shards" / "0" / "data.mdb"
    data.write_bytes(data.read_bytes()[:50_000])
    done = hicache("disk", "compact", tmp_path / "disk")
    assert done.returncode == 1
    assert "left as it is: truncated" in done.stdout
    assert data.stat().st_size == 50_000


def test_what_is_exported_can_be_imported_elsewhere_and_again(tmp_path: Path) -> None:
    folder, file, other = tmp_path / "disk", tmp_path / "pages.hkv", tmp_path / "other"
    made = make_folder(folder)
    before = tree_state(folder)
    done = hicache("disk", "export", folder, file)
    assert done.returncode == 0, done.stderr
    assert "exported 80 pages of 1 namespaces" in done.stdout
    assert tree_state(folder) == before
    done = hicache("disk", "import", other, file, "--disk-bytes", "32MiB")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "imported 80 pages; 0 were there already" in done.stdout
    done = hicache("disk", "import", other, file, "--disk-bytes", "32MiB")
    assert "imported 0 pages; 80 were there already" in done.stdout
    assert hicache("check", other, "--disk-bytes", "32MiB").returncode == 0
    shop = Shop(other)
    assert shop.get(made) == [each.content for each in made]
    (chain, *_) = list(shop.store.recover())
    assert chain.last_use_ms == 1000, "when they were used last travels along"
    shop.store.close()


def test_import_stops_at_the_capacity_and_leaves_nobody_without_parents(tmp_path: Path) -> None:
    make_folder(tmp_path / "disk", 120, 10, capacity_bytes=64 << 20)
    assert hicache("disk", "export", tmp_path / "disk", tmp_path / "file").returncode == 0
    done = hicache("disk", "import", tmp_path / "small", tmp_path / "file", "--disk-bytes", "4MiB", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["imported"] > 200
    assert found["full"] > 0
    assert found["imported"] + found["full"] + found["parentless"] == 1200
    checked = json.loads(hicache("check", tmp_path / "small", "--disk-bytes", "4MiB", "--json").stdout)
    assert checked["problems"] == []
    assert checked["pages"] == checked["reachable_pages"] == found["imported"]


def test_one_namespace_by_name_or_fingerprint(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "disk")
    shop.put(pages_of(4, 5))
    shop.put(pages_of(3, 5, OTHER), OTHER)
    shop.store.close()
    for name, pages in (("qwen-test", 15), (SPACE.hex()[:10], 20)):
        done = hicache("disk", "export", tmp_path / "disk", tmp_path / "file", "--namespace", name)
        assert f"exported {pages} pages of 1 namespaces" in done.stdout, done.stderr
    done = hicache("disk", "export", tmp_path / "disk", tmp_path / "none", "--namespace", "gpt")
    assert done.returncode == 2
    assert "--namespace" in done.stderr


def test_bad_pages_are_not_exported(tmp_path: Path) -> None:
    import lmdb

    folder = tmp_path / "disk"
    made = make_folder(folder, 4, 5)
    with lmdb.open(str(folder / "shards" / "0"), max_dbs=4, map_size=32 << 20, lock=False) as env:
        db = env.open_db(b"pages", create=False)
        with env.begin(db=db, write=True) as txn:
            txn.put(made[7].key, bytes(txn.get(made[7].key))[:-1])
    done = hicache("disk", "export", folder, tmp_path / "file")
    assert done.returncode == 1
    assert "exported 19 pages" in done.stdout
    assert "PROBLEM: 1 bad pages" in done.stdout
    done = hicache("disk", "import", tmp_path / "other", tmp_path / "file", "--disk-bytes", "32MiB")
    assert "imported 17 pages" in done.stdout
    assert "2 pages have no parent" in done.stdout, "those below it"


def test_a_damaged_file_is_refused_whole(tmp_path: Path, rng: random.Random) -> None:
    from hicache.errors import InvalidArgumentError
    from hicache.tier.portable import StreamFile

    make_folder(tmp_path / "disk", 4, 5)
    file = tmp_path / "file"
    assert hicache("disk", "export", tmp_path / "disk", file).returncode == 0
    whole = file.read_bytes()
    for _ in range(300):
        broken = bytearray(whole)
        if rng.random() < 0.3:
            del broken[rng.randrange(len(broken)) :]
        else:
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        file.write_bytes(broken)
        if bytes(broken[10:16]) != bytes(6):
            continue  # the head's spare bytes mean nothing
        with pytest.raises(InvalidArgumentError, match="FILE: "):
            StreamFile(file)
    done = hicache("disk", "import", tmp_path / "other", file, "--disk-bytes", "32MiB")
    assert done.returncode == 2
    assert "nothing was imported" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("action", ["stats", "compact", "export", "import"])
def test_a_folder_in_use_is_refused(tmp_path: Path, action: str) -> None:
    make_folder(tmp_path / "disk", 1, 1)
    file = tmp_path / "file"
    assert hicache("disk", "export", tmp_path / "disk", file).returncode == 0
    more = {"export": [file], "import": [file, "--disk-bytes", "32MiB"]}.get(action, [])
    with (tmp_path / "disk" / "hicache.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711\n")
        lock.flush()
        done = hicache("disk", action, tmp_path / "disk", *more)
    assert done.returncode == 2
    assert "in use by process 4711" in done.stderr


def test_export_to_standard_output_and_wrong_usage(tmp_path: Path) -> None:
    import subprocess
    import sys

    make_folder(tmp_path / "disk", 2, 3)
    done = subprocess.run(
        [sys.executable, "-m", "hicache", "disk", "export", str(tmp_path / "disk"), "-"],
        capture_output=True,
        check=True,
    )
    assert done.stdout.startswith(b"HKVXPORT")
    assert b"exported 6 pages" in done.stderr
    done = hicache("disk", "import", tmp_path / "disk", tmp_path / "absent", "--disk-bytes", "32MiB")
    assert (done.returncode, "FILE: cannot read" in done.stderr) == (2, True)
    done = hicache("disk", "import", tmp_path / "disk", tmp_path / "absent", "--disk-bytes", "some")
    assert (done.returncode, "--disk-bytes: 'some'" in done.stderr) == (2, True)
    done = hicache("disk", "export", tmp_path / "disk", tmp_path / "no" / "where")
    assert (done.returncode, "FILE: cannot write" in done.stderr) == (2, True)


def test_an_export_of_a_namespace_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path / "disk", 2, 3)
    done = hicache("disk", "export", tmp_path / "disk", tmp_path / "file", "--namespace", "nobody")
    assert done.returncode == 2
    assert "none named 'nobody'" in done.stderr
    assert not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
