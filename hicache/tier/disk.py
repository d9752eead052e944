"""The disk tier: pages by key in LMDB, compressed, checksummed, bounded, and back after a restart.

Path of a PUT: ``submit`` -> encoder threads (compress, hash) -> the writer thread (group commit of page and
meta row) -> completion. Of a GET: reader threads decode from LMDB's map into the destination. A completed PUT
survives ``kill -9``; with ``sync=True`` a power cut, too. Without it, a machine that went down uncleanly
finds the store empty (``wiped`` says so): see ``folder``.

The bound. ``capacity_bytes`` is what ``du`` shows for the folder: the map is smaller by the other files and a
margin, and LMDB never writes past its map. ``usable_bytes`` is less again, because values of mixed sizes need
free room to find a place: at 0.85 churn of mixed sizes had no refusal, at 0.90 many. Not safe across fork.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import lmdb

from hicache.errors import ConfigError, InvalidArgumentError, UnavailableError, ViolationError
from hicache.keys import KEY_BYTES, fingerprint
from hicache.tier.codec import PageCodec
from hicache.tier.codec_names import LOSSLESS, PAGE_CODECS
from hicache.tier.encoder import Encoder, PagePut
from hicache.tier.folder import Folder
from hicache.tier.lmdb_env import (
    DISK_PAGE_BYTES,
    open_database,
    pack_namespace,
    raise_malloc_thresholds,
    read_namespaces,
)
from hicache.tier.outbox import Outbox, Pending
from hicache.tier.reader import Readers
from hicache.tier.recovery import RecoveredChain, Recovery
from hicache.tier.writer import DeleteKeys, Flush, SaveNamespace, Writer, WriterStats
from hicache.types import Batch, Completion, Namespace, Notify, Op

__all__ = ["MIN_CAPACITY_BYTES", "USABLE_PART", "DiskStore", "RecoveredChain", "Recovery"]

_log = logging.getLogger(__name__)

MIN_CAPACITY_BYTES = 4 << 20
#: Part of the map that charges may fill; the rest is head-room for fragmentation and copy-on-write.
USABLE_PART = 0.85
#: Lock files, FORMAT, STATE and its replacement, the folder itself; file-system metadata by the size.
_OTHER_FILES_BYTES = 128 << 10
_METADATA_PART = 1024


class DiskStore:
    """Keyed page store on a local disk. See the module's text for what it promises."""

    def __init__(
        self,
        path: Path | str,
        capacity_bytes: int,
        notify: Notify,
        *,
        sync: bool = False,
        readers: int = 2,
        compress_workers: int = 2,
        page_codec: str = LOSSLESS,
        group_bytes: int = 32 << 20,
        backlog_bytes: int = 256 << 20,
        tune_malloc: bool = True,
    ) -> None:
        """Open the folder and start the threads.

        Args:
        path: a folder of its own, on a local disk.
        capacity_bytes: bound on what ``du`` shows for the folder; at least ``MIN_CAPACITY_BYTES``.
        notify: called from worker threads when ``poll`` has something.
        sync: fsync every commit.
        page_codec: "lossless" compresses where it pays, "lossless-fast" a little less and faster, "raw" never;
        for lossless namespaces: one that names another codec gets that.
        group_bytes: raw bytes of pages in one transaction; less for small capacities.
        backlog_bytes: raw bytes of pages encoded and not yet committed.
        tune_malloc: raise glibc's thresholds, process-wide (``lmdb_env.raise_malloc_thresholds``).

        Raises ConfigError for a folder that cannot be used, UnavailableError when LMDB does not open it.
        """
        if capacity_bytes < MIN_CAPACITY_BYTES:
            raise ConfigError(f"disk capacity of {capacity_bytes} bytes is below {MIN_CAPACITY_BYTES}")
        if page_codec not in PAGE_CODECS:
            raise ConfigError(f"disk page_codec {page_codec!r} is not one of {', '.join(PAGE_CODECS)}")
        spare = _OTHER_FILES_BYTES + capacity_bytes // _METADATA_PART
        self._map_bytes = (capacity_bytes - spare) // DISK_PAGE_BYTES * DISK_PAGE_BYTES
        self._page_codec = page_codec
        self._codecs: dict[bytes, PageCodec] = {}  # by namespace; b"": pages of which nothing is known
        self._pid = os.getpid()
        self._closed = False
        self.last_error = ""
        if tune_malloc:
            raise_malloc_thresholds()
        self._folder = Folder(Path(path), map_bytes=self._map_bytes, sync=sync)
        try:
            self._db = open_database(self._folder, map_bytes=self._map_bytes, sync=sync, readers=readers)
        except UnavailableError:
            self._folder.close()
            raise
        self._namespaces = read_namespaces(self._db)
        self._outbox = Outbox(notify)
        self._encoder = Encoder(compress_workers, backlog_bytes)
        group = min(group_bytes, capacity_bytes // 16)
        self._writer = Writer(self._db, self._encoder, group_bytes=group, on_error=self._note_error)
        self._readers = Readers(self._db, readers, purge=lambda op: self._writer.submit([op]))

    # -- namespaces and restart

    def put_namespace(self, namespace_fingerprint: bytes, namespace: Namespace) -> None:
        """Store a namespace; it is durable before any page submitted after it. Does not wait.

        Raises InvalidArgumentError when the fingerprint is not the namespace's.
        """
        self._check_open()
        if fingerprint(namespace) != namespace_fingerprint:
            raise InvalidArgumentError("the fingerprint is not this namespace's")
        if namespace_fingerprint not in self._namespaces:
            self._namespaces[namespace_fingerprint] = namespace
            self._writer.submit([SaveNamespace(namespace_fingerprint, pack_namespace(namespace))])

    def namespaces(self) -> dict[bytes, Namespace]:
        """Every namespace stored, by fingerprint."""
        return dict(self._namespaces)

    def recover(self) -> Recovery:
        """What the store holds, as chains, read without page bodies. Iterate it before the first PUT."""
        self._check_open()
        return Recovery(self._db, self.namespaces())

    @property
    def wiped(self) -> str:
        """Why the store started empty although the folder held data; empty when it did not."""
        return self._folder.wiped

    # -- room

    @property
    def usable_bytes(self) -> int:
        """The sum of charges up to which the store takes pages without refusing any."""
        return int(self._map_bytes * USABLE_PART)

    @property
    def used_bytes(self) -> int:
        """Bytes of the file that hold live data, as of the last commit."""
        return self._writer.used_bytes

    @property
    def stats(self) -> WriterStats:
        """Counters of the writer; read only."""
        return self._writer.stats

    # -- the store port

    def submit(self, batch: Batch) -> None:
        """Queue a batch. A GET sees the pages of PUTs that have completed.

        Raises InvalidArgumentError for a batch that does not fit, UnavailableError when closed.
        """
        self._check_open()
        _check(batch)
        pending = Pending(batch, 1 if batch.op is Op.FLUSH else len(batch.keys), self._outbox)
        if batch.op is Op.FLUSH:
            pending.outcomes = []
            self._writer.submit([Flush(pending)])
        elif not batch.keys:
            self._outbox.publish(Completion(batch.id, ()))
        elif batch.op is Op.GET:
            self._readers.submit(pending)
        elif batch.op is Op.DELETE:
            self._writer.submit([DeleteKeys(pending)])
        else:
            puts = [self._page_put(pending, at) for at in range(len(batch.keys))]
            self._encoder.submit(puts)
            self._writer.submit(puts)

    def poll(self) -> list[Completion]:
        """Completions since the last call; never blocks."""
        return self._outbox.drain()

    def close(self) -> None:
        """Commit what was submitted, sync, release everything. Idempotent; does nothing in a forked child."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._readers.close()  # readers hand corrupt pages to the writer
        self._encoder.close()
        self._writer.close()
        try:
            self._db.env.sync(True)  # noqa: FBT003 - lmdb's signature
            clean = True
        except lmdb.Error as exc:
            _log.error("disk: the last sync failed: %s", exc)
            clean = False
        self._db.env.close()
        if clean:
            self._mark_clean()
        self._folder.close()

    def _mark_clean(self) -> None:
        try:
            self._folder.mark_clean()
        except OSError as exc:
            _log.error("disk: the clean shutdown could not be recorded: %s", exc)

    def _page_put(self, pending: Pending, at: int) -> PagePut:
        records = pending.batch.records
        record = records[at] if records else None
        return PagePut(pending, at, record, self._codec_of(record.namespace if record is not None else b""))

    def _codec_of(self, namespace_fingerprint: bytes) -> PageCodec:
        namespace = self._namespaces.get(namespace_fingerprint)
        name = namespace_fingerprint if namespace is not None else b""
        if name not in self._codecs:
            self._codecs[name] = PageCodec(namespace, setting=self._page_codec)
        return self._codecs[name]

    def _note_error(self, text: str) -> None:
        self.last_error = text

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise ViolationError("the disk store was carried across a fork")
        if self._closed:
            raise UnavailableError("the disk store is closed")


def _check(batch: Batch) -> None:
    pages = len(batch.keys)
    if any(len(key) != KEY_BYTES for key in batch.keys):
        raise InvalidArgumentError(f"batch {batch.id}: page keys have {KEY_BYTES} bytes")
    if batch.op in (Op.DELETE, Op.FLUSH):
        return
    if len(batch.buffers) != pages:
        raise InvalidArgumentError(f"batch {batch.id}: {pages} keys and {len(batch.buffers)} buffers")
    if len(batch.records) not in (0, pages) or len(batch.checksums) not in (0, pages):
        raise InvalidArgumentError(f"batch {batch.id}: {pages} keys, other numbers of records or checksums")
    for buffer in batch.buffers:
        if buffer.nbytes != batch.page_bytes or not batch.page_bytes or not buffer.contiguous:
            raise InvalidArgumentError(
                f"batch {batch.id}: a buffer of {buffer.nbytes} bytes for {batch.page_bytes}"
            )
        if batch.op is Op.GET and buffer.readonly:
            raise InvalidArgumentError(f"batch {batch.id}: GET into a read-only buffer")
    for record in batch.records:
        if len(record.namespace) != KEY_BYTES or len(record.parent_key) != KEY_BYTES or not record.symbol:
            raise InvalidArgumentError(
                f"batch {batch.id}: a record's namespace and parent key have {KEY_BYTES} bytes"
            )
