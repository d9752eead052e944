"""The file format of recordings: what was looked up and stored, as salted ids, in blocks that stand by themselves.

A file is MAGIC, then blocks. A block is ``HEAD`` (marker, kind, packed and raw length, CRC-32 of the packed
bytes) and its zlib-packed payload. The first block is ``INFO``, a JSON object; all others are ``ENTRIES``, a
table in columns. No block needs another one to be read, so a file that was cut anywhere loses its last block at
most.

An entry that begins like an earlier one of its block (ids are prefix-chained) stores only what it adds.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
import sys
import zlib
from array import array
from collections.abc import Iterator
from typing import IO

MAGIC = b"HCRECORD1\r\n\x1a"
HEAD = struct.Struct("<4sBxxxIII")
_SAID = struct.Struct("<II")
MARKER = b"HCb1"
#: A block with more is refused as damaged: no writer makes one.
RAW_BYTES_MAX = 1 << 28
BLOCK_ENTRIES = 2048
BLOCK_IDS = 1 << 18
_COUNTS = struct.Struct("<III")
#: Type codes of the columns, in the order of the file; ``array`` type codes of fixed width.
_COLUMNS = "qBHHHIqqIIII"


class Damaged(ValueError):
    """A block that cannot be read: cut short, or its checksum says no."""


class BlockKind(enum.IntEnum):
    """What a block holds."""

    INFO = 1
    ENTRIES = 2


class EntryKind(enum.IntEnum):
    """What an entry tells of."""

    LOOKUP = 0  # a prompt was looked up
    STORE = 1  # a prompt was stored; ``of`` says by which look-up's request


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One thing that was seen.

    ``ids``: one a page, prefix-chained. ``of``: how many entries ago in this file the look-up came that a
    STORE belongs to; 0: there was none. ``space``: a label of the namespace; ``page_tokens``: its grain.
    """

    kind: EntryKind
    at_ms: int
    space: str
    page_tokens: int
    ids: array[int]
    input_tokens: int = 0
    output_tokens: int = 0
    session: str = ""
    cls: str = ""
    turn: int = 0
    of: int = 0


class BlockBuilder:
    """Gathers entries of one block."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._entries: list[array[int]] = []
        self._owner: dict[int, int] = {}  # id -> the first entry that has it
        self._strings: dict[str, int] = {}
        self._columns = tuple(array(code) for code in _COLUMNS)
        self._new_ids: array[int] = array("q")
        self._held_ids = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether it should be taken before more is added."""
        return len(self._entries) >= BLOCK_ENTRIES or self._held_ids >= BLOCK_IDS

    def add(self, entry: Entry) -> None:
        """Take an entry in."""
        number = len(self._entries)
        owner, depth = self._shared(entry.ids)
        for new in entry.ids[depth:]:
            self._owner.setdefault(new, number)
        self._new_ids.extend(entry.ids[depth:])
        self._entries.append(entry.ids)
        self._held_ids += len(entry.ids)
        row = (
            entry.at_ms,
            entry.kind,
            self._string(f"{entry.page_tokens}:{entry.space}"),
            self._string(entry.session),
            self._string(entry.cls),
            entry.turn,
            entry.input_tokens,
            entry.output_tokens,
            entry.of,
            owner,
            depth,
            len(entry.ids),
        )
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)

    def _shared(self, ids: array[int]) -> tuple[int, int]:
        """An earlier entry and how many of its ids this one begins with. Chained ids: found by bisection."""
        low, high = 0, len(ids)
        owned = self._owner
        while low < high:
            middle = (low + high + 1) // 2
            if ids[middle - 1] in owned:
                low = middle
            else:
                high = middle - 1
        if not low:
            return 0, 0
        owner = owned[ids[low - 1]]
        # ids that are not chained may be known and still stand elsewhere
        return (owner, low) if self._entries[owner][:low] == ids[:low] else (0, 0)

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def take(self) -> bytes:
        """The block, ready to be written; the builder is empty then."""
        strings = json.dumps(list(self._strings)).encode()
        raw = b"".join(
            [
                _COUNTS.pack(len(self._entries), len(strings), len(self._new_ids)),
                strings,
                *(_little(column) for column in self._columns),
                _little(self._new_ids),
            ]
        )
        self._clear()
        return packed(BlockKind.ENTRIES, raw)


def _little(column: array[int]) -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()


def packed(kind: BlockKind, raw: bytes) -> bytes:
    """A block of these bytes."""
    body = zlib.compress(raw, 1)
    return HEAD.pack(MARKER, kind, len(body), len(raw), _sum(kind, len(raw), body)) + body


def _sum(kind: int, raw_bytes: int, body: bytes) -> int:
    """The checksum of a block: of its body, and of what its head says of it."""
    return zlib.crc32(body, zlib.crc32(_SAID.pack(kind, raw_bytes)))


def opening(info: dict[str, object]) -> bytes:
    """The first bytes of a file: MAGIC, and what is told of the whole file."""
    return MAGIC + packed(BlockKind.INFO, json.dumps(info).encode())


def read_magic(stream: IO[bytes]) -> None:
    """Raises Damaged where the stream is no recording."""
    if stream.read(len(MAGIC)) != MAGIC:
        raise Damaged("not a recording")


def read_block(stream: IO[bytes]) -> tuple[int, bytes] | None:
    """The next block's kind and bytes; None at the end. Raises Damaged."""
    head = stream.read(HEAD.size)
    if not head:
        return None
    if len(head) < HEAD.size:
        raise Damaged("the file ends within a block's head")
    marker, kind, body_bytes, raw_bytes, crc = HEAD.unpack(head)
    if marker != MARKER or max(body_bytes, raw_bytes) > RAW_BYTES_MAX:
        raise Damaged("no block begins where one should")
    body = stream.read(body_bytes)
    if len(body) < body_bytes:
        raise Damaged("the file ends within a block")
    if _sum(kind, raw_bytes, body) != crc:
        raise Damaged("a block's checksum is wrong")
    raw = zlib.decompressobj().decompress(body, raw_bytes or 1)
    if len(raw) != raw_bytes:
        raise Damaged("a block's length is wrong")
    return kind, raw


def entries(raw: bytes) -> Iterator[Entry]:
    """The entries of an ENTRIES block. Raises Damaged."""
    try:
        yield from _entries(raw)
    except (ValueError, IndexError, struct.error, AttributeError) as error:
        raise Damaged(f"a block's table is wrong: {error}") from error


def _entries(raw: bytes) -> Iterator[Entry]:
    count, strings_bytes, new_count = _COUNTS.unpack_from(raw)
    at = _COUNTS.size
    strings: list[str] = json.loads(raw[at : at + strings_bytes])
    at += strings_bytes
    columns: list[array[int]] = []
    for code in (*_COLUMNS, "q"):
        column: array[int] = array(code)
        size = column.itemsize * (new_count if len(columns) == len(_COLUMNS) else count)
        column.frombytes(raw[at : at + size])
        if sys.byteorder == "big":
            column.byteswap()
        columns.append(column)
        at += size
    fresh = columns.pop()
    seen: list[array[int]] = []
    used = 0
    for row in zip(*columns, strict=True):
        at_ms, kind, space, session, cls, turn, asked, answered, of, owner, depth, length = row
        ids = seen[owner][:depth] if depth else array("q")
        ids += fresh[used : used + length - depth]
        used += length - depth
        if len(ids) != length:
            raise ValueError("ids are missing")
        seen.append(ids)
        page_tokens, _, label = strings[space].partition(":")
        yield Entry(
            EntryKind(kind),
            at_ms,
            label,
            int(page_tokens),
            ids,
            asked,
            answered,
            session=strings[session],
            cls=strings[cls],
            turn=turn,
            of=of,
        )
