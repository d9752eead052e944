"""Removes pages and rewrites their heat, shard by shard, children before parents. For the writer's thread only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hicache.tier.attempts import FULL, Attempts
from hicache.tier.ops import WriterStats, delete_order
from hicache.tier.pieces import delete_record
from hicache.tier.rows import parent_of, with_heat
from hicache.tier.shelf import Look, Shard, Shelf

Homes = dict[bytes, tuple[Shard, ...]]


class Remover:
    """Finds pages, removes them, keeps their heat. Errors of the medium end here."""

    def __init__(self, shelf: Shelf, attempts: Attempts, stats: WriterStats) -> None:
        self._shelf = shelf
        self._attempts = attempts
        self._stats = stats

    def locate(self, keys: Iterable[bytes]) -> Homes:
        """The shards that hold each page."""
        with Look(self._shelf) as look:
            return {key: tuple(look.find(key)) for key in keys}

    def delete(self, homes: Homes) -> dict[bytes, str]:
        """Remove every copy of these pages; what failed, by key."""
        failed: dict[bytes, str] = {}
        for shard, keys in self._in_order(homes):
            kept = [key for key in keys if key not in failed]
            error = self._delete_from(shard, kept)
            if error:
                failed.update(dict.fromkeys(kept, error))
                self._spare_ancestors(failed, homes, error)
        return failed

    def _spare_ancestors(self, failed: dict[bytes, str], homes: Homes, error: str) -> None:
        """What stays keeps its ancestors: do not even try to remove these."""
        parents = self.parents(homes)
        for key in list(failed):
            above = parents.get(key, b"")
            while above in homes and above not in failed:
                failed[above] = error
                above = parents[above]

    def _in_order(self, homes: Homes) -> list[tuple[Shard, list[bytes]]]:
        touched = {shard.info.number: shard for places in homes.values() for shard in places}
        if len(touched) <= 1:
            return [(shard, [key for key, places in homes.items() if places]) for shard in touched.values()]
        return delete_order(homes, self.parents(homes))

    def parents(self, homes: Homes) -> dict[bytes, bytes]:
        """The key of each page's parent; empty where its row does not say."""
        parents = {}
        with Look(self._shelf) as look:
            for key, places in homes.items():
                row = look.txn(places[0]).get(key, db=places[0].db.meta) if places else None
                parents[key] = parent_of(bytes(row)) if row is not None else b""
        return parents

    def _delete_from(self, shard: Shard, keys: Sequence[bytes]) -> str:
        """Remove pages from one shard; what failed."""

        def work() -> None:
            with shard.write() as txn:
                for key in keys:
                    delete_record(txn, shard.db, key)
                    txn.delete(key, db=shard.db.meta)

        error = self._attempts.run(work) if keys else ""
        if error == FULL:  # so full that not even the trees can be copied: wait for what was freed
            self._attempts.run(shard.recycle)
            error = self._attempts.run(work)
        if error == FULL and len(keys) > 1:  # copy less of them at once
            homes: Homes = {key: (shard,) for key in keys}
            [(_, ordered)] = delete_order(homes, self.parents(homes))
            half = len(keys) // 2
            error = self._delete_from(shard, ordered[:half]) or self._delete_from(shard, ordered[half:])
        return error

    def save_heat(self, heat: dict[bytes, tuple[int, int]]) -> None:
        """Rewrite the rows of pages that are stored. A failure loses the heat, nothing else."""
        by_shard: dict[int, list[bytes]] = {}
        shards = {shard.info.number: shard for shard in self._shelf.shards}
        for key, places in self.locate(heat).items():
            for shard in places:
                by_shard.setdefault(shard.info.number, []).append(key)
        for number, keys in by_shard.items():
            self._attempts.run(lambda shard=shards[number], keys=keys: self._heat_into(shard, keys, heat))  # type: ignore[misc]

    def _heat_into(self, shard: Shard, keys: list[bytes], heat: dict[bytes, tuple[int, int]]) -> None:
        with shard.write() as txn:
            for key in keys:
                row = txn.get(key, db=shard.db.meta)
                if row is not None:
                    txn.put(key, with_heat(bytes(row), *heat[key]), db=shard.db.meta)
        self._stats.heat_rows += len(keys)
