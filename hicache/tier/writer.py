"""The one thread that writes to LMDB: group commit, in submission order.

A group is what is ready: it ends at ``group_bytes``, or when nothing more came for a moment. While one group
commits the next one gathers, so single small writes stay quick and large ones get large transactions. Nothing
is settled before its commit returned. A full map poisons its transaction: the group is then written again in
steps, freed pages given time to come back, large records cut in pieces, halving what does not fit until single
pages are refused with FULL. Any other failure of the medium is the FAULT of its group, and the next group tries
again.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby

import lmdb

from hicache.tier.codec import decode
from hicache.tier.encoder import Encoder, PagePut
from hicache.tier.lmdb_env import TICK_KEY, Database, charge_bytes, pack_row, row_bytes, trim_heap
from hicache.tier.outbox import Pending
from hicache.tier.pieces import (
    PIECE_PAGES,
    delete_record,
    get_record,
    pieces_charge_bytes,
    put_pieces,
    put_record,
)
from hicache.tier.priority import background
from hicache.types import Outcome

_log = logging.getLogger(__name__)

_LINGER_S = 0.002
_IDLE_S = 1.0
_GROUP_OPS = 8192
#: Puts beyond this part of the map are refused: deletes need free pages, too, for copy-on-write.
_FILL_LIMIT = 0.95
_FULL = "the disk tier's file is full"


@dataclasses.dataclass(frozen=True, slots=True)
class DeleteKeys:
    """A DELETE batch."""

    pending: Pending


@dataclasses.dataclass(frozen=True, slots=True)
class Flush:
    """Settles when everything before it has."""

    pending: Pending


@dataclasses.dataclass(frozen=True, slots=True)
class SaveNamespace:
    """A namespace to store before the pages that follow."""

    fingerprint: bytes
    json: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Purge:
    """Pages a GET found corrupt: removed unless they were replaced meanwhile; then the GET is settled."""

    pending: Pending
    positions: tuple[int, ...]


WriteOp = PagePut | DeleteKeys | Flush | SaveNamespace | Purge


@dataclasses.dataclass(slots=True)
class WriterStats:
    """Counters since the start. Written by the writer thread only."""

    commits: int = 0
    pages: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    map_full: int = 0
    refused_pages: int = 0
    faults: int = 0
    purged_pages: int = 0


class Writer:
    """Owns every write transaction. ``submit`` from any thread."""

    def __init__(
        self, database: Database, encoder: Encoder, *, group_bytes: int, on_error: Callable[[str], None]
    ) -> None:
        self._db = database
        self._encoder = encoder
        self._group_bytes = group_bytes
        self._on_error = on_error
        self._queue: deque[WriteOp] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._unsaved: dict[bytes, bytes] = {}
        self._limit_bytes = int(database.env.info()["map_size"] * _FILL_LIMIT)
        self._room_bytes = 0
        self._piece_pages = 0  # disk pages a piece; 0 stores records whole
        self._tick = 0
        self.stats = WriterStats()
        with database.env.begin() as txn:
            self.used_bytes = database.used_bytes(txn)
        self._thread = threading.Thread(target=self._run, name="hicache-disk-writer", daemon=True)
        self._thread.start()

    def submit(self, ops: Sequence[WriteOp]) -> None:
        """Queue operations; they take effect in this order."""
        with self._wake:
            self._queue.extend(ops)
            self._wake.notify()

    def close(self) -> None:
        """Write what was submitted, stop. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    # -- gathering

    def _run(self) -> None:
        background()
        heap_is_trimmed = True
        while True:
            group = self._gather(None if heap_is_trimmed else _IDLE_S)
            if group:
                heap_is_trimmed = False
                self._write(group)
                del group  # idle, it would keep the last pages' buffers
            elif not heap_is_trimmed:
                trim_heap()
                heap_is_trimmed = True
            elif self._closed and not self._queue:
                return

    def _gather(self, idle_s: float | None) -> list[WriteOp]:
        """The next group; empty when idle for ``idle_s`` or closed."""
        group: list[WriteOp] = []
        size, patience = 0, 2
        while size < self._group_bytes and len(group) < _GROUP_OPS:
            op = self._head(_LINGER_S if group else idle_s, wait=not group or patience > 0)
            if op is None:
                if not group or not patience:
                    break
                patience -= 1
                continue
            group.append(op)
            if isinstance(op, PagePut):
                size += op.raw_bytes
        return group

    def _head(self, timeout_s: float | None, *, wait: bool) -> WriteOp | None:
        """Take the head of the queue if it is there, and encoded; waits once at most."""
        with self._wake:
            if not self._queue and wait and not self._closed:
                self._wake.wait(timeout_s)
            if not self._queue:
                return None
            op = self._queue[0]
        if isinstance(op, PagePut) and not op.ready.wait(timeout_s if wait else 0):
            return None
        with self._wake:
            return self._queue.popleft()

    # -- writing

    def _write(self, group: list[WriteOp]) -> None:
        held = sum(op.raw_bytes for op in group if isinstance(op, PagePut))
        self._unsaved.update({op.fingerprint: op.json for op in group if isinstance(op, SaveNamespace)})
        if not self._commit(group):
            self.stats.map_full += 1
            self._commit_in_steps(group)
        self._encoder.release(held)

    def _commit(self, ops: Sequence[WriteOp]) -> bool:
        """Apply and commit all, then settle all. False when the map is full: nothing applied or settled."""
        try:
            results = self._transact(ops)
        except lmdb.MapFullError:
            return False
        except Exception as exc:  # noqa: BLE001 - the loop's edge: EIO, ENOSPC, or a bug; the FAULT of these operations
            self._fail(ops, exc)
            return True
        for op, outcomes in zip(ops, results, strict=True):
            self._settle(op, outcomes, _FULL if Outcome.FULL in outcomes else "")
        return True

    def _transact(self, ops: Sequence[WriteOp]) -> list[list[Outcome]]:
        if not self._unsaved and all(isinstance(op, (Flush, SaveNamespace)) for op in ops):
            return [[] for _ in ops]
        self._room_bytes = self._limit_bytes - self.used_bytes
        with self._db.env.begin(write=True, buffers=True) as txn:
            for fingerprint, json in self._unsaved.items():
                txn.put(fingerprint, json, db=self._db.namespaces)
            results = [self._apply(txn, op) for op in ops]
            used_bytes = self._db.used_bytes(txn)
        self.used_bytes = used_bytes
        self._unsaved.clear()
        self.stats.commits += 1
        return results

    def _apply(self, txn: lmdb.Transaction, op: WriteOp) -> list[Outcome]:
        if isinstance(op, PagePut):
            return [self._put(txn, op)]
        if isinstance(op, DeleteKeys):
            return [self._delete(txn, bytes(key)) for key in op.pending.batch.keys]
        if isinstance(op, Purge):
            return [self._purge(txn, op.pending, at) for at in op.positions]
        return []

    def _put(self, txn: lmdb.Transaction, put: PagePut) -> Outcome:
        if put.rejected:
            return Outcome.CORRUPT
        if put.encoded is None:
            return Outcome.FAULT
        record = put.encoded.record
        put.charge_bytes = charge_bytes(record.nbytes, row_bytes(put.record))
        if self._piece_pages:
            put.charge_bytes += pieces_charge_bytes(record.nbytes, self._piece_pages)
        if put.charge_bytes > self._room_bytes:
            return Outcome.FULL
        self._room_bytes -= put.charge_bytes
        if self._piece_pages:
            put_pieces(txn, self._db, put.key, record, pages=self._piece_pages)
        else:
            put_record(txn, self._db, put.key, record)
        txn.put(put.key, pack_row(put.charge_bytes, put.record), db=self._db.meta)
        return Outcome.OK

    def _delete(self, txn: lmdb.Transaction, key: bytes) -> Outcome:
        found = delete_record(txn, self._db, key)
        txn.delete(key, db=self._db.meta)
        return Outcome.OK if found else Outcome.MISS

    def _purge(self, txn: lmdb.Transaction, pending: Pending, at: int) -> Outcome:
        key = bytes(pending.batch.keys[at])
        record = get_record(txn, self._db, key)
        if record is not None:
            scratch = memoryview(bytearray(pending.batch.page_bytes))
            if decode(record, key, scratch).outcome is Outcome.CORRUPT:
                del record
                self._delete(txn, key)
                self.stats.purged_pages += 1
        return Outcome.CORRUPT

    def _settle(self, op: WriteOp, outcomes: Sequence[Outcome], error: str = "") -> None:
        if isinstance(op, SaveNamespace):
            return
        pending = op.pending
        pending.error = pending.error or error
        if isinstance(op, PagePut):
            self._settle_put(op, outcomes[0])
        elif isinstance(op, DeleteKeys):
            pending.outcomes[:] = outcomes
            pending.settle(len(outcomes))
        elif isinstance(op, Purge):
            pending.settle(len(op.positions))
        else:
            pending.settle()

    def _settle_put(self, put: PagePut, outcome: Outcome) -> None:
        pending = put.pending
        pending.outcomes[put.at] = outcome
        pending.error = pending.error or put.error
        self.stats.refused_pages += outcome is Outcome.FULL
        if outcome is Outcome.OK and put.encoded is not None:
            stored = put.encoded.record.nbytes
            pending.checksums[put.at] = put.encoded.checksum
            pending.charges[put.at] = put.charge_bytes
            self.stats.pages += 1
            self.stats.raw_bytes += put.raw_bytes
            self.stats.stored_bytes += stored
        pending.settle()

    # -- trouble

    def _commit_in_steps(self, group: list[WriteOp]) -> None:
        """After MDB_MAP_FULL: runs of puts and of everything else, each in its own transactions, in order."""
        for _, run in groupby(group, key=lambda op: isinstance(op, PagePut)):
            ops = list(run)
            self._recycle()
            if self._commit(ops):
                continue
            # There may be room, but none that is long enough.
            self._piece_pages = PIECE_PAGES[0]
            if not self._commit(ops):
                self._piece_pages = PIECE_PAGES[-1]
                self._commit_halving(ops)
            self._piece_pages = 0

    def _commit_halving(self, ops: list[WriteOp]) -> None:
        """What fits is committed; single operations that do not fit are refused with FULL."""
        if self._commit(ops):
            return
        if len(ops) == 1:
            self._settle(ops[0], [Outcome.FULL] * _pages(ops[0]), _FULL)
            return
        half = len(ops) // 2
        self._commit_halving(ops[:half])
        self._commit_halving(ops[half:])

    def _recycle(self) -> None:
        """Pages freed by a commit come back two commits later: make these commits."""
        for _ in range(2):
            self._tick ^= 1
            try:
                with self._db.env.begin(write=True, db=self._db.namespaces) as txn:
                    txn.put(TICK_KEY, bytes([self._tick]))
            except lmdb.Error as exc:
                _log.debug("disk: housekeeping commit failed: %s", exc)

    def _fail(self, ops: Sequence[WriteOp], exc: Exception) -> None:
        text = f"{type(exc).__name__}: {exc}"
        _log.error("disk: a commit of %d operations failed: %s", len(ops), text)
        self.stats.faults += 1
        self._on_error(text)
        for op in ops:
            self._settle(op, [Outcome.FAULT] * _pages(op), text)


def _pages(op: WriteOp) -> int:
    return len(op.pending.batch.keys) if isinstance(op, DeleteKeys) else 1
