"""Take out of a closed folder what a check found bad: what the store does when it meets such a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hicache.tier.examine import Bad
from hicache.tier.folder import DATA
from hicache.tier.inspect import FolderReport, ShardReport, shard_name
from hicache.tier.isolation import Crashed, isolated
from hicache.tier.pieces import delete_record
from hicache.tier.shards import ShardInfo, list_shards, open_shard

_KEYS_PER_COMMIT = 256


def repair(path: Path, report: FolderReport) -> list[str]:
    """Remove the bad pages of a report, and environments that cannot be read. Returns what was done, in sentences.

    Hold the folder. Raises OSError.
    """
    done = []
    for shard in list_shards(path):
        found = next((each for each in report.shards if each.name == shard_name(path, shard)), None)
        if found is not None:
            done += _repair_shard(shard, found)
    return done


def _repair_shard(shard: ShardInfo, found: ShardReport) -> list[str]:
    if found.problem:
        return [_remove(shard, found, found.problem)]
    if not found.bad:
        return []
    try:
        gone = sum(isolated(lambda: _purge(shard, found.bad)))
    except Crashed as exc:
        return [_remove(shard, found, str(exc))]
    return [f"{found.name}: {gone} bad pages taken out"]


def _purge(shard: ShardInfo, bad: list[Bad]) -> Iterator[int]:
    database = open_shard(shard.path, map_bytes=shard.map_bytes, readonly=False)
    try:
        for start in range(0, len(bad), _KEYS_PER_COMMIT):
            keys = [each.key for each in bad[start : start + _KEYS_PER_COMMIT]]
            with database.env.begin(write=True) as txn:
                for key in keys:
                    delete_record(txn, database, key)
                    txn.delete(key, db=database.meta)
            yield len(keys)
        database.env.sync(True)  # noqa: FBT003 - lmdb's signature
    finally:
        database.env.close()


def _remove(shard: ShardInfo, found: ShardReport, why: str) -> str:
    for name in (DATA, "lock.mdb"):
        (shard.path / name).unlink(missing_ok=True)
    return f"{found.name}: removed, since it cannot be read ({why})"
