"""Shards: the LMDB environments that together are the disk tier's data.

    shards/<n>/SHARD      {"map_bytes", "size_class_bytes"}: written before the folder gets its name
    shards/<n>/data.mdb, lock.mdb   LMDB's
    shards/<n>.new, <n>.old         one being made or removed when the process died: removed at the next start

A shard's map never grows, and LMDB never writes past its map: the sum of the maps bounds the disk. A shard
belongs to one size class (raw bytes of a page; 0: pages of any size) until it is removed. Files do not
shrink: room goes back to the system when a whole shard does.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from hicache.tier.lmdb_env import DATA, LOCK, Database, open_database
from hicache.tier.rows import DISK_PAGE_BYTES
from hicache.tier.smallfile import fsync_folder, read_json, write_json

SHARDS = "shards"
SHARD = "SHARD"
_NEW, _OLD = ".new", ".old"
#: The file of version 1 may be full to its last page: room to change anything in it.
_ADOPTED_SLACK_BYTES = 256 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard as it lies on disk."""

    path: Path
    size_class_bytes: int  # raw bytes of its pages; 0: any
    map_bytes: int

    @property
    def number(self) -> int:
        """Its number; later shards have larger ones. -1 for the one file of a folder of version 1."""
        return int(self.path.name) if self.path.parent.name == SHARDS else -1


def list_shards(path: Path) -> list[ShardInfo]:
    """The shards of a folder, oldest first; the data of a folder of version 1 count as one. Changes nothing."""
    found = []
    if (path / DATA).exists():
        found.append(ShardInfo(path, 0, _whole_pages((path / DATA).stat().st_size)))
    folders = (path / SHARDS).iterdir() if (path / SHARDS).is_dir() else ()
    for folder in sorted((f for f in folders if f.name.isdigit()), key=lambda f: int(f.name)):
        info = read_shard(folder)
        if info is not None:
            found.append(info)
    return found


def read_shard(folder: Path) -> ShardInfo | None:
    """What its SHARD file says; None when it says nothing sensible."""
    said = read_json(folder / SHARD)
    map_bytes, size_class = said.get("map_bytes"), said.get("size_class_bytes")
    if not isinstance(map_bytes, int) or not isinstance(size_class, int) or map_bytes <= 0 or size_class < 0:
        return None
    return ShardInfo(folder, size_class, map_bytes)


def open_shard(path: Path, *, map_bytes: int, readonly: bool = True) -> Database:
    """Open one shard's environment. Raises lmdb.Error. Close ``Database.env`` afterwards.

    Read-only, it must not be in use: no lock is taken.
    """
    return open_database(path, map_bytes=map_bytes, readonly=readonly)


def create_shard(home: Path, number: int, *, size_class_bytes: int, map_bytes: int) -> ShardInfo:
    """Make the folder of a new shard, durably. Raises OSError."""
    (home / SHARDS).mkdir(mode=0o700, exist_ok=True)
    new, folder = home / SHARDS / f"{number}{_NEW}", home / SHARDS / str(number)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o700)
    try:
        write_json(new / SHARD, {"map_bytes": map_bytes, "size_class_bytes": size_class_bytes})
        new.rename(folder)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
    return ShardInfo(folder, size_class_bytes, map_bytes)


def remove_shard(folder: Path) -> None:
    """Remove a shard that is not open. Raises OSError."""
    old = folder.with_name(folder.name + _OLD)
    if folder.exists():
        folder.rename(old)
    if old.exists():
        shutil.rmtree(old)


def adopt_version_1(home: Path) -> None:
    """Make a shard of the one data file of a folder of version 1; picks up where an interrupted try ended."""
    data = home / DATA
    if not data.exists():
        return
    folder = home / SHARDS / "0"
    if not (folder / SHARD).exists():
        map_bytes = _whole_pages(data.stat().st_size + _ADOPTED_SLACK_BYTES)
        create_shard(home, 0, size_class_bytes=0, map_bytes=map_bytes)
    data.rename(folder / DATA)
    (home / LOCK).unlink(missing_ok=True)
    fsync_folder(folder)
    fsync_folder(home)


def clear_leftovers(home: Path) -> None:
    """Remove what a process left that died while it made or removed a shard. Raises OSError."""
    for folder in (home / SHARDS).glob("*") if (home / SHARDS).is_dir() else ():
        if folder.suffix in (_NEW, _OLD) or (folder.name.isdigit() and read_shard(folder) is None):
            shutil.rmtree(folder)


def _whole_pages(size: int) -> int:
    """A map must not be smaller than what the file holds."""
    return max(-(-size // DISK_PAGE_BYTES), 16) * DISK_PAGE_BYTES
