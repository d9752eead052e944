"""Take out of a closed folder what a check found bad: what the store does when it meets such a page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hicache.tier.examine import Bad
from hicache.tier.inspect import FolderReport, ShardReport, shard_name
from hicache.tier.isolation import Crashed, isolated
from hicache.tier.lmdb_env import DATA, LOCK, Medium
from hicache.tier.pieces import delete_record, get_record
from hicache.tier.quarantine import Quarantine
from hicache.tier.shards import ShardInfo, list_shards, open_shard

_KEYS_PER_COMMIT = 256
#: As a store does: a bound of its own, and never more than this part of the data.
_QUARANTINE_BYTES, _QUARANTINE_PART = 64 << 20, 64


def repair(path: Path, report: FolderReport) -> list[str]:
    """Remove the bad pages of a report, and environments that cannot be read. Returns what was done, in sentences.

    Hold the folder. Raises OSError.
    """
    done = []
    maps = sum(shard.map_bytes for shard in list_shards(path))
    bound = min(_QUARANTINE_BYTES, maps // _QUARANTINE_PART)
    for shard in list_shards(path):
        found = next((each for each in report.shards if each.name == shard_name(path, shard)), None)
        if found is not None:
            done += _repair_shard(path, shard, found, bound)
    return done


def _repair_shard(path: Path, shard: ShardInfo, found: ShardReport, bound: int) -> list[str]:
    if found.problem:
        return [_remove(shard, found, found.problem)]
    if not found.bad:
        return []
    try:
        gone = sum(isolated(lambda: _purge(path, shard, found.bad, bound)))
    except Crashed as exc:
        return [_remove(shard, found, str(exc))]
    return [f"{found.name}: {gone} bad pages taken out"]


def _purge(path: Path, shard: ShardInfo, bad: list[Bad], bound: int) -> Iterator[int]:
    database = open_shard(shard.path, map_bytes=shard.map_bytes, readonly=False)
    medium, quarantine = Medium(), Quarantine(path, bound)
    try:
        for start in range(0, len(bad), _KEYS_PER_COMMIT):
            some = bad[start : start + _KEYS_PER_COMMIT]
            with medium.write(database, shard.path) as txn:
                for each in some:
                    record = get_record(txn, database, each.key)
                    if record:
                        quarantine.keep(each.key, each.fault.value, record)
                    del record
                    delete_record(txn, database, each.key)
                    txn.delete(each.key, db=database.meta)
            yield len(some)
        medium.sync(database, shard.path)
    finally:
        database.env.close()


def _remove(shard: ShardInfo, found: ShardReport, why: str) -> str:
    for name in (DATA, LOCK):
        (shard.path / name).unlink(missing_ok=True)
    return f"{found.name}: removed, since it cannot be read ({why})"
