"""The one thread that writes: group commit, in submission order.

A group is what is ready: it ends at ``group_bytes``, or when nothing more came for a moment. While one group
commits the next one gathers, so single small writes stay quick and large ones get large transactions. Nothing
is settled before its commit returned. How a group becomes transactions: ``commit``, ``remove``. Between two
groups the thread does a step of ``upkeep``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence

from hicache import heap
from hicache.tier.attempts import Attempts
from hicache.tier.codec import decode
from hicache.tier.commit import Committer
from hicache.tier.doomed import Doomed
from hicache.tier.encoder import Encoder, PagePut
from hicache.tier.geometry import PROBE_BYTES
from hicache.tier.lmdb_env import Medium
from hicache.tier.ops import (
    DeleteKeys,
    Flush,
    Probe,
    Purge,
    SaveHeat,
    SaveNamespace,
    Upkeep,
    WriteOp,
    WriterStats,
    keys_of,
    parts,
)
from hicache.tier.pieces import get_record
from hicache.tier.priority import background
from hicache.tier.quarantine import Quarantine, word_of
from hicache.tier.remove import Homes, Remover
from hicache.tier.shelf import Look, Shelf
from hicache.tier.upkeep import Upkeep as Keeper
from hicache.types import Outcome

_log = logging.getLogger(__name__)

_LINGER_S = 0.002
_IDLE_S = 1.0
_GROUP_OPS = 8192
_PROBE_FILE = "probe"
#: Deletes may wait while there is nothing else than these.
_CAN_WAIT_FOR = (PagePut, DeleteKeys, SaveNamespace, SaveHeat)


@dataclasses.dataclass(frozen=True, slots=True)
class Crew:
    """Who does the writer's work."""

    shelf: Shelf
    encoder: Encoder
    committer: Committer
    remover: Remover
    attempts: Attempts
    keeper: Keeper
    quarantine: Quarantine
    medium: Medium
    doomed: Doomed
    stats: WriterStats


class Writer:
    """Owns every write transaction. ``submit`` from any thread."""

    def __init__(self, crew: Crew, *, group_bytes: int) -> None:
        self._crew = crew
        self._group_bytes = group_bytes
        self._queue: deque[WriteOp] = deque()
        self._wake = threading.Condition()
        self._closed = False
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
        keeper = self._crew.keeper
        heap_is_trimmed = True
        while True:
            busy = keeper.busy
            group = self._gather(0 if busy else None if heap_is_trimmed else _IDLE_S)
            if group:
                heap_is_trimmed = False
                self._write(group)
                del group  # idle, it would keep the last pages' buffers
                if self._crew.doomed.due or not self._queue or keeper.busy:
                    self._crew.doomed.flush()
            elif self._closed and not self._queue:
                return
            elif not busy and not heap_is_trimmed:
                self._rest()
                heap_is_trimmed = True
            if keeper.busy and not self._closed:
                heap_is_trimmed = False
                keeper.step()

    def _rest(self) -> None:
        """Nothing came for a while."""
        heap.give_back()
        self._crew.committer.forget_refusals()
        self._crew.keeper.retry()
        self._crew.shelf.check_readers()

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
        if isinstance(op, PagePut):
            if self._crew.keeper.holds_puts and not self._closed:
                return None
            if not op.ready.wait(timeout_s if wait else 0):
                return None
        with self._wake:
            return self._queue.popleft()

    # -- writing

    def _write(self, group: list[WriteOp]) -> None:
        crew = self._crew
        held = sum(op.raw_bytes for op in group if isinstance(op, PagePut))
        for op in group:
            if isinstance(op, SaveNamespace):
                crew.committer.namespaces[op.fingerprint] = op.json
        for part in parts(group):
            self._write_part(part)
        crew.committer.save_namespaces()
        crew.encoder.release(held)
        crew.keeper.note_fragmented()
        crew.keeper.note_mixed()

    def _write_part(self, part: list[WriteOp]) -> None:
        """Deletes, then puts, then the rest; within a part nobody sees the difference."""
        crew = self._crew
        keys = [key for op in part for key in keys_of(op)]
        above = [op.record.parent_key for op in part if isinstance(op, PagePut) and op.record is not None]
        if crew.doomed.names((*keys, *above)):
            crew.doomed.flush()
        homes: Homes = {}
        error = crew.attempts.run(lambda: self._look(part, keys, homes), commits=0) if keys else ""
        if error:
            self._fail(part, error)
            return
        if not all(isinstance(op, _CAN_WAIT_FOR) for op in part):
            crew.doomed.flush()
        for op in part:
            if isinstance(op, Purge):
                self._purge(op, homes)
        puts = [op for op in part if isinstance(op, PagePut)]
        if puts and crew.keeper.too_large:
            crew.committer.refuse(
                puts, homes, f"the disk tier's files are too large: {crew.keeper.progress()}"
            )
        elif puts:
            crew.committer.put(puts, homes)
        for op in part:
            self._do_small(op)

    def _look(self, part: list[WriteOp], keys: list[bytes], homes: Homes) -> None:
        """Find what the part names; its deletes take their place among those that wait."""
        crew = self._crew
        homes.update(crew.remover.locate(keys))
        deletes = [op for op in part if isinstance(op, DeleteKeys)]
        if deletes:
            crew.doomed.add(deletes, homes)

    def _do_small(self, op: WriteOp) -> None:
        crew = self._crew
        if isinstance(op, SaveHeat):
            crew.remover.save_heat(_heat(op))
        elif isinstance(op, Probe):
            error = crew.attempts.run(self._probe)
            op.pending.outcomes[:] = [Outcome.FAULT if error else Outcome.OK]
            op.pending.error = error
            op.pending.settle()
        elif isinstance(op, Upkeep):
            op.start()
        elif isinstance(op, Flush):
            op.pending.settle()

    def _purge(self, op: Purge, homes: Homes) -> None:
        """Remove what is still corrupt, keep it aside. Nobody needs to know when that fails: it is read again."""
        crew, batch = self._crew, op.pending.batch
        doomed: Homes = {}
        with Look(crew.shelf) as look:
            for at in op.positions:
                key = bytes(batch.keys[at])
                for shard in homes[key]:
                    record = get_record(look.txn(shard), shard.db, key)
                    assert record is not None, "only this thread removes pages"
                    found = decode(record, key, memoryview(bytearray(batch.page_bytes)))
                    if found.outcome is not Outcome.CORRUPT:
                        continue
                    doomed[key] = (*doomed.get(key, ()), shard)
                    kind = word_of(found.kind)
                    crew.stats.corrupt[kind] = crew.stats.corrupt.get(kind, 0) + 1
                    crew.stats.quarantined_pages += crew.quarantine.keep(key, kind, record)
        crew.stats.purged_pages += len(doomed)
        failed = crew.remover.delete(doomed)
        if op.gone is not None:
            op.gone([key for key in doomed if key not in failed])
        op.pending.settle(len(op.positions))

    def _probe(self) -> None:
        """Take a little new room and commit in a shard. Raises what the medium says."""
        shelf = self._crew.shelf
        self._crew.medium.before("file", shelf.home)
        file = shelf.home / _PROBE_FILE
        try:
            with file.open("wb") as out:
                out.write(bytes(PROBE_BYTES))
                out.flush()
                os.fsync(out.fileno())
        finally:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        if shelf.shards:
            shelf.shards[-1].recycle()

    def _fail(self, ops: Sequence[WriteOp], error: str) -> None:
        """Settle operations that nothing was done for."""
        for op in ops:
            if isinstance(op, PagePut):
                op.pending.outcomes[op.at] = Outcome.FAULT
                op.pending.error = op.pending.error or error
                op.pending.settle()
            elif isinstance(op, DeleteKeys):
                op.pending.error = error
                op.pending.settle(len(op.pending.batch.keys))
            elif isinstance(op, Purge):
                op.pending.settle(len(op.positions))
            else:
                self._do_small(op)


def _heat(op: SaveHeat) -> dict[bytes, tuple[int, int]]:
    rows = zip(op.keys, op.last_use_ms, op.hits, strict=True)
    return {bytes(key): (last_use_ms, hits) for key, last_use_ms, hits in rows}
