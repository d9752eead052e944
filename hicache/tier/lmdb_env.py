"""The LMDB environment of the disk tier: four databases that are written together.

    pages        page key -> record (``codec``), or the stub of one in pieces
    pieces       page key + u32 -> a piece of a record (``pieces``)
    meta         page key -> charge u64 [, namespace 32s, parent key 32s, symbol]
    namespaces   fingerprint -> the namespace's fields as JSON; also one housekeeping key, shorter than a
    fingerprint

Never carry an environment across a fork.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import json
import logging
import struct
from typing import Any

import lmdb

from hicache.errors import UnavailableError
from hicache.keys import KEY_BYTES, fingerprint
from hicache.tier.folder import Folder
from hicache.types import Namespace, PageRecord, SymbolKind

_log = logging.getLogger(__name__)

DISK_PAGE_BYTES = 4096
TICK_KEY = b"tick"
_CHARGE = struct.Struct("<Q")
_LINKS = struct.Struct(f"<Q{KEY_BYTES}s{KEY_BYTES}s")

# LMDB 0.9 with 4 KiB pages: headers of a page and a node, and the largest node that stays inside a leaf.
_PAGE_HEADER, _NODE_HEADER, _NODE_MAX = 16, 8, 2038
#: Leaves filled and emptied at random are half full at worst, two thirds in the mean.
_LEAF_SLACK = 2.0

# Errors that mean "these are not usable data", as against "the medium failed just now".
_UNUSABLE = (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.IncompatibleError)


@dataclasses.dataclass(frozen=True, slots=True)
class Database:
    """An open environment and its databases."""

    env: lmdb.Environment
    pages: Any  # lmdb's database handles have no public type
    pieces: Any
    meta: Any
    namespaces: Any

    def used_bytes(self, txn: lmdb.Transaction) -> int:
        """Bytes of the file that hold live data, as the transaction sees it."""
        total = 0
        for db in (self.pages, self.pieces, self.meta, self.namespaces):
            stat = txn.stat(db)
            total += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return total * DISK_PAGE_BYTES


def open_database(folder: Folder, *, map_bytes: int, sync: bool, readers: int) -> Database:
    """Open the folder's environment; unusable data are wiped once. Raises UnavailableError."""
    try:
        return _open(folder, map_bytes=map_bytes, sync=sync, readers=readers)
    except _UNUSABLE as exc:
        folder.wipe(f"its data are not usable: {exc}")
    except lmdb.Error as exc:
        raise UnavailableError(f"disk folder {folder.path} does not open: {exc}") from exc
    try:
        return _open(folder, map_bytes=map_bytes, sync=sync, readers=readers)
    except lmdb.Error as exc:
        raise UnavailableError(f"disk folder {folder.path} does not open: {exc}") from exc


def _open(folder: Folder, *, map_bytes: int, sync: bool, readers: int) -> Database:
    had_bytes = folder.data_bytes()
    env = lmdb.open(
        str(folder.path),
        map_size=map_bytes,
        max_dbs=4,
        max_readers=readers + 8,
        sync=sync,
        metasync=sync,
        readahead=True,  # without it cold reads are 16 times slower
        meminit=False,
        mode=0o600,
    )
    try:
        # A file shorter than its own count of pages would kill us with SIGBUS at the first read.
        needed = (env.info()["last_pgno"] + 1) * DISK_PAGE_BYTES
        if had_bytes and (had_bytes < needed or env.stat()["psize"] != DISK_PAGE_BYTES):
            raise lmdb.InvalidError(f"{had_bytes} bytes where {needed} are needed")
        env.reader_check()
        names = (b"pages", b"pieces", b"meta", b"namespaces")
        database = Database(env, *(env.open_db(name) for name in names))
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


# -- rows


def _node_bytes(value_bytes: int) -> tuple[int, int]:
    """What a row takes: (bytes inside a leaf, whole disk pages beside it)."""
    inside = _NODE_HEADER + KEY_BYTES + value_bytes
    if inside <= _NODE_MAX:
        return inside, 0
    return _NODE_HEADER + KEY_BYTES + 8, -(-(value_bytes + _PAGE_HEADER) // DISK_PAGE_BYTES)


def charge_bytes(record_bytes: int, row_bytes: int) -> int:
    """Bytes of capacity a page takes: its record in whole disk pages, and its share of the trees."""
    page_inside, page_pages = _node_bytes(record_bytes)
    meta_inside, meta_pages = _node_bytes(row_bytes)
    return (page_pages + meta_pages) * DISK_PAGE_BYTES + int((page_inside + meta_inside) * _LEAF_SLACK)


def row_bytes(record: PageRecord | None) -> int:
    """Length of a page's meta row."""
    return _CHARGE.size if record is None else _LINKS.size + len(record.symbol)


def pack_row(charge: int, record: PageRecord | None) -> bytes:
    """A page's meta row."""
    if record is None:
        return _CHARGE.pack(charge)
    return _LINKS.pack(charge, record.namespace, record.parent_key) + record.symbol


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A meta row read back; ``record`` is None for a page that was stored without one."""

    charge: int
    record: PageRecord | None
    last_use_ms: int = 0
    hits: int = 0


def unpack_row(row: bytes) -> Row | None:
    """The row, or None for bytes that are none."""
    if len(row) == _CHARGE.size:
        return Row(_CHARGE.unpack(row)[0], None)
    if len(row) <= _LINKS.size:
        return None
    charge, namespace, parent = _LINKS.unpack_from(row)
    return Row(charge, PageRecord(namespace, parent, row[_LINKS.size :]))


def pack_namespace(namespace: Namespace) -> bytes:
    """A namespace as JSON."""
    fields = dataclasses.asdict(namespace)
    plain = {name: value.value if isinstance(value, enum.Enum) else value for name, value in fields.items()}
    return json.dumps(plain, sort_keys=True).encode()


def unpack_namespace(key: bytes, value: bytes) -> Namespace | None:
    """The namespace, when this version understands it and it is the key's."""
    try:
        fields = json.loads(value)
        fields["symbol_kind"] = SymbolKind(fields["symbol_kind"])
        namespace = Namespace(**fields)
    except (ValueError, TypeError, KeyError):
        return None
    return namespace if fingerprint(namespace) == key else None


def read_namespaces(database: Database) -> dict[bytes, Namespace]:
    """The stored namespaces that this version understands, by fingerprint; others are logged."""
    found = {}
    with database.env.begin(db=database.namespaces) as txn:
        for key, value in txn.cursor():
            if len(key) != KEY_BYTES:
                continue
            namespace = unpack_namespace(bytes(key), bytes(value))
            if namespace is not None:
                found[bytes(key)] = namespace
            else:
                _log.warning("disk: namespace %s is not understood; its pages will be dropped", key.hex())
    return found


# -- malloc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES, _MMAP_BYTES = 64 << 20, 32 << 20


def raise_malloc_thresholds() -> None:
    """Keep LMDB's dirty pages on the heap between commits: measured 3.3 times faster puts of 2 MiB values.

    LMDB mallocs every value; with glibc's defaults each is a mmap, page faults and a munmap. Process-wide, so
    the heap keeps up to 64 MiB at its top; ``trim_heap`` gives it back when the writer is idle. No-op without
    glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def trim_heap() -> None:
    """Give free heap memory back to the system. No-op without glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
