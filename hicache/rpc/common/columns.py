"""Columns with an entry a page, between arrays and messages without an object an entry.

Protobuf's own way, ``extend`` and iteration, makes a Python integer of every entry. A packed fixed64 column is its
entries in memory order, so that it can be put into a message's bytes, and taken out of them, as a whole. Columns of
varints (one entry an extent, of which there are few) gain nothing and go protobuf's own way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
VARINT, FIXED64, BYTES, GROUP, END_GROUP, FIXED32 = range(6)  # wire types


def packed_fixed64(field: int, column: U64) -> bytes:
    """A ``repeated fixed64`` of a message, for its ``MergeFromString``; of an empty column, nothing."""
    if not len(column):
        return b""
    body = column.astype("<u8", copy=False).tobytes()
    return _varint(field << 3 | BYTES) + _varint(len(body)) + body


def fixed64_columns(raw: bytes, *fields: int) -> list[U64]:
    """``repeated fixed64`` fields of a message, in the order asked for. ``raw``: as ``SerializeToString`` made it."""
    found: dict[int, list[U64]] = {field: [] for field in fields}
    at, depth = 0, 0
    while at < len(raw):
        key, at = _read_varint(raw, at)
        kind, column = key & 7, None if depth else found.get(key >> 3)
        size = 0
        if kind == VARINT:
            _, at = _read_varint(raw, at)
        elif kind == BYTES:
            size, at = _read_varint(raw, at)
        elif kind in {FIXED64, FIXED32}:
            size = 8 if kind == FIXED64 else 4
        else:  # a group, which only an unknown field can be
            depth += 1 if kind == GROUP else -1
        if column is not None and kind in {BYTES, FIXED64}:
            column.append(np.frombuffer(raw, "<u8", size // 8, at).astype(np.uint64))
        at += size
    return [_joined(column) for column in found.values()]


def _joined(parts: list[U64]) -> U64:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The value and where the next thing begins."""
    value, shift = 0, 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
