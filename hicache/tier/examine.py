"""What one LMDB environment of a disk folder holds, read without trusting a byte of it.

``precheck`` looks at the file alone, ``scan`` reads every row. A file that is garbage may kill ``scan``: run it through
``isolation``. Nothing here changes anything.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
from xxhash import xxh3_64_intdigest

from hicache.keys import KEY_BYTES, MAX_PAGE_BYTES, chain_keys
from hicache.tier.codec import HEADER_BYTES, Kind, decode
from hicache.tier.lmdb_env import DATA, Database
from hicache.tier.pieces import get_record
from hicache.tier.rows import DISK_PAGE_BYTES, Row, charge_bytes, row_bytes, unpack_namespace, unpack_row
from hicache.tier.shards import ShardInfo, open_shard
from hicache.tier.smallfile import du_bytes
from hicache.types import Namespace, Outcome

#: Rows between two reports, and in one read transaction.
ROWS_PER_PART = 512
#: Rows of version 1 were shorter, and their charges with them.
_CHARGE_SLACK_BYTES = 64


class Fault(enum.Enum):
    """What can be wrong with a stored page. The first five are its record, the others its rows."""

    TRUNCATED = "truncated"  # shorter than it says
    FOREIGN = "foreign"  # not a record of ours
    OLD_VERSION = "old-version"  # a record of another version
    SWAPPED = "swapped"  # a sound record of another page
    CORRUPT = "corrupt"  # a checksum says no
    NO_ROW = "no-row"  # a record without a meta row
    BAD_ROW = "bad-row"  # a meta row that is none, or is not its key's
    NO_RECORD = "no-record"  # a meta row without a record
    NO_NAMESPACE = "no-namespace"  # a page of a namespace that is not stored


@dataclasses.dataclass(frozen=True, slots=True)
class Bad:
    """A page that must go, by what is wrong with it."""

    key: bytes
    fault: Fault
    detail: str = ""


@dataclasses.dataclass(slots=True)
class NamespaceCount:
    """Pages of one namespace."""

    pages: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0

    def add(self, other: NamespaceCount) -> None:
        """Take in another shard's."""
        self.pages += other.pages
        self.raw_bytes += other.raw_bytes
        self.stored_bytes += other.stored_bytes


@dataclasses.dataclass(slots=True)
class Part:
    """What a stretch of rows held. ``links``: key, parent's key, namespace's fingerprint, 96 bytes a sound page."""

    rows: int = 0
    sound: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    charge_bytes: int = 0
    undercharged: int = 0
    in_pieces: int = 0
    bad: list[Bad] = dataclasses.field(default_factory=list)
    by_namespace: dict[bytes, NamespaceCount] = dataclasses.field(default_factory=dict)
    uses: array[int] = dataclasses.field(
        default_factory=lambda: array("q")
    )  # last use in unix ms, stored bytes, ...
    links: bytearray = dataclasses.field(default_factory=bytearray)


@dataclasses.dataclass(frozen=True, slots=True)
class ShardHead:
    """Of a whole environment: told before its rows."""

    entries: int
    meta_entries: int
    used_bytes: int
    file_bytes: int
    namespaces: dict[bytes, Namespace]


# -- the file alone

_META = struct.Struct("<IIQQI")  # magic, version, address, map size, page size
_META_AT, _TAIL_AT = 16, 136
_TAIL = struct.Struct("<QQ")  # last page, transaction
_LMDB_MAGIC = 0xBEEFC0DE


def precheck(folder: Path) -> str:
    """Why LMDB must not be let near the file; empty when it may. Raises OSError."""
    path = folder / DATA
    size = path.stat().st_size
    if size < 2 * DISK_PAGE_BYTES:
        return f"{size} bytes are no LMDB file"
    with path.open("rb") as file:
        heads = [file.read(DISK_PAGE_BYTES) for _ in range(2)]
    newest, last_page = -1, 0
    for head in heads:
        magic, _, _, _, page_bytes = _META.unpack_from(head, _META_AT)
        if magic != _LMDB_MAGIC:
            return "its first pages are not LMDB's"
        if page_bytes != DISK_PAGE_BYTES:
            return f"its pages have {page_bytes} bytes, not {DISK_PAGE_BYTES}"
        last, transaction = _TAIL.unpack_from(head, _TAIL_AT)
        if transaction > newest:
            newest, last_page = transaction, last
    needed = (last_page + 1) * DISK_PAGE_BYTES
    return f"truncated: {size} bytes where {needed} are needed" if size < needed else ""


# -- one record, one row

_RECORD_MAGIC = b"HKVP"
_RECORD = struct.Struct(f"<4sHBBQQQQ{KEY_BYTES}sQ")  # the header that ``codec`` writes, its seal included


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What a record says of itself."""

    key: bytes
    raw_bytes: int
    stored_bytes: int


def read_header(record: memoryview) -> Header | Fault:
    """A record's header, or what is wrong with it."""
    if record.nbytes < HEADER_BYTES:
        return Fault.TRUNCATED
    head = bytes(record[:HEADER_BYTES])
    magic, _version, _codec, _form, raw_bytes, stored_bytes, _raw, _stored, key, seal = _RECORD.unpack(head)
    if magic != _RECORD_MAGIC:
        return Fault.FOREIGN
    if seal != xxh3_64_intdigest(head[:-8]):
        return Fault.CORRUPT
    return Header(key, raw_bytes, stored_bytes)


def judge_record(record: memoryview, key: bytes, page_bytes: int = 0) -> tuple[Bad | None, Header | None]:
    """What is wrong with a record, and its header where that is sound. ``page_bytes``: as its namespace says."""
    found = read_header(record)
    if isinstance(found, Fault):
        return Bad(key, found, "header"), None
    if found.key != key:
        return Bad(key, Fault.SWAPPED, f"the record of {found.key.hex()[:16]}"), found
    if found.stored_bytes != record.nbytes - HEADER_BYTES:
        return Bad(key, Fault.TRUNCATED, "stored size"), found
    if (page_bytes and found.raw_bytes != page_bytes) or found.raw_bytes > MAX_PAGE_BYTES:
        return Bad(key, Fault.CORRUPT, f"a page of {found.raw_bytes} bytes"), found
    decoded = decode(record, key, memoryview(bytearray(found.raw_bytes)))
    if decoded.outcome is not Outcome.OK:
        fault = Fault.OLD_VERSION if decoded.kind is Kind.VERSION else Fault.CORRUPT
        return Bad(key, fault, decoded.reason), found
    return None, found


def judge_row(key: bytes, row: Row | None, namespaces: dict[bytes, Namespace]) -> Bad | None:
    """What is wrong with a meta row."""
    if row is None:
        return Bad(key, Fault.BAD_ROW, "no row")
    record = row.record
    if record is None:
        return None
    namespace = namespaces.get(record.namespace)
    if namespace is None:
        return Bad(key, Fault.NO_NAMESPACE, record.namespace.hex()[:16])
    width = len(record.symbol)
    if width != namespace.symbol_bytes or chain_keys(record.parent_key, record.symbol, width) != [key]:
        return Bad(key, Fault.BAD_ROW, "not the row of this key")
    return None


# -- one environment


def scan(shard: ShardInfo, namespaces: dict[bytes, Namespace], *, bodies: bool) -> Iterator[ShardHead | Part]:
    """Everything in an environment: its head, then its rows part by part. Raises lmdb.Error, ValueError.

    Args:
        shard: passed ``precheck``.
        namespaces: known from elsewhere in the folder; the shard's own are added.
        bodies: decode and verify every page; otherwise look at headers and rows only.
    """
    database = open_shard(shard.path, map_bytes=shard.map_bytes)
    try:
        head = _head(database, shard, namespaces)
        yield head
        scanner = _Scanner(database, head.namespaces, bodies=bodies)
        yield from scanner.pages(head.entries)
        yield from scanner.rows(head.meta_entries)
    finally:
        database.env.close()


def read_namespaces(database: Database) -> dict[bytes, Namespace]:
    """The stored namespaces that this version understands."""
    found = {}
    with database.env.begin(db=database.namespaces) as txn:
        for key, value in txn.cursor():
            namespace = unpack_namespace(key, value) if len(key) == KEY_BYTES else None
            if namespace is not None:
                found[key] = namespace
    return found


def _head(database: Database, shard: ShardInfo, namespaces: dict[bytes, Namespace]) -> ShardHead:
    known = namespaces | read_namespaces(database)
    with database.env.begin() as txn:
        return ShardHead(
            entries=txn.stat(database.pages)["entries"],
            meta_entries=txn.stat(database.meta)["entries"],
            used_bytes=database.used_bytes(txn),
            file_bytes=du_bytes(shard.path / DATA),
            namespaces=known,
        )


_Look = Callable[[lmdb.Transaction, Part, bytes, memoryview], None]


class _Scanner:
    """Walks the two tables; a rotten tree must not make it go in circles, so keys have to ascend."""

    def __init__(self, database: Database, namespaces: dict[bytes, Namespace], *, bodies: bool) -> None:
        self._db = database
        self._namespaces = namespaces
        self._bodies = bodies

    def pages(self, entries: int) -> Iterator[Part]:
        """Every record, with its row."""
        yield from self._walk(self._db.pages, entries, self._page)

    def rows(self, entries: int) -> Iterator[Part]:
        """Rows without a record."""
        yield from self._walk(self._db.meta, entries, self._row)

    def _walk(self, table: Any, entries: int, look: _Look) -> Iterator[Part]:
        last, seen = b"", 0
        with self._db.env.begin(buffers=True) as txn, txn.cursor(db=table) as cursor:
            part = Part()
            for raw_key, value in cursor:
                key = bytes(raw_key)
                seen += 1
                if (last and key <= last) or seen > entries:
                    raise ValueError("its tree goes in circles")
                last = key
                look(txn, part, key, memoryview(value))
                if part.rows >= ROWS_PER_PART:
                    yield part
                    part = Part()
            yield part
        if seen != entries:
            raise ValueError(f"its tree has {seen} rows where it claims {entries}")

    def _row(self, txn: lmdb.Transaction, part: Part, key: bytes, _value: memoryview) -> None:
        if txn.get(key, db=self._db.pages) is None:
            part.bad.append(Bad(key, Fault.NO_RECORD))
        part.rows += 1

    def _page(self, txn: lmdb.Transaction, part: Part, key: bytes, value: memoryview) -> None:
        part.rows += 1
        if len(key) != KEY_BYTES:
            part.bad.append(Bad(key, Fault.FOREIGN, f"a key of {len(key)} bytes"))
            return
        raw_row = txn.get(key, db=self._db.meta)
        row = None if raw_row is None else unpack_row(bytes(raw_row))
        bad = Bad(key, Fault.NO_ROW) if raw_row is None else judge_row(key, row, self._namespaces)
        record = get_record(txn, self._db, key) or memoryview(b"")
        namespace = self._namespaces.get(row.record.namespace) if row is not None and row.record else None
        header = None
        if bad is None:
            bad, header = self._judge(record, key, namespace.page_bytes if namespace else 0)
        if bad is not None:
            part.bad.append(bad)
            return
        assert row is not None and header is not None, "a sound page has both"
        self._count(part, row, record.nbytes, header.raw_bytes)
        if record.nbytes != value.nbytes:
            part.in_pieces += 1
        elif row.charge + _CHARGE_SLACK_BYTES < charge_bytes(record.nbytes, row_bytes(row.record)):
            part.undercharged += 1
        if row.record is not None:
            part.links += key + row.record.parent_key + row.record.namespace

    def _judge(self, record: memoryview, key: bytes, page_bytes: int) -> tuple[Bad | None, Header | None]:
        if self._bodies:
            return judge_record(record, key, page_bytes)
        header = read_header(record)
        if isinstance(header, Fault):
            return Bad(key, header, "header"), None
        return None, header

    @staticmethod
    def _count(part: Part, row: Row, stored_bytes: int, raw_bytes: int) -> None:
        part.sound += 1
        part.raw_bytes += raw_bytes
        part.stored_bytes += stored_bytes
        part.charge_bytes += row.charge
        part.uses.extend((row.last_use_ms, stored_bytes))
        space = row.record.namespace if row.record is not None else b""
        count = part.by_namespace.setdefault(space, NamespaceCount())
        count.add(NamespaceCount(1, raw_bytes, stored_bytes))
