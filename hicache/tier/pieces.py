"""Records in LMDB: whole, or in pieces when no room in the file is long enough.

LMDB wants the pages of a value next to each other. After small pages were evicted at random a file can be
half empty and still have no place for a large one; without a way out the store would refuse large pages for
good. Whole values are twice as fast, so pieces are only the way out: the writer asks for them after
MDB_MAP_FULL.

A record in pieces has a stub (magic, disk pages a piece, length) in ``pages`` and rows ``key + u32 BE`` in
``pieces``. Damage to any of it yields a record that does not decode.
"""

from __future__ import annotations

import struct
from typing import cast

import lmdb
import numpy as np

from hicache.keys import MAX_PAGE_BYTES
from hicache.tier.lmdb_env import Database, WriteTxn
from hicache.tier.rows import DISK_PAGE_BYTES

#: Disk pages a piece, in the order to try: the last one fits into any hole.
PIECE_PAGES = (8, 1)
#: What a piece costs in the tree, half-full leaves included.
_PIECE_ROW_BYTES = 128
_PAGE_HEADER_BYTES = 16
_STUB = struct.Struct("<4sIQ")
_MAGIC = b"HKVS"
_INDEX = struct.Struct(">I")
_MAX_BYTES = MAX_PAGE_BYTES * 2
_NOTHING = memoryview(b"")


def put_record(txn: WriteTxn, db: Database, key: bytes, record: memoryview) -> None:
    """Store a record whole, in place of whatever the key had."""
    _drop_pieces(txn, db, key)
    txn.put(key, record, db=db.pages)


def put_pieces(txn: WriteTxn, db: Database, key: bytes, record: memoryview, *, pages: int) -> None:
    """Store a record in pieces of so many disk pages, in place of whatever the key had."""
    _drop_pieces(txn, db, key)
    txn.put(key, _STUB.pack(_MAGIC, pages, record.nbytes), db=db.pages)
    step = _piece_bytes(pages)
    for index, start in enumerate(range(0, record.nbytes, step)):
        txn.put(key + _INDEX.pack(index), record[start : start + step], db=db.pieces)


def pieces_charge_bytes(record_bytes: int, pages: int) -> int:
    """What a record in pieces takes beyond a whole one."""
    return (record_bytes // _piece_bytes(pages) + 1) * (_PIECE_ROW_BYTES + _PAGE_HEADER_BYTES)


def _piece_bytes(pages: int) -> int:
    return pages * DISK_PAGE_BYTES - _PAGE_HEADER_BYTES


def get_record(txn: lmdb.Transaction | WriteTxn, db: Database, key: bytes) -> memoryview | None:
    """The record: a view that ends with the transaction, or a copy put together; None when there is none."""
    found = txn.get(key, db=db.pages)
    if found is None:
        return None
    record = memoryview(found)
    if record.nbytes != _STUB.size:
        return record
    magic, pages, size = _STUB.unpack(record)
    if magic != _MAGIC or size > _MAX_BYTES or pages not in PIECE_PAGES:
        return _NOTHING
    step = _piece_bytes(pages)
    if txn.stat(db.pieces)["entries"] < -(-size // step):
        return _NOTHING  # before anything is allocated for it
    whole = np.empty(size, dtype=np.uint8)
    for index, start in enumerate(range(0, size, step)):
        piece = txn.get(key + _INDEX.pack(index), db=db.pieces)
        room = whole[start : start + step]
        if piece is None or len(piece) != len(room):
            return _NOTHING
        np.copyto(room, np.frombuffer(piece, dtype=np.uint8))
    return memoryview(cast(bytes, whole))


def delete_record(txn: WriteTxn, db: Database, key: bytes) -> bool:
    """Remove a record; says whether there was one."""
    _drop_pieces(txn, db, key)
    return txn.delete(key, db=db.pages)


def _drop_pieces(txn: WriteTxn, db: Database, key: bytes) -> None:
    if not txn.stat(db.pieces)["entries"]:
        return
    with txn.cursor(db=db.pieces) as cursor:
        found = cursor.set_range(key)
        while found and bytes(cursor.key()[: len(key)]) == key:
            found = cursor.delete() and bool(cursor.key())
