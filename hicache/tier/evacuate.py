"""Moves the live pages of one shard into others, so that its file can be given back.

In small steps: records are copied as they are, committed in their new place, and only then removed from the
old one. A crash in between leaves two equal copies; the next recovery removes one. Whatever happens, every
page is somewhere, so ancestors are never missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from hicache.tier.attempts import FULL, Attempts
from hicache.tier.examine import Header, read_header
from hicache.tier.ops import WriterStats
from hicache.tier.pieces import PIECE_PAGES, get_record, put_pieces, put_record
from hicache.tier.remove import Remover
from hicache.tier.rows import DISK_PAGE_BYTES, upgraded
from hicache.tier.shelf import Shard, Shelf

_log = logging.getLogger(__name__)

_STEP_BYTES = 8 << 20
_STEP_PART = 16  # of a shard: small enough to find room in another one
_STEP_PAGES = 1024
_ROW_BYTES = 4096  # a record's share of the trees, at most

#: Room for so many bytes of a size class in another shard, or None; may make one.
Choose = Callable[[Shard, int, int], Shard | None]


class Evacuation:
    """One shard on its way out. ``step`` until ``done`` or ``stuck``."""

    def __init__(
        self,
        shelf: Shelf,
        source: Shard,
        choose: Choose,
        *,
        attempts: Attempts,
        remover: Remover,
        stats: WriterStats,
    ) -> None:
        self.source = source
        self.done = False
        self.stuck = ""  # why it cannot go on
        self.moved_bytes = 0
        self._shelf = shelf
        self._choose = choose
        self._attempts = attempts
        self._remover = remover
        self._stats = stats
        source.leaving = True

    def abandon(self) -> None:
        """The shard stays, with what is left in it."""
        self.source.leaving = False

    def step(self) -> None:
        """Move some pages; at the end give the shard back."""
        keys, size, size_class = self._next()
        if not keys:
            self._end()
            return
        found: list[Shard | None] = []
        error = self._attempts.run(lambda: found.append(self._choose(self.source, size, size_class)))
        target = found[0] if found else None
        if target is None:
            self.stuck = error or "no room elsewhere"
            return
        if not self._copy(keys, target):
            return
        self._shelf.moves += 1  # before the pages vanish from here
        failed = self._remover.delete({key: (self.source,) for key in keys})
        self.stuck = next(iter(failed.values()), "")
        self.moved_bytes += size
        self._stats.evacuated_pages += len(keys)
        self._stats.evacuated_bytes += size

    def _next(self) -> tuple[list[bytes], int, int]:
        """Keys of the next pages, the bytes they take, and their size class: of a mixed shard, one class a step."""
        keys: list[bytes] = []
        size, seen = 0, 0
        source = self.source
        size_class, mixed = source.info.size_class_bytes, not source.info.size_class_bytes
        limit = min(_STEP_BYTES, source.info.map_bytes // _STEP_PART)
        with source.db.env.begin(buffers=True) as txn:
            for key, value in txn.cursor(db=source.db.pages):
                record = value if len(value) > DISK_PAGE_BYTES else get_record(txn, source.db, bytes(key))
                seen += 1
                if mixed and self._shelf.geometry.several:
                    own = _class_of(record)
                    size_class = size_class if keys else own
                    if own != size_class:
                        continue
                more = (len(record) if record is not None else 0) + _ROW_BYTES
                if keys and (size + more > limit or seen >= _STEP_PAGES):
                    break
                keys.append(bytes(key))
                size += more
        return keys, size, size_class

    def _copy(self, keys: Sequence[bytes], target: Shard) -> bool:
        """Whether the pages are in the target; otherwise try again or be stuck."""
        error = self._attempts.run(lambda: self._write(keys, target, 0))
        if error == FULL:
            target.note_full()
            error = self._attempts.run(target.recycle) or self._attempts.run(
                lambda: self._write(keys, target, PIECE_PAGES[-1])
            )
        if error == FULL:
            target.limit_bytes = min(target.limit_bytes, target.used_bytes)  # its figures promise too much
        elif error:
            self.stuck = error
        return not error

    def _write(self, keys: Sequence[bytes], target: Shard, piece_pages: int) -> None:
        source = self.source
        with source.db.env.begin(buffers=True) as old, target.write() as new:
            added = source.namespaces - target.namespaces
            for fingerprint in added:
                json = bytes(old.get(fingerprint, b"", db=source.db.namespaces))
                new.put(fingerprint, json, db=target.db.namespaces)
            for key in keys:
                record = get_record(old, source.db, key)
                if record is None:
                    continue
                if piece_pages:
                    put_pieces(new, target.db, key, record, pages=piece_pages)
                else:
                    put_record(new, target.db, key, record)
                row = old.get(key, db=source.db.meta)
                if row is not None:
                    new.put(key, upgraded(bytes(row)), db=target.db.meta)
        target.namespaces |= added

    def _end(self) -> None:
        """The shard is empty: see that its namespaces live on, give it back."""
        others = [s for s in self._shelf.shards if s is not self.source]
        known: set[bytes] = set().union(*(s.namespaces for s in others))
        if self.source.namespaces - known:
            target = max((s for s in others if not s.leaving), key=lambda s: s.room_bytes, default=None)
            if target is None:
                self.stuck = "it is the only shard"
                return
            self.stuck = self._attempts.run(lambda: self._write((), target, 0))
            if self.stuck:
                return
        self.stuck = self._attempts.run(lambda: self._shelf.retire(self.source))
        self._stats.evacuations += 1
        self.done = True


def _class_of(record: memoryview | None) -> int:
    """Raw bytes of a record's page; 0 where it does not say."""
    head = read_header(record) if record is not None else None
    return head.raw_bytes if isinstance(head, Header) else 0
