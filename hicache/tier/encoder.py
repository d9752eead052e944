"""Encode pages on threads, first in, first out, with a bound on what is encoded and not yet written."""

from __future__ import annotations

import logging
import threading
from collections import deque

from hicache.tier.codec import Encoded, PageCodec
from hicache.tier.outbox import Pending
from hicache.tier.priority import background
from hicache.types import PageRecord

_log = logging.getLogger(__name__)


class PagePut:
    """One page on its way to the writer. ``ready`` is set when ``encoded`` or ``error`` is."""

    __slots__ = (
        "at",
        "charge_bytes",
        "codec",
        "encoded",
        "error",
        "key",
        "pending",
        "ready",
        "record",
    )

    def __init__(self, pending: Pending, at: int, record: PageRecord | None, codec: PageCodec) -> None:
        self.pending = pending
        self.at = at
        self.key = bytes(pending.batch.keys[at])
        self.record = record
        self.codec = codec
        self.encoded: Encoded | None = None
        self.error = ""
        self.charge_bytes = 0  # set by the writer
        self.ready = threading.Event()

    @property
    def raw_bytes(self) -> int:
        """Size of the page."""
        return self.pending.batch.page_bytes

    @property
    def rejected(self) -> bool:
        """The source is not what its checksum says."""
        sums = self.pending.batch.checksums
        return bool(sums) and self.encoded is not None and self.encoded.source_checksum != sums[self.at]


class Encoder:
    """The compress threads. Pages are admitted in order: the one the writer waits for is never behind."""

    def __init__(self, workers: int, backlog_bytes: int) -> None:
        self._backlog_bytes = backlog_bytes
        self._held_bytes = 0
        self._queue: deque[PagePut] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"hicache-encode-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, puts: list[PagePut]) -> None:
        """Queue pages for encoding."""
        with self._wake:
            self._queue.extend(puts)
            self._wake.notify(len(puts))

    def release(self, raw_bytes: int) -> None:
        """The writer is done with that many bytes of pages."""
        with self._wake:
            self._held_bytes -= raw_bytes
            self._wake.notify_all()

    def close(self) -> None:
        """Finish the queue, stop. The writer must still be running. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> PagePut | None:
        with self._wake:
            while True:
                if self._queue:
                    size = self._queue[0].raw_bytes
                    if not self._held_bytes or self._held_bytes + size <= self._backlog_bytes:
                        self._held_bytes += size
                        return self._queue.popleft()
                elif self._closed:
                    return None
                self._wake.wait()

    def _run(self) -> None:
        background()
        while (put := self._next()) is not None:
            try:
                page = put.pending.batch.buffers[put.at]
                put.encoded = put.codec.encode(page, put.key)
            except Exception as exc:  # noqa: BLE001 - the loop's edge: becomes the page's FAULT
                _log.exception("disk: encoding failed")
                put.error = f"{type(exc).__name__}: {exc}"
            put.ready.set()
            del put
