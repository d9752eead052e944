"""The LMDB environments of a disk folder, for tools that look at it from outside."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import lmdb

from hicache.tier.folder import DATA
from hicache.tier.lmdb_env import Database


@dataclasses.dataclass(frozen=True, slots=True)
class ShardInfo:
    """One environment. ``size_class_bytes``: largest page it takes, 0 for any; ``map_bytes``: its file's bound."""

    path: Path
    size_class_bytes: int
    map_bytes: int


def list_shards(path: Path) -> list[ShardInfo]:
    """The folder's environments, in order."""
    data = path / DATA
    return [ShardInfo(path, 0, data.stat().st_size)] if data.exists() else []


def open_shard(path: Path, *, map_bytes: int, readonly: bool = True) -> Database:
    """Open one environment that no store has open. Raises lmdb.Error; check the file's length first."""
    env = lmdb.open(
        str(path),
        map_size=map_bytes,
        max_dbs=4,
        readonly=readonly,
        lock=not readonly,
        create=False,
        meminit=False,
    )
    try:
        names = (b"pages", b"pieces", b"meta", b"namespaces")
        return Database(env, *(env.open_db(name, create=False) for name in names))
    except lmdb.Error:
        env.close()
        raise
