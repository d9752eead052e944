"""A portable stream of namespaces and pages: what ``hicache disk export`` writes and ``import`` reads.

    head       "HKVXPORT" | version u16 | zero u48
    records    kind 1s | length u64 | payload | xxh3-64 of all of that u64             (little-endian)
        N      fingerprint 32s | the namespace's fields as JSON
        P      key 32s | namespace 32s | parent's key 32s | last use u64 (unix ms, 0 unknown) | hits u32
               | length of the symbol u16 | symbol | the page's record, as it is stored (``codec``)
        E      namespaces u64 | pages u64: the end; a stream without it is cut off

A namespace comes before its pages; pages come in any order. Whoever reads checks a page four times: this checksum, its
key against parent and symbol, the record's own checksums, and the page size of its namespace.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_64

from hicache.errors import InvalidArgumentError
from hicache.keys import KEY_BYTES, MAX_PAGE_BYTES

MAGIC = b"HKVXPORT"
VERSION = 1
_HEAD = struct.Struct("<8sH6x")
_FRAME = struct.Struct("<cQ")
_SEAL = struct.Struct("<Q")
_PAGE = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}sQIH")
_END = struct.Struct("<QQ")
_MAX_PAYLOAD_BYTES = 2 * MAX_PAGE_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class PortablePage:
    """A page as it travels."""

    key: bytes
    namespace: bytes
    parent_key: bytes
    symbol: bytes
    last_use_ms: int
    hits: int
    record: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Where a page's frame begins in a file, and who it is."""

    offset: int
    key: bytes
    namespace: bytes
    parent_key: bytes


class StreamWriter:
    """Writes a stream; ``end`` makes it whole."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.namespaces = 0
        self.pages = 0
        self.written_bytes = out.write(_HEAD.pack(MAGIC, VERSION))

    def namespace(self, fingerprint: bytes, fields_json: bytes) -> None:
        """A namespace; before its pages."""
        self.namespaces += 1
        self._frame(b"N", fingerprint + fields_json)

    def page(self, page: PortablePage) -> None:
        """One page."""
        self.pages += 1
        head = _PAGE.pack(
            page.key, page.namespace, page.parent_key, page.last_use_ms, page.hits, len(page.symbol)
        )
        self._frame(b"P", head + page.symbol + page.record)

    def end(self) -> None:
        """Nothing follows."""
        self._frame(b"E", _END.pack(self.namespaces, self.pages))

    def _frame(self, kind: bytes, payload: bytes) -> None:
        head = _FRAME.pack(kind, len(payload))
        seal = xxh3_64(head)
        seal.update(payload)
        for part in (head, payload, _SEAL.pack(seal.intdigest())):
            self.written_bytes += self._out.write(part)


class StreamFile:
    """A stream in a file. Making it reads and verifies the whole: nothing of a damaged stream is ever used."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidArgumentError naming the file and what is wrong, OSError."""
        self._path = path
        self._file = path.open("rb")
        self.namespaces: dict[bytes, bytes] = {}
        self.entries: list[Entry] = []
        try:
            self._index()
        except (InvalidArgumentError, OSError):
            self._file.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def page(self, entry: Entry) -> PortablePage:
        """Read one page. Raises InvalidArgumentError when the file changed meanwhile."""
        self._file.seek(entry.offset)
        kind, payload = self._frame(entry.offset)
        if kind != b"P":
            raise self._wrong("it changed while it was read")
        key, namespace, parent, last_use_ms, hits, width = _PAGE.unpack_from(payload)
        symbol = payload[_PAGE.size : _PAGE.size + width]
        return PortablePage(key, namespace, parent, symbol, last_use_ms, hits, payload[_PAGE.size + width :])

    def _index(self) -> None:
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(MAGIC):
            raise self._wrong("it is no export of hicache's")
        version = _HEAD.unpack(head)[1]
        if version != VERSION:
            raise self._wrong(f"it has format version {version}, this hicache reads {VERSION}")
        for offset, kind, payload in self._frames():
            if kind == b"N":
                self.namespaces[payload[:KEY_BYTES]] = payload[KEY_BYTES:]
            elif kind == b"P" and len(payload) > _PAGE.size:
                key, namespace, parent, *_ = _PAGE.unpack_from(payload)
                self.entries.append(Entry(offset, key, namespace, parent))
            elif kind == b"E" and len(payload) == _END.size:
                if _END.unpack(payload) != (len(self.namespaces), len(self.entries)):
                    raise self._wrong("its end tells of other numbers of pages")
                return
            else:
                raise self._wrong(f"byte {offset}: a record of no known kind")
        raise self._wrong("it is cut off")

    def _frames(self) -> Iterator[tuple[int, bytes, bytes]]:
        offset = _HEAD.size
        while True:
            kind, payload = self._frame(offset)
            yield offset, kind, payload
            offset = self._file.tell()

    def _frame(self, offset: int) -> tuple[bytes, bytes]:
        head = self._file.read(_FRAME.size)
        if len(head) < _FRAME.size:
            raise self._wrong("it is cut off")
        kind, length = _FRAME.unpack(head)
        if length > _MAX_PAYLOAD_BYTES:
            raise self._wrong(f"byte {offset}: a record of {length} bytes")
        payload = self._file.read(length)
        seal = self._file.read(_SEAL.size)
        if len(payload) < length or len(seal) < _SEAL.size:
            raise self._wrong("it is cut off")
        digest = xxh3_64(head)
        digest.update(payload)
        if _SEAL.pack(digest.intdigest()) != seal:
            raise self._wrong(f"byte {offset}: a checksum is not what it should be")
        return kind, payload

    def _wrong(self, what: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"FILE: {self._path}: {what}", hint="nothing was imported from it")
