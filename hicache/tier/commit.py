"""Makes a group of operations into transactions of single shards.

A page is never stored in an earlier transaction than its parent, nor removed in a later one: puts of one size
class (a namespace has one) stay in order and go into one shard as long as there is room, and deletes go
shard by shard, children first (``ops.delete_order``). So whatever a crash between two shards' commits leaves
has its ancestors. A page whose parent was just refused is refused, too. A page put anew is written before its
old copy in another shard is removed, and acknowledged after both. Deletes wait for puts into their shard, or for more
of them (``doomed``).

A full map poisons its transaction: the pages then go elsewhere, or after freed pages had time to come back,
in pieces, halving what does not fit until single pages are refused with FULL. Any other failure of the medium
is the FAULT of what was in that transaction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from hicache.tier.attempts import FULL, Attempts
from hicache.tier.doomed import Doomed
from hicache.tier.encoder import PagePut
from hicache.tier.lmdb_env import WriteTxn
from hicache.tier.ops import WriterStats
from hicache.tier.pieces import PIECE_PAGES, delete_record, pieces_charge_bytes, put_pieces, put_record
from hicache.tier.placing import Placing
from hicache.tier.remove import Homes, Remover
from hicache.tier.rows import charge_bytes, pack_row, row_bytes
from hicache.tier.shelf import Shard, Shelf
from hicache.types import Outcome

_PARENT = "the page before it was not stored"
_REFUSED_MAX = 1 << 16


class Committer:
    """Stores pages, settles them. For the writer's thread only. Errors of the medium end here."""

    def __init__(
        self,
        shelf: Shelf,
        placing: Placing,
        remover: Remover,
        attempts: Attempts,
        *,
        doomed: Doomed,
        stats: WriterStats,
        wall_ms: Callable[[], int],
    ) -> None:
        self._shelf = shelf
        self._placing = placing
        self._remover = remover
        self._attempts = attempts
        self._doomed = doomed
        self._stats = stats
        self._wall_ms = wall_ms
        self._refused: dict[bytes, Outcome] = {}
        self.namespaces: dict[bytes, bytes] = {}  # fingerprint -> JSON

    def save_namespaces(self) -> None:
        """Write namespaces that no shard knows yet, where there is a shard; pages bring theirs along anyway."""
        shards = [s for s in self._shelf.shards if not s.leaving]
        if not shards:
            return
        known = set().union(*(s.namespaces for s in shards))
        if self.namespaces.keys() - known:
            self._attempts.run(lambda: self._write_namespaces(shards[-1], known))

    def _write_namespaces(self, shard: Shard, known: set[bytes]) -> None:
        fresh = self.namespaces.keys() - known
        with shard.write() as txn:
            for fingerprint in fresh:
                txn.put(fingerprint, self.namespaces[fingerprint], db=shard.db.namespaces)
        shard.namespaces |= fresh

    def put(self, puts: Iterable[PagePut], homes: Homes) -> None:
        """Store pages and settle each. Ancestors come before descendants, or were stored before."""
        classes: dict[int, deque[PagePut]] = {}
        for put in puts:
            record = put.encoded.record.nbytes if put.encoded is not None else 0
            put.charge_bytes = charge_bytes(record, row_bytes(put.record))
            classes.setdefault(self._placing.class_of(put.raw_bytes), deque()).append(put)
        for size_class, waiting in classes.items():
            while waiting:
                self._put_some(size_class, waiting, homes)

    def refuse(self, puts: Iterable[PagePut], homes: Homes, why: str) -> None:
        """Store none of these."""
        for put in puts:
            self._refuse(put, Outcome.FULL, why, homes)

    def _put_some(self, size_class: int, waiting: deque[PagePut], homes: Homes) -> None:
        """One transaction's worth of the queue."""
        while waiting and self._hopeless(waiting[0], homes):
            waiting.popleft()
        if not waiting:
            return
        chosen: list[Shard | None] = []
        charge = waiting[0].charge_bytes
        total = sum(put.charge_bytes for put in waiting)
        if not self._placing.is_roomy(size_class, total):
            self._doomed.flush()
        error = self._attempts.run(
            lambda: chosen.append(self._placing.choose(size_class, charge, total)), commits=0
        )
        if error:
            self._refuse(waiting.popleft(), Outcome.FAULT, error, homes)
            return
        shard = chosen[0]
        whole = shard is not None
        if shard is None:
            shard = self._placing.choose_for_pieces(charge)
        if shard is None:
            self._refuse(waiting.popleft(), Outcome.FULL, FULL, homes)
            return
        batch = self._take(shard, waiting)
        if not whole:
            self._put_in_pieces(shard, batch, homes)
            return
        error = self._put_whole(shard, batch)
        if error == FULL:
            self._doomed.flush()
            shard.note_full()
            waiting.extendleft(reversed(batch))  # elsewhere, or in pieces
        else:
            self._finish(shard, batch, homes, error)

    def _hopeless(self, put: PagePut, homes: Homes) -> bool:
        """Settle a page that cannot be stored for its own sake."""
        if put.encoded is None:
            self._refuse(put, Outcome.FAULT, put.error, homes)
        elif put.rejected:
            self._refuse(put, Outcome.CORRUPT, "", homes)
        elif put.record is not None and put.record.parent_key in self._refused:
            fault = self._refused[put.record.parent_key] is Outcome.FAULT
            self._refuse(put, Outcome.FAULT if fault else Outcome.FULL, _PARENT, homes)
        else:
            return False
        return True

    def _take(self, shard: Shard, waiting: deque[PagePut]) -> list[PagePut]:
        """As many as the shard has room for, one at least."""
        batch, room = [waiting.popleft()], shard.room_bytes
        room -= batch[0].charge_bytes
        own = {batch[0].key}
        while waiting and waiting[0].charge_bytes <= room:
            put = waiting[0]
            if put.encoded is None or put.rejected:
                break
            parent = put.record.parent_key if put.record is not None else b""
            if parent in self._refused and parent not in own:
                break
            batch.append(waiting.popleft())
            own.add(put.key)
            room -= put.charge_bytes
        return batch

    def _put_whole(self, shard: Shard, batch: Sequence[PagePut], piece_pages: int = 0) -> str:
        """Write pages and their rows in one transaction, remove what is doomed there; what failed."""
        doomed = self._doomed.of(shard)

        def work() -> None:
            now_ms = self._wall_ms()
            with shard.write() as txn:
                for key in doomed:
                    delete_record(txn, shard.db, key)
                    txn.delete(key, db=shard.db.meta)
                added = self._add_namespaces(txn, shard, batch)
                for put in batch:
                    assert put.encoded is not None, "only encoded pages get here"
                    record = put.encoded.record
                    if piece_pages:
                        put_pieces(txn, shard.db, put.key, record, pages=piece_pages)
                    else:
                        put_record(txn, shard.db, put.key, record)
                    row = pack_row(put.charge_bytes, put.record, last_use_ms=now_ms)
                    txn.put(put.key, row, db=shard.db.meta)
            shard.namespaces |= added

        error = self._attempts.run(work)
        if not error:
            self._doomed.settle(doomed, {})
        return error

    def _add_namespaces(self, txn: WriteTxn, shard: Shard, batch: Sequence[PagePut]) -> set[bytes]:
        wanted = {put.record.namespace for put in batch if put.record is not None}
        added = (wanted - shard.namespaces) & self.namespaces.keys()
        for fingerprint in added:
            txn.put(fingerprint, self.namespaces[fingerprint], db=shard.db.namespaces)
        return added

    def _put_in_pieces(self, shard: Shard, batch: list[PagePut], homes: Homes) -> None:
        """There may be room, but none that is long enough; first see whether freed pages made some."""
        error = self._attempts.run(shard.recycle) or self._put_whole(shard, batch)
        if error == FULL:
            self._put_cut(shard, batch, homes, PIECE_PAGES[0])
        else:
            self._finish(shard, batch, homes, error)

    def _put_cut(self, shard: Shard, batch: list[PagePut], homes: Homes, pages: int) -> None:
        """In pieces; halve what does not fit. Single pages that do not fit are refused."""
        before = [put.charge_bytes for put in batch]
        for put in batch:
            assert put.encoded is not None, "only encoded pages get here"
            put.charge_bytes += pieces_charge_bytes(put.encoded.record.nbytes, pages)
        error = self._put_whole(shard, batch, pages)
        if error != FULL:
            self._stats.pieces_pages += 0 if error else len(batch)
            self._finish(shard, batch, homes, error)
            return
        for put, charge in zip(batch, before, strict=True):
            put.charge_bytes = charge
        if len(batch) == 1 and pages == PIECE_PAGES[-1]:
            self._refuse(batch[0], Outcome.FULL, FULL, homes)
            return
        half = (len(batch) + 1) // 2
        for part in (batch[:half], batch[half:]):
            kept = [put for put in part if not self._hopeless(put, homes)]
            if kept:
                self._put_cut(shard, kept, homes, PIECE_PAGES[-1])

    # -- the end of a put

    def _finish(self, shard: Shard, batch: Sequence[PagePut], homes: Homes, error: str) -> None:
        """Settle pages whose transaction is over; remove their older copies elsewhere."""
        if not error:
            elsewhere = {put.key: tuple(s for s in homes.get(put.key, ()) if s is not shard) for put in batch}
            elsewhere = {key: places for key, places in elsewhere.items() if places}
            failed = {}
            if elsewhere:
                self._shelf.moves += 1
                failed = self._remover.delete(elsewhere)
            for put in batch:
                self._accept(put, failed.get(put.key, ""))
            return
        for put in batch:
            self._refuse(put, Outcome.FAULT, error, homes)

    def _accept(self, put: PagePut, error: str) -> None:
        self._refused.pop(put.key, None)
        pending = put.pending
        if error:
            pending.outcomes[put.at] = Outcome.FAULT
            pending.error = pending.error or error
        else:
            assert put.encoded is not None, "only encoded pages get here"
            pending.outcomes[put.at] = Outcome.OK
            pending.checksums[put.at] = put.encoded.checksum
            pending.charges[put.at] = put.charge_bytes
            self._stats.pages += 1
            self._stats.raw_bytes += put.raw_bytes
            self._stats.stored_bytes += put.encoded.record.nbytes
        pending.settle()

    def _refuse(self, put: PagePut, outcome: Outcome, error: str, homes: Homes) -> None:
        if not homes.get(put.key):  # nothing of it is stored: what follows it would be stranded
            if len(self._refused) >= _REFUSED_MAX:
                del self._refused[next(iter(self._refused))]
            self._refused[put.key] = outcome
        put.pending.outcomes[put.at] = outcome
        put.pending.error = put.pending.error or error
        self._stats.refused_pages += outcome is Outcome.FULL
        put.pending.settle()

    def forget_refusals(self) -> None:
        """Nothing is under way: whoever submits a page from now on knows what became of its parent."""
        self._refused.clear()
