"""One LMDB environment of the disk tier: four databases that are written together.

    pages        page key -> record (``codec``), or the stub of one in pieces
    pieces       page key + u32 -> a piece of a record (``pieces``)
    meta         page key -> the page's row (``rows``)
    namespaces   fingerprint -> the namespace's fields as JSON; also one housekeeping key, shorter than a
    fingerprint

Every step that a medium can make fail goes through ``Medium``. Never carry an environment across a fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from hicache.tier.rows import DISK_PAGE_BYTES

DATA, LOCK = "data.mdb", "lock.mdb"
TICK_KEY = b"tick"
_NAMES = (b"pages", b"pieces", b"meta", b"namespaces")

# Errors that mean "these are not usable data", as against "the medium failed just now".
UNUSABLE = (
    lmdb.InvalidError,
    lmdb.CorruptedError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
    lmdb.NotFoundError,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Database:
    """An open environment and its databases."""

    env: lmdb.Environment
    pages: Any  # lmdb's database handles have no public type
    pieces: Any
    meta: Any
    namespaces: Any

    def used_bytes(self, txn: lmdb.Transaction | WriteTxn) -> int:
        """Bytes of the file that hold live data, as the transaction sees it."""
        total = 0
        for db in (self.pages, self.pieces, self.meta, self.namespaces):
            stat = txn.stat(db)
            total += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return total * DISK_PAGE_BYTES


#: Disk pages that a put or delete may add beside its value: what it copies of the trees, its place in the free list.
_STEP_PAGES = 12
#: And a commit by itself.
_COMMIT_PAGES = 64


def _lengthen(database: Database, path: Path, new_pages: int) -> None:
    """See that the file is as long as its count of pages will be, before the commit that makes it so.

    LMDB never writes pages that a transaction takes and gives back, so that its file may end before the last page that
    it counts. A file that was cut off looks the same, and reading beyond its end kills the process. The hole that this
    leaves takes no room on the disk.
    """
    info = database.env.info()
    wanted = min((info["last_pgno"] + 1 + new_pages) * DISK_PAGE_BYTES, info["map_size"])
    data = path / DATA
    if data.stat().st_size < wanted:
        os.truncate(data, wanted)


class WriteTxn:
    """A write transaction whose steps pass the medium's check first.

    ``new_pages``: at least as many disk pages as it may have added to the file.
    """

    __slots__ = ("_before", "_path", "_txn", "new_pages")

    def __init__(self, medium: Medium, path: Path, txn: lmdb.Transaction) -> None:
        self._before = medium.before
        self._path = path
        self._txn = txn
        self.new_pages = _COMMIT_PAGES

    def put(self, key: bytes, value: bytes | memoryview, *, db: Any) -> None:
        """Store a value in place of whatever the key had."""
        self._before("put", self._path)
        self.new_pages += len(value) // DISK_PAGE_BYTES + _STEP_PAGES
        self._txn.put(key, value, db=db)

    def delete(self, key: bytes, *, db: Any) -> bool:
        """Remove a key; says whether it was there."""
        self._before("delete", self._path)
        self.new_pages += _STEP_PAGES
        return bool(self._txn.delete(key, db=db))

    def get(self, key: bytes, *, db: Any) -> memoryview | None:
        """The value, as a view that ends with the next change."""
        found = self._txn.get(key, db=db)
        return None if found is None else memoryview(found)

    def cursor(self, *, db: Any) -> lmdb.Cursor:
        """A cursor."""
        return self._txn.cursor(db=db)

    def stat(self, db: Any) -> Any:
        """A database's counts, by name."""
        return self._txn.stat(db)


class Medium:
    """The steps that a disk can make fail. Tests pass a subclass whose ``before`` raises by plan."""

    def before(self, step: str, path: Path) -> None:
        """Called before "open", "begin", "put", "delete", "commit", "sync" and "file" (a small file of our own)."""

    @contextlib.contextmanager
    def write(self, database: Database, path: Path) -> Iterator[WriteTxn]:
        """A write transaction: committed at the end, aborted by an exception."""
        self.before("begin", path)
        txn = database.env.begin(write=True, buffers=True)
        with contextlib.ExitStack() as unfinished:
            unfinished.callback(txn.abort)
            writing = WriteTxn(self, path, txn)
            yield writing
            self.before("commit", path)
            _lengthen(database, path, writing.new_pages)
            unfinished.pop_all()
        txn.commit()

    def sync(self, database: Database, path: Path) -> None:
        """Everything committed is on the medium."""
        self.before("sync", path)
        database.env.sync(True)  # noqa: FBT003 - lmdb's signature


def open_database(
    path: Path, *, map_bytes: int, sync: bool = True, readers: int = 8, readonly: bool = False
) -> Database:
    """Open the environment of a folder. Raises lmdb.Error; ``UNUSABLE`` ones for what is not sound data.

    Read-only it takes no lock and changes nothing: nobody else may have it open for writing.
    """
    data = path / DATA
    had_bytes = data.stat().st_size if data.exists() else 0
    env = lmdb.open(
        str(path),
        map_size=map_bytes,
        max_dbs=len(_NAMES),
        max_readers=readers + 8,
        sync=sync,
        metasync=sync,
        readahead=True,  # without it cold reads are 16 times slower
        meminit=False,
        mode=0o600,
        readonly=readonly,
        lock=not readonly,
        create=not readonly,
    )
    try:
        # A file shorter than its own count of pages would kill us with SIGBUS at the first read.
        needed = (env.info()["last_pgno"] + 1) * DISK_PAGE_BYTES
        if had_bytes and (had_bytes < needed or env.stat()["psize"] != DISK_PAGE_BYTES):
            raise lmdb.InvalidError(f"{had_bytes} bytes where {needed} are needed")
        database = Database(env, *(env.open_db(name, create=not readonly) for name in _NAMES))
        _probe(database)
        return database
    except lmdb.Error:
        env.close()
        raise


def _probe(database: Database) -> None:
    """Read what every later start relies on. Raises CorruptedError: rot in the trees is not the medium's bad day."""
    try:
        with database.env.begin() as txn:
            database.used_bytes(txn)
            for _ in txn.cursor(db=database.namespaces):
                pass
    except lmdb.Error as exc:
        raise lmdb.CorruptedError(f"its trees cannot be read: {exc}") from exc
