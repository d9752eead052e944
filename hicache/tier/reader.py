"""Threads that read pages: straight from LMDB's map, decoded into the destination, verified.

A reader looks at the shards anew for every piece of a batch and lets go of them afterwards: a reader that lingers
would keep freed pages from being reused and make the file grow. A page that is not found while pages move
between shards is looked for again. A corrupt page goes to the writer, which removes it and then settles the
GET, so that "the page is gone" is true when the caller hears of it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from hicache.tier.codec import decode
from hicache.tier.ops import Purge
from hicache.tier.outbox import Pending
from hicache.tier.pieces import get_record
from hicache.tier.priority import background
from hicache.tier.shelf import Look
from hicache.types import Outcome

_log = logging.getLogger(__name__)

_PIECE_BYTES = 8 << 20
_Piece = tuple[Pending, range]


class Readers:
    """The reader threads, one queue. ``look``: a look at the shards, for pages of a size."""

    def __init__(self, look: Callable[[int], Look], count: int, *, purge: Callable[[Purge], None]) -> None:
        self._look = look
        self._purge = purge
        self._queue: queue.SimpleQueue[_Piece | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"hicache-disk-reader-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, pending: Pending) -> None:
        """Read a GET batch, in pieces so that every reader has some of a large one."""
        pages = len(pending.batch.keys)
        share = -(-pages // len(self._threads))
        step = max(1, min(share, _PIECE_BYTES // max(1, pending.batch.page_bytes)))
        for start in range(0, pages, step):
            self._queue.put((pending, range(start, min(start + step, pages))))

    def close(self) -> None:
        """Finish what was submitted, stop. Idempotent."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        background()
        while (piece := self._queue.get()) is not None:
            pending, positions = piece
            corrupt: list[int] = []
            try:
                with self._look(pending.batch.page_bytes) as look:
                    for at in positions:
                        outcome = _read(look, pending, at)
                        pending.outcomes[at] = outcome
                        if outcome is Outcome.CORRUPT:
                            corrupt.append(at)
            except Exception as exc:  # noqa: BLE001 - the loop's edge: the FAULT of the pages not read yet
                _log.exception("disk: a read failed")
                pending.error = f"{type(exc).__name__}: {exc}"
            if corrupt:
                self._purge(Purge(pending, tuple(corrupt)))
            pending.settle(len(positions) - len(corrupt))
            del piece, pending


def _read(look: Look, pending: Pending, at: int) -> Outcome:
    while True:
        outcome = _read_once(look, pending, at)
        if outcome is not Outcome.MISS or not look.outdated:
            return outcome
        look.renew()


def _read_once(look: Look, pending: Pending, at: int) -> Outcome:
    batch = pending.batch
    key = bytes(batch.keys[at])
    for shard in look.shards:
        record = get_record(look.txn(shard), shard.db, key)
        if record is None:
            continue
        found = decode(record, key, batch.buffers[at])
        if found.outcome is Outcome.OK:
            pending.checksums[at] = found.checksum
        else:
            _log.warning("disk: page %s is corrupt: %s", key.hex(), found.kind.value)
        return found.outcome
    return Outcome.MISS
