"""Give the free room of a closed folder's files back: LMDB's files never shrink by themselves. Hold the folder."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb

from hicache.errors import ExhaustedError
from hicache.tier.examine import precheck
from hicache.tier.inspect import Progress, shard_name
from hicache.tier.isolation import Crashed, isolated
from hicache.tier.lmdb_env import DATA
from hicache.tier.shards import SHARDS, ShardInfo, clear_leftovers, list_shards, open_shard
from hicache.tier.smallfile import du_bytes, fsync_folder

_LOOK_S = 0.1
#: Beside the shard, under a name that a start removes when it finds it.
_SUFFIX = ".new"


@dataclasses.dataclass(frozen=True, slots=True)
class Compacted:
    """What one file takes on the disk, before and after. ``problem``: why it was left as it is."""

    name: str
    before_bytes: int
    after_bytes: int
    problem: str = ""


def compact(path: Path, *, progress: Progress) -> Iterator[Compacted]:
    """Rewrite each environment without its free pages, one after the other.

    A copy stands beside the file until it is whole and synced, then takes its place. Raises ExhaustedError without
    room for the largest copy, OSError.
    """
    clear_leftovers(path)
    for shard in list_shards(path):
        yield _compact(shard, shard_name(path, shard), progress)


def _compact(shard: ShardInfo, name: str, progress: Progress) -> Compacted:
    data, folder = shard.path / DATA, shard.path.with_name(shard.path.name + _SUFFIX)
    before = du_bytes(data)
    old = shard.path.parent.name != SHARDS
    problem = "a folder of version 1: a start of `hicache serve` upgrades it" if old else precheck(shard.path)
    if problem:
        return Compacted(name, before, before, problem)
    try:
        wanted, rows = -1, -1
        folder.mkdir(mode=0o700)
        for told, of in isolated(lambda: _copy(shard, folder)):
            if wanted < 0:
                wanted, rows = told, of
                _refuse_without_room(folder, wanted)
            else:
                progress(name, told, of)
        problem = _judge_copy(folder, shard.map_bytes, rows)
        if not problem:
            _replace(folder / DATA, data)
    except Crashed as exc:
        problem = str(exc)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Compacted(name, before, du_bytes(data), problem)


def _refuse_without_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise ExhaustedError(
            f"DIR: a compact copy needs {wanted} bytes beside the file, the file system has {free} free",
            hint="free some, or let `hicache serve` with a smaller --disk-bytes evict first",
        )


def _copy(shard: ShardInfo, folder: Path) -> Iterator[tuple[int, int]]:
    """Tells (bytes in use, rows), then (bytes written, bytes in use) now and then."""
    database = open_shard(shard.path, map_bytes=shard.map_bytes)
    with database.env.begin() as txn:
        wanted = database.used_bytes(txn)
        yield wanted, txn.stat(database.pages)["entries"]
    failed: list[BaseException] = []

    def work() -> None:
        try:
            database.env.copy(str(folder), compact=True)
        except lmdb.Error as exc:
            failed.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_S)
        copied = folder / DATA
        yield (copied.stat().st_size if copied.exists() else 0), wanted
    if failed:
        raise failed[0]


def _judge_copy(folder: Path, map_bytes: int, rows: int) -> str:
    """Why the copy must not take the file's place; empty when it may."""
    problem = precheck(folder)
    if problem:
        return f"its copy: {problem}"
    database = open_shard(folder, map_bytes=map_bytes)
    try:
        with database.env.begin() as txn:
            found = txn.stat(database.pages)["entries"]
    finally:
        database.env.close()
    return "" if found == rows else f"its copy has {found} pages instead of {rows}"


def _replace(copy: Path, data: Path) -> None:
    """Put the copy in the file's place, durably."""
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    copy.replace(data)
    fsync_folder(data.parent)
