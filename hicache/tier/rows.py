"""The row beside every page, and what a page is charged. Pure functions.

    version 2    charge u48 | 0 u8 | 2 u8 | last use u64 ms | hits u32 [| namespace 32s | parent key 32s | symbol]
    version 1    charge u64 [| namespace 32s | parent key 32s | symbol]                (little-endian)

A charge of version 1 never reaches the byte that says 2. The parent's key and the symbol stand together at the
end because their SHA-256 is the page's key: one hash of one slice checks a row.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct

from hicache.keys import KEY_BYTES, fingerprint
from hicache.types import Namespace, PageRecord, SymbolKind

DISK_PAGE_BYTES = 4096
ROW_VERSION = 2
#: Where a row of version 2 says its version, and where its parts begin.
VERSION_AT = 7
HEAT_AT, NAMESPACE_AT = 8, 20
PARENT_AT = NAMESPACE_AT + KEY_BYTES
SYMBOL_AT = PARENT_AT + KEY_BYTES
CHARGE_MASK = (1 << 48) - 1

_MARK = ROW_VERSION << 56
_HEAD = struct.Struct("<QQI")
_HEAT = struct.Struct("<QI")
_CHARGE_1 = struct.Struct("<Q")
_LINKS_1 = struct.Struct(f"<Q{KEY_BYTES}s{KEY_BYTES}s")
_HITS_MAX = (1 << 32) - 1
_MS_MAX = (1 << 63) - 1

# LMDB 0.9 with 4 KiB pages: headers of a page and a node, and the largest node that stays inside a leaf.
_PAGE_HEADER, _NODE_HEADER, _NODE_MAX = 16, 8, 2038
#: Leaves filled and emptied at random are half full at worst, two thirds in the mean.
_LEAF_SLACK = 2.0


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
    """Length of a page's row."""
    return _HEAD.size if record is None else SYMBOL_AT + len(record.symbol)


def pack_row(charge: int, record: PageRecord | None, *, last_use_ms: int = 0, hits: int = 0) -> bytes:
    """A page's row."""
    assert charge <= CHARGE_MASK, "a charge fits 48 bits"
    head = _HEAD.pack(charge | _MARK, *_heat(last_use_ms, hits))
    return head if record is None else head + record.namespace + record.parent_key + record.symbol


def with_heat(row: bytes, last_use_ms: int, hits: int) -> bytes:
    """The same row (of either version) with another heat; unchanged when it is no row."""
    current = upgraded(row)
    if len(current) < _HEAD.size or current[VERSION_AT] != ROW_VERSION:
        return row
    return current[:HEAT_AT] + _HEAT.pack(*_heat(last_use_ms, hits)) + current[NAMESPACE_AT:]


def _heat(last_use_ms: int, hits: int) -> tuple[int, int]:
    return max(0, min(last_use_ms, _MS_MAX)), max(0, min(hits, _HITS_MAX))


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A row read back; ``record`` is None for a page that was stored without one."""

    charge: int
    record: PageRecord | None
    last_use_ms: int = 0
    hits: int = 0


def unpack_row(row: bytes) -> Row | None:
    """The row of either version, or None for bytes that are none."""
    if len(row) > VERSION_AT and row[VERSION_AT] == ROW_VERSION:
        if len(row) == _HEAD.size or len(row) > SYMBOL_AT:
            charge, last_use_ms, hits = _HEAD.unpack_from(row)
            linked = len(row) > SYMBOL_AT
            record = (
                PageRecord(row[NAMESPACE_AT:PARENT_AT], row[PARENT_AT:SYMBOL_AT], row[SYMBOL_AT:])
                if linked
                else None
            )
            return Row(charge & CHARGE_MASK, record, last_use_ms, hits)
        return None
    if len(row) == _CHARGE_1.size:
        return Row(_CHARGE_1.unpack(row)[0] & CHARGE_MASK, None)
    if len(row) <= _LINKS_1.size:
        return None
    charge, namespace, parent = _LINKS_1.unpack_from(row)
    return Row(charge & CHARGE_MASK, PageRecord(namespace, parent, row[_LINKS_1.size :]))


def parent_of(row: bytes) -> bytes:
    """The parent's key; empty for a page without a record."""
    found = unpack_row(row)
    return found.record.parent_key if found is not None and found.record is not None else b""


def upgraded(row: bytes) -> bytes:
    """The row as version 2; bytes that are no row stay what they are."""
    if len(row) > VERSION_AT and row[VERSION_AT] == ROW_VERSION:
        return row
    found = unpack_row(row)
    return row if found is None else pack_row(found.charge, found.record)


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
