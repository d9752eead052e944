"""The disk tier: pages by key in LMDB, compressed, checksummed, bounded, and back after a restart.

Path of a PUT: ``submit`` -> encoder threads (compress, hash) -> the writer thread (group commit of pages and
rows into one shard) -> completion. Of a GET: reader threads look into the shards and decode from LMDB's map into the
destination.

What survives. A completed PUT or DELETE survives ``kill -9``, with or without ``sync``: it is in the page cache.
With ``sync=True`` it survives a power cut, too: data and meta page of its commit were synced (fdatasync, then a
synchronous write of the meta page) before the completion. Without ``sync`` a machine that went down uncleanly finds
the store empty (``wiped`` says so): see ``folder``. Shards commit one after another, in an order that leaves every
page its ancestors.

The bound. ``capacity_bytes`` is what ``du`` shows for the folder, from the first completed PUT on: the maps of all
shards, the other files and the quarantine fit into it, and LMDB never writes past its map. A smaller capacity than
before is reached by moving pages together and giving shards back, before any PUT is taken. ``usable_bytes`` is less,
because pages of mixed sizes need free room to find a place: up to that, by charges, no page of 8 MiB or less (and of a
64th of the capacity or less) is refused. Not safe across fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb

from hicache import heap
from hicache.errors import ConfigError, InvalidArgumentError, UnavailableError, ViolationError
from hicache.keys import KEY_BYTES, fingerprint
from hicache.tier.attempts import Attempts
from hicache.tier.codec import PageCodec
from hicache.tier.codec_names import LOSSLESS, PAGE_CODECS
from hicache.tier.commit import Committer
from hicache.tier.doomed import Doomed
from hicache.tier.encoder import Encoder, PagePut
from hicache.tier.folder import Folder
from hicache.tier.geometry import USABLE_PART, divide
from hicache.tier.lmdb_env import Medium
from hicache.tier.ops import DeleteKeys, Flush, Probe, Purge, SaveHeat, SaveNamespace, Upkeep, WriterStats
from hicache.tier.outbox import Lost, Outbox, Pending
from hicache.tier.placing import Placing
from hicache.tier.quarantine import Quarantine, open_quarantine
from hicache.tier.reader import Readers
from hicache.tier.recovery import RecoveredChain, Recovery
from hicache.tier.remove import Remover
from hicache.tier.rows import pack_namespace
from hicache.tier.scrub import CURSOR_FILE, Scrubber, ScrubOptions, ScrubStats
from hicache.tier.shelf import Look, Shelf
from hicache.tier.upkeep import Upkeep as Keeper
from hicache.tier.writer import Crew, Writer
from hicache.types import Batch, Completion, Namespace, Notify, Op

__all__ = ["MIN_CAPACITY_BYTES", "USABLE_PART", "DiskStore", "Layout", "RecoveredChain", "Recovery"]

_log = logging.getLogger(__name__)

MIN_CAPACITY_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How the folder is used; the defaults fit.

    ``shard_bytes``: map of a new shard, 0 chooses by the capacity. ``quarantine_bytes``: bound on damaged records kept
    for study, at most a 64th of the capacity, inside of it; 0 keeps none. ``medium``: tests make it fail.
    ``scrub_bytes_per_s``: rate at which a background thread verifies what is stored; 0: it does not.
    """

    shard_bytes: int = 0
    quarantine_bytes: int = 64 << 20
    medium: Medium = dataclasses.field(default_factory=Medium)
    scrub_bytes_per_s: int = 0


class DiskStore:
    """Keyed page store on a local disk. See the module's text for what it promises.

    ``take_lost()``: keys of pages that the scrubber found damaged and that are gone, since the last call.
    """

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
        wall_ms: Callable[[], int] = lambda: 0,
        layout: Layout | None = None,
    ) -> None:
        """Open the folder and start the threads.

        Args:
        path: a folder of its own, on a local disk. capacity_bytes: bound on what ``du`` shows for it.
        notify: called from worker threads when ``poll`` has something.
        sync: fsync every commit.
        page_codec: "lossless" compresses where it pays, "lossless-fast" a little less and faster, "raw" never;
        for lossless namespaces: one that names another codec gets that.
        group_bytes: raw bytes of pages in one transaction, less for small capacities; backlog_bytes: of pages encoded
        and not yet committed.
        tune_malloc: raise glibc's thresholds, process-wide. wall_ms: unix time, stored with each page.

        Raises ConfigError for a folder that cannot be used, UnavailableError when LMDB does not open it.
        """
        _check_options(capacity_bytes, page_codec)
        layout = layout or Layout()
        self._geometry = divide(capacity_bytes, layout.quarantine_bytes, layout.shard_bytes)
        self._page_codec = page_codec
        self._codecs: dict[bytes, PageCodec] = {}  # by namespace
        self._pid = os.getpid()
        self._closed = False
        self.last_error = ""
        if tune_malloc:
            heap.keep_freed(heap.COMMIT_BYTES)
        folder = self._folder = Folder(Path(path), capacity_bytes=capacity_bytes, sync=sync)
        with contextlib.ExitStack() as opened:
            opened.callback(folder.close)
            self._shelf = Shelf(folder.path, self._geometry, sync=sync, readers=readers, medium=layout.medium)
            opened.callback(self._shelf.close)
            self._geometry = self._shelf.geometry
            quarantine = open_quarantine(folder.path, self._geometry.quarantine_bytes)
            opened.pop_all()
        self._namespaces = self._shelf.namespaces()
        self._outbox = Outbox(notify)
        self._lost = Lost(self._outbox)
        self.take_lost = self._lost.take
        self._encoder = Encoder(compress_workers, backlog_bytes)
        crew = self._hire(quarantine, layout.medium, wall_ms)
        self._keeper, self._stats = crew.keeper, crew.stats
        self._writer = Writer(crew, group_bytes=min(group_bytes, self._geometry.shard_bytes // 8))
        look = functools.partial(Look, self._shelf)
        self._readers = Readers(look, readers, purge=lambda op: self._writer.submit([op]))
        self._scrubber = self._start_scrubber(layout.scrub_bytes_per_s, wall_ms)

    def _start_scrubber(self, bytes_per_s: int, wall_ms: Callable[[], int]) -> Scrubber | None:
        if not bytes_per_s:
            return None
        lost = self._lost

        def purge(key: bytes, raw_bytes: int) -> None:
            pending = Pending(Batch(0, Op.GET, raw_bytes, keys=[key]), 1, Outbox(lambda: None))
            self._writer.submit([Purge(pending, (0,), lost.add)])

        options = ScrubOptions(bytes_per_s, self._folder.path / CURSOR_FILE, wall_ms)
        return Scrubber(lambda: Look(self._shelf), purge, options)

    def _hire(self, quarantine: Quarantine, medium: Medium, wall_ms: Callable[[], int]) -> Crew:
        shelf, stats = self._shelf, WriterStats()
        attempts = Attempts(shelf.home, stats, self._note_error)
        remover = Remover(shelf, attempts, stats)
        keeper = Keeper(shelf, attempts, remover, stats=stats, surplus=self._surplus)
        placing = Placing(shelf, wanted=keeper.wanted)
        doomed = Doomed(remover)
        committer = Committer(shelf, placing, remover, attempts, doomed=doomed, stats=stats, wall_ms=wall_ms)
        committer.namespaces.update({fp: pack_namespace(n) for fp, n in self._namespaces.items()})
        return Crew(
            shelf, self._encoder, committer, remover, attempts, keeper, quarantine, medium, doomed, stats
        )

    # -- namespaces and restart

    def put_namespace(self, namespace_fingerprint: bytes, namespace: Namespace) -> None:
        """Store a namespace; it is durable before any page submitted after it. Does not wait.

        As long as the folder has no shard there is nowhere to write it, and a restart forgets it: nothing is lost,
        since no page can be of it, and pages bring their namespace along in their own transaction.

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

    def put_heat(self, keys: Sequence[bytes], last_use_ms: Sequence[int], hits: Sequence[int]) -> None:
        """Keep when pages were used last and how often, with the next commit. Does not wait.

        Keys that are not stored are passed over. Raises InvalidArgumentError for columns of different lengths.
        """
        self._check_open()
        if not len(keys) == len(last_use_ms) == len(hits):
            raise InvalidArgumentError("heat: columns of different lengths")
        if keys:
            self._writer.submit([SaveHeat(tuple(keys), tuple(last_use_ms), tuple(hits))])

    def recover(self) -> Recovery:
        """What the store holds, as chains, read without page bodies. Iterate it before the first PUT."""
        self._check_open()
        return Recovery(
            self._begin_recovery,
            self.namespaces(),
            usable_bytes=self.usable_bytes,
            on_end=self._end_recovery,
        )

    @property
    def wiped(self) -> str:
        """Why the store, or a shard of it, started empty although it held data; empty when it did not."""
        return "; ".join(filter(None, (self._folder.wiped, *self._shelf.lost)))

    def _begin_recovery(self) -> Look:
        self._keeper.recoveries.add(1)
        return Look(self._shelf)

    def _end_recovery(self, recovery: Recovery) -> None:
        """Also removes what a crash left twice."""
        copies = recovery.copies
        self._writer.submit([Upkeep(lambda: self._keeper.drop_copies(copies)), Upkeep(self._keeper.resume)])

    def _surplus(self, usable_bytes: int) -> list[bytes]:
        """Pages that nothing will match, or that are too many for the capacity; for the writer's thread."""
        found = Recovery(lambda: Look(self._shelf), self.namespaces(), usable_bytes=usable_bytes)
        chains = iter(found)
        next(chains, None)  # the first chain comes after all rows were read
        chains.close()
        return found.orphans

    # -- room

    @property
    def usable_bytes(self) -> int:
        """The sum of charges up to which the store takes pages without refusing any."""
        return self._geometry.usable_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the files that hold live data, as of the last commit."""
        return self._shelf.used_bytes

    @property
    def stats(self) -> WriterStats:
        """Counters of the writer; read only."""
        return self._stats

    @property
    def scrub_stats(self) -> ScrubStats:
        """What the scrubber did; zeros where there is none."""
        return self._scrubber.stats if self._scrubber is not None else ScrubStats()

    def compact(self) -> None:
        """Give back what sparse files hold, shard by shard, in the background: see ``progress``.

        Needs the reserve: a capacity below ``geometry.SEVERAL_FROM_BYTES`` has none.
        """
        self._check_open()
        self._writer.submit([Upkeep(self._keeper.compact)])

    def progress(self) -> str:
        """What a shrink or a compaction is doing; empty when nothing is going on."""
        return self._keeper.progress()

    # -- the store port

    def submit(self, batch: Batch) -> None:
        """Queue a batch. A GET sees the pages of PUTs that have completed.

        Raises InvalidArgumentError for a batch that does not fit, UnavailableError when closed.
        """
        self._check_open()
        _check(batch)
        single = batch.op in (Op.FLUSH, Op.PROBE)
        pending = Pending(batch, 1 if single else len(batch.keys), self._outbox)
        if batch.op is Op.FLUSH:
            pending.outcomes = []
            self._writer.submit([Flush(pending)])
        elif batch.op is Op.PROBE:
            self._writer.submit([Probe(pending)])
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
        if self._scrubber is not None:
            self._scrubber.close()
        self._readers.close()  # readers hand corrupt pages to the writer
        self._encoder.close()
        self._writer.close()
        try:
            self._shelf.sync()
            clean = True
        except (lmdb.Error, OSError) as exc:
            _log.error("disk: the last sync failed: %s", exc)
            clean = False
        self._shelf.close()
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


def _check_options(capacity_bytes: int, page_codec: str) -> None:
    if capacity_bytes < MIN_CAPACITY_BYTES:
        raise ConfigError(
            f"disk_bytes is {capacity_bytes} bytes; at least {MIN_CAPACITY_BYTES >> 20} MiB are needed"
        )
    if page_codec not in PAGE_CODECS:
        raise ConfigError(f"disk page_codec {page_codec!r} is not one of {', '.join(PAGE_CODECS)}")


def _check(batch: Batch) -> None:
    pages = len(batch.keys)
    if any(len(key) != KEY_BYTES for key in batch.keys):
        raise InvalidArgumentError(f"batch {batch.id}: page keys have {KEY_BYTES} bytes")
    if batch.op in (Op.DELETE, Op.FLUSH, Op.PROBE):
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
