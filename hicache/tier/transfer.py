"""Pages out of and into a closed disk folder, as a portable stream. Offline: hold the folder meanwhile."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from hicache.errors import InvalidArgumentError
from hicache.keys import chain_keys
from hicache.tier.codec import decode
from hicache.tier.disk import DiskStore
from hicache.tier.examine import judge_record, judge_row, precheck, read_namespaces
from hicache.tier.inspect import Progress, shard_name
from hicache.tier.isolation import Crashed, isolated
from hicache.tier.pieces import get_record
from hicache.tier.portable import Entry, PortablePage, StreamFile, StreamWriter
from hicache.tier.rows import Row, pack_namespace, unpack_namespace, unpack_row
from hicache.tier.shards import ShardInfo, list_shards, open_shard
from hicache.types import Batch, Completion, Namespace, Op, Outcome, PageRecord

T = TypeVar("T")

_BATCH_BYTES = 8 << 20
_KEYS_PER_TURN = 256


# -- out


@dataclasses.dataclass(slots=True)
class Exported:
    """What an export wrote and what it left out."""

    namespaces: int = 0
    pages: int = 0
    file_bytes: int = 0
    bad_pages: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class _Turn:
    """What a child read at a time: ``rows`` looked at ``of`` all, the good ones among them."""

    rows: int
    of: int
    bad: int
    pages: list[PortablePage]


def export_pages(
    path: Path, out: BinaryIO, *, wanted: Callable[[bytes, Namespace], bool], progress: Progress
) -> Exported:
    """Write every sound page of the wanted namespaces; bad ones are counted and left out. Raises OSError."""
    stream, found = StreamWriter(out), Exported()
    shards = []
    for shard in list_shards(path):
        problem = precheck(shard.path)
        if problem:
            found.problems.append(f"{shard_name(path, shard)}: {problem}")
        else:
            shards.append(shard)
    known: dict[bytes, Namespace] = {}
    for shard in shards:
        for some in _told(lambda shard=shard: _namespaces(shard), shard_name(path, shard), found):  # type: ignore[misc]
            known |= some
    chosen = {space: namespace for space, namespace in known.items() if wanted(space, namespace)}
    for fingerprint, namespace in chosen.items():
        stream.namespace(fingerprint, pack_namespace(namespace))
    for shard in shards:
        rows, name = 0, shard_name(path, shard)
        for turn in _told(lambda shard=shard: _pages(shard, known, chosen), name, found):  # type: ignore[misc]
            rows += turn.rows
            found.bad_pages += turn.bad
            for page in turn.pages:
                stream.page(page)
            progress(name, rows, turn.of)
    stream.end()
    found.namespaces, found.pages = stream.namespaces, stream.pages
    found.file_bytes = stream.written_bytes
    return found


def _told(work: Callable[[], Iterator[T]], name: str, found: Exported) -> Iterator[T]:
    """What a child reads; its death is a problem of the export, not its end."""
    try:
        yield from isolated(work)
    except Crashed as exc:
        found.problems.append(f"{name}: {exc}")


def _namespaces(shard: ShardInfo) -> Iterator[dict[bytes, Namespace]]:
    database = open_shard(shard.path, map_bytes=shard.map_bytes)
    try:
        yield read_namespaces(database)
    finally:
        database.env.close()


def _pages(
    shard: ShardInfo, known: dict[bytes, Namespace], chosen: dict[bytes, Namespace]
) -> Iterator[_Turn]:
    database = open_shard(shard.path, map_bytes=shard.map_bytes)
    try:
        with database.env.begin(buffers=True) as txn, txn.cursor(db=database.meta) as cursor:
            of, rows, bad, last = txn.stat(database.meta)["entries"], 0, 0, b""
            pages: list[PortablePage] = []
            for raw_key, value in cursor:
                key, row = bytes(raw_key), unpack_row(bytes(value))
                if key <= last:
                    raise ValueError("its tree goes in circles")
                last, rows = key, rows + 1
                if judge_row(key, row, known) is not None:
                    bad += 1
                elif row is not None and row.record is not None and row.record.namespace in chosen:
                    record = get_record(txn, database, key) or memoryview(b"")
                    if judge_record(record, key, chosen[row.record.namespace].page_bytes)[0] is None:
                        pages.append(_portable(key, row, row.record, record))
                    else:
                        bad += 1
                if rows >= _KEYS_PER_TURN or sum(len(page.record) for page in pages) >= _BATCH_BYTES:
                    yield _Turn(rows, of, bad, pages)
                    rows, bad, pages = 0, 0, []
            yield _Turn(rows, of, bad, pages)
    finally:
        database.env.close()


def _portable(key: bytes, row: Row, place: PageRecord, record: memoryview) -> PortablePage:
    return PortablePage(
        key,
        place.namespace,
        place.parent_key,
        place.symbol,
        row.last_use_ms,
        row.hits,
        bytes(record),
    )


# -- in


_Good = tuple[PortablePage, bytearray, int]  # with its raw bytes and their checksum


@dataclasses.dataclass(slots=True)
class Imported:
    """What became of a stream's pages. ``full``: the capacity was reached; ``parentless``: their parent is nowhere."""

    imported: int = 0
    present: int = 0
    bad: int = 0
    full: int = 0
    parentless: int = 0
    reasons: Counter[str] = dataclasses.field(default_factory=Counter)


class Importer:
    """Stores a stream's pages in a folder, parents first, until its capacity is reached. ``close`` it in the end."""

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        """Raises ConfigError, UnavailableError as ``DiskStore`` does."""
        self._woken = threading.Event()
        self._store = DiskStore(path, capacity_bytes, self._woken.set)
        self.wiped = self._store.wiped
        self._there: set[bytes] = set()
        self._left_bytes = self._store.usable_bytes
        self._batches = 0
        for chain in self._store.recover():
            self._there.update(chain.keys)
            self._left_bytes -= sum(chain.charges)

    def close(self) -> None:
        """Commit, sync, release the folder. Idempotent."""
        self._store.close()

    def run(self, stream: StreamFile, *, progress: Progress) -> Imported:
        """Store what the folder does not have. Raises InvalidArgumentError for a stream that lies about a namespace."""
        found, namespaces = Imported(), self._open(stream)
        batch: list[PortablePage] = []
        size, done = 0, 0
        for depth_first in _in_order(stream.entries, namespaces, self._there, found):
            done += 1
            progress("import", done, len(stream.entries))
            if depth_first.key in self._there:
                found.present += 1
                continue
            page = stream.page(depth_first)
            namespace = namespaces[page.namespace]
            # A batch holds one size of pages, and never a page and its refused parent.
            if batch and (
                size >= _BATCH_BYTES or namespaces[batch[0].namespace].page_bytes != namespace.page_bytes
            ):
                self._put(batch, namespaces, found)
                batch, size = [], 0
            batch.append(page)
            size += namespace.page_bytes
        self._put(batch, namespaces, found)
        return found

    def _open(self, stream: StreamFile) -> dict[bytes, Namespace]:
        namespaces = {}
        for fingerprint, fields in stream.namespaces.items():
            namespace = unpack_namespace(fingerprint, fields)
            if namespace is None:
                raise InvalidArgumentError(
                    f"FILE: namespace {fingerprint.hex()[:16]} is not one that this version understands"
                )
            namespaces[fingerprint] = namespace
            self._store.put_namespace(fingerprint, namespace)
        return namespaces

    def _put(self, pages: list[PortablePage], namespaces: dict[bytes, Namespace], found: Imported) -> None:
        """Verify and store a batch; parents come before their children in it."""
        good: list[_Good] = []
        for page in pages:
            if not self._has_parent(page):
                found.parentless += 1
                continue
            checked = _verified(page, namespaces[page.namespace])
            if isinstance(checked, str):
                found.bad += 1
                found.reasons[checked] += 1
            elif self._left_bytes < len(page.record):
                found.full += 1
            else:
                self._left_bytes -= len(page.record)
                good.append((page, *checked))
                self._there.add(page.key)
        if good:
            self._store_batch(good, namespaces, found)

    def _store_batch(self, good: list[_Good], namespaces: dict[bytes, Namespace], found: Imported) -> None:
        completion = self._submit(
            Op.PUT,
            namespaces[good[0][0].namespace].page_bytes,
            keys=[page.key for page, _, _ in good],
            buffers=[memoryview(raw) for _, raw, _ in good],
            checksums=[checksum for _, _, checksum in good],
            records=[PageRecord(page.namespace, page.parent_key, page.symbol) for page, _, _ in good],
        )
        for at, (page, _, _) in enumerate(good):
            if completion.outcomes[at] is Outcome.OK:
                self._left_bytes -= completion.charges[at] - len(page.record)
                continue
            self._there.discard(page.key)
            if completion.outcomes[at] is Outcome.FULL:
                self._left_bytes = 0  # nothing smaller is squeezed in: it would only fragment the file
                found.full += 1
            else:
                found.bad += 1
                found.reasons[completion.error] += 1
        lost = [page for page, _, _ in good if page.key in self._there and not self._has_parent(page)]
        while lost:  # stored beside a parent that was refused
            self._submit(Op.DELETE, keys=[page.key for page in lost])
            self._there.difference_update(page.key for page in lost)
            found.parentless += len(lost)
            lost = [page for page, _, _ in good if page.key in self._there and not self._has_parent(page)]
        kept = [page for page, _, _ in good if page.key in self._there]
        found.imported += len(kept)
        self._store.put_heat(
            [page.key for page in kept], [page.last_use_ms for page in kept], [page.hits for page in kept]
        )

    def _has_parent(self, page: PortablePage) -> bool:
        return page.parent_key == page.namespace or page.parent_key in self._there

    def _submit(self, op: Op, page_bytes: int = 0, **columns: Sequence[object]) -> Completion:
        """Give the store a batch, and wait for it."""
        self._batches += 1
        self._store.submit(Batch(self._batches, op, page_bytes, **columns))  # type: ignore[arg-type]
        while True:
            self._woken.clear()
            for completion in self._store.poll():
                return completion
            self._woken.wait()


def _verified(page: PortablePage, namespace: Namespace) -> tuple[bytearray, int] | str:
    """The raw page and its checksum, or what is wrong with it."""
    width = namespace.symbol_bytes
    if len(page.symbol) != width or chain_keys(page.parent_key, page.symbol, width) != [page.key]:
        return "it is not the page of its key"
    raw = bytearray(namespace.page_bytes)
    decoded = decode(memoryview(page.record), page.key, memoryview(raw))
    return (raw, decoded.checksum) if decoded.outcome is Outcome.OK else decoded.reason


def _in_order(
    entries: list[Entry], namespaces: dict[bytes, Namespace], there: set[bytes], found: Imported
) -> Iterator[Entry]:
    """Pages whose ancestors are in the stream or in the folder, parents first; the others are counted."""
    children: dict[bytes, list[Entry]] = {}
    for entry in entries:
        if entry.namespace in namespaces:
            children.setdefault(entry.parent_key, []).append(entry)
        else:
            found.bad += 1
            found.reasons["its namespace is not in the file"] += 1
    keys = {entry.key for entry in entries}
    roots = [
        parent for parent in children if parent in namespaces or (parent in there and parent not in keys)
    ]
    while roots:
        for entry in children.pop(roots.pop(), ()):
            yield entry
            roots.append(entry.key)
    found.parentless += sum(map(len, children.values()))
