"""The open shards of a store: who reads which, where a key is, which shard takes the next pages.

Only the writer's thread changes the set. Readers take a lease on the shards they look at, so that a shard is
closed after its last reader. A page may for a moment be in two shards, because it is copied before it is
removed; ``moves`` says that a page may have gone from one snapshot and not yet be in another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb

from hicache.errors import UnavailableError
from hicache.keys import KEY_BYTES
from hicache.tier.geometry import COPY_BYTES, FILL_LIMIT, SHARD_FILES_BYTES, Geometry
from hicache.tier.lmdb_env import DATA, LOCK, TICK_KEY, UNUSABLE, Database, Medium, WriteTxn, open_database
from hicache.tier.rows import unpack_namespace
from hicache.tier.shards import ShardInfo, create_shard, list_shards, remove_shard
from hicache.tier.smallfile import fsync_folder
from hicache.types import Namespace

_log = logging.getLogger(__name__)

_TICK_COMMITS = 2
_RESTED_PART = 16


class Shard:
    """One open shard. Figures are as of its last commit."""

    __slots__ = (
        "db",
        "file_bytes",
        "info",
        "leases",
        "leaving",
        "limit_bytes",
        "map_full",
        "medium",
        "namespaces",
        "tick",
        "tired_bytes",
        "used_bytes",
    )

    def __init__(self, info: ShardInfo, db: Database, medium: Medium) -> None:
        self.info = info
        self.db = db
        self.medium = medium
        self.leases = 0
        self.leaving = False  # its pages are being moved away; takes no new ones
        self.map_full = 0  # times room was there by the figures and none was found
        self.tired_bytes = 0  # what it held when that last happened; 0: never
        self.tick = 0
        self.limit_bytes = min(int(info.map_bytes * FILL_LIMIT), info.map_bytes - COPY_BYTES)
        with db.env.begin() as txn:
            self.used_bytes = db.used_bytes(txn)
            self.namespaces = {bytes(key) for key in txn.cursor(db=db.namespaces).iternext(values=False)}
        self.file_bytes = max(info.map_bytes, (info.path / DATA).stat().st_size) + SHARD_FILES_BYTES

    @property
    def room_bytes(self) -> int:
        """Charges it still takes."""
        return 0 if self.leaving else self.limit_bytes - self.used_bytes

    @property
    def tired(self) -> bool:
        """Whether it had no place for a whole record, and little was removed since."""
        return (
            bool(self.tired_bytes)
            and self.used_bytes > self.tired_bytes - self.info.map_bytes // _RESTED_PART
        )

    def note_full(self) -> None:
        """No place was found where the figures said there is room."""
        self.map_full += 1
        self.tired_bytes = self.used_bytes

    @contextlib.contextmanager
    def write(self) -> Iterator[WriteTxn]:
        """A write transaction; the figures follow its commit."""
        with self.medium.write(self.db, self.info.path) as txn:
            yield txn
            used_bytes = self.db.used_bytes(txn)
        self.used_bytes = used_bytes

    def recycle(self) -> None:
        """Pages freed by a commit come back two commits later: make these commits. Raises lmdb.Error."""
        for _ in range(_TICK_COMMITS):
            self.tick ^= 1
            with self.write() as txn:
                txn.put(TICK_KEY, bytes([self.tick]), db=self.db.namespaces)


class Look:
    """One look at the shards: a snapshot of each, taken when it is first needed. For one thread at a time.

    Close it soon: a snapshot keeps freed pages from being used again.
    """

    def __init__(self, shelf: Shelf, size_class_bytes: int = 0) -> None:
        self._shelf = shelf
        self._class = size_class_bytes
        self._txns: dict[int, lmdb.Transaction] = {}
        self._take()

    def _take(self) -> None:
        self._moves = self._shelf.moves  # before any snapshot
        self._leased = self._shelf.lease()
        wanted = self._class
        self.shards = sorted(self._leased, key=lambda s: (s.info.size_class_bytes != wanted, -s.info.number))

    def __enter__(self) -> Look:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the snapshots. Idempotent."""
        for txn in self._txns.values():
            txn.abort()
        self._txns.clear()
        self._shelf.release(self._leased)
        self._leased = ()

    @property
    def outdated(self) -> bool:
        """Whether a page that was not found may have moved meanwhile."""
        return self._moves != self._shelf.moves

    def renew(self) -> None:
        """Look again."""
        self.close()
        self._take()

    def txn(self, shard: Shard) -> lmdb.Transaction:
        """The snapshot of a shard."""
        found = self._txns.get(shard.info.number)
        if found is None:
            found = shard.db.env.begin(buffers=True)
            self._txns[shard.info.number] = found
        return found

    def find(self, key: bytes) -> Iterator[Shard]:
        """The shards that hold a page; most have been looked at when the first one comes."""
        for shard in self.shards:
            if self.txn(shard).get(key, db=shard.db.pages) is not None:
                yield shard


class Shelf:
    """The set of open shards and the bytes they may take."""

    def __init__(self, home: Path, geometry: Geometry, *, sync: bool, readers: int, medium: Medium) -> None:
        """Raises UnavailableError when a shard does not open though its data may be sound."""
        self.home = home
        self.geometry = geometry
        self.moves = 0
        self.lost: list[str] = []  # why shards were dropped at the start
        self._sync = sync
        self._readers = readers
        self._medium = medium
        self._changed = threading.Condition()
        self._leftovers: dict[Path, int] = {}  # bytes of closed shards whose files could not be removed
        self.shards: tuple[Shard, ...] = ()
        with contextlib.ExitStack() as unfinished:
            unfinished.callback(self.close)
            infos = list_shards(home)
            for info in infos:
                self._adopt(info)
            unfinished.pop_all()
        if self.free_bytes < 0 <= self.free_bytes + geometry.quarantine_bytes:
            # One file of version 1 may fill what was to be the quarantine.
            spared = geometry.data_bytes + geometry.quarantine_bytes
            self.geometry = dataclasses.replace(geometry, data_bytes=spared, quarantine_bytes=0)
        self._number = max((info.number for info in infos), default=-1)

    # -- readers

    def lease(self) -> tuple[Shard, ...]:
        """The shards, kept open until they are released."""
        with self._changed:
            for shard in self.shards:
                shard.leases += 1
            return self.shards

    def release(self, shards: tuple[Shard, ...]) -> None:
        """Leased shards may close."""
        with self._changed:
            for shard in shards:
                shard.leases -= 1
            self._changed.notify_all()

    def check_readers(self) -> int:
        """Clear reader slots of threads and processes that are gone; how many there were."""
        return sum(shard.db.env.reader_check() for shard in self.shards)

    # -- figures

    @property
    def file_bytes(self) -> int:
        """The most that the shards' files can come to."""
        with self._changed:
            return sum(shard.file_bytes for shard in self.shards) + sum(self._leftovers.values())

    @property
    def free_bytes(self) -> int:
        """What new shards may take, the reserve included."""
        return self.geometry.data_bytes - self.file_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the files that hold live data."""
        return sum(shard.used_bytes for shard in self.shards)

    def namespaces(self) -> dict[bytes, Namespace]:
        """The stored namespaces that this version understands, by fingerprint; others are logged."""
        found: dict[bytes, Namespace] = {}
        for shard in self.shards:
            with shard.db.env.begin(db=shard.db.namespaces) as txn:
                for key, value in txn.cursor():
                    if len(key) != KEY_BYTES or key in found:
                        continue
                    namespace = unpack_namespace(key, value)
                    if namespace is not None:
                        found[key] = namespace
                    else:
                        _log.warning(
                            "disk: namespace %s is not understood; its pages are left out", key.hex()
                        )
        return found

    # -- changes, by the writer's thread

    def create(self, size_class_bytes: int, map_bytes: int) -> Shard:
        """A new, empty shard. Raises OSError, lmdb.Error."""
        self._number += 1
        number = self._number
        self._medium.before("file", self.home)
        info = create_shard(self.home, number, size_class_bytes=size_class_bytes, map_bytes=map_bytes)
        with contextlib.ExitStack() as unfinished:
            unfinished.callback(self._abandon, info)
            shard = self._open(info)
            unfinished.callback(shard.db.env.close)
            fsync_folder(info.path)  # LMDB syncs its file, not the file's name
            unfinished.pop_all()
        with self._changed:
            self.shards = (*self.shards, shard)
        _log.info("disk: shard %d made for pages of %d bytes", number, size_class_bytes)
        return shard

    def _abandon(self, info: ShardInfo) -> None:
        """Remove a shard that did not come to be; what stays counts, and the next start would adopt it."""
        with self._changed:
            self._leftovers[info.path] = info.map_bytes + SHARD_FILES_BYTES
        with contextlib.suppress(lmdb.Error, OSError):
            self.clear_leftovers()

    def retire(self, shard: Shard) -> None:
        """Close a shard after its last reader, remove its files. Raises OSError when these stay."""
        with self._changed:  # whoever adds the files up sees it once, in one place or the other
            self._leftovers[shard.info.path] = shard.file_bytes
            self.shards = tuple(s for s in self.shards if s is not shard)
            self._changed.wait_for(lambda: not shard.leases)
        shard.db.env.close()
        self.clear_leftovers()
        _log.info("disk: shard %d given back", shard.info.number)

    def clear_leftovers(self) -> None:
        """Remove the files of closed shards. Raises OSError while that fails; they count until then."""
        for path in list(self._leftovers):
            self._medium.before("file", self.home)
            remove_shard(path)
            with self._changed:
                del self._leftovers[path]

    def sync(self) -> None:
        """Everything committed is on the medium. Raises lmdb.Error."""
        for shard in self.shards:
            self._medium.sync(shard.db, shard.info.path)

    def close(self) -> None:
        """Close every environment. Nobody may read any more."""
        shards, self.shards = self.shards, ()
        for shard in shards:
            shard.db.env.close()

    def _open(self, info: ShardInfo) -> Shard:
        self._medium.before("open", info.path)
        # The folder's lock is ours: whatever readers this file knows of are dead.
        (info.path / LOCK).unlink(missing_ok=True)
        db = open_database(info.path, map_bytes=info.map_bytes, sync=self._sync, readers=self._readers)
        return Shard(info, db, self._medium)

    def _adopt(self, info: ShardInfo) -> None:
        """Open a shard that is there; one that holds no usable data is removed."""
        try:
            self.shards = (*self.shards, self._open(info))
            return
        except UNUSABLE as exc:
            reason = f"shard {info.number}: its data are not usable: {exc}"
        except (lmdb.Error, OSError) as exc:
            raise UnavailableError(f"disk folder {info.path} does not open: {exc}") from exc
        _log.warning("disk folder %s: dropped %s", self.home, reason)
        self.lost.append(reason)
        remove_shard(info.path)
