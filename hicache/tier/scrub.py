"""A background reader that looks for rot before anybody asks for the page.

It walks every record of every environment in the order of the keys, verifies it as a read would, and hands what is
corrupt to the writer, which removes it as if a read had found it. It reads no faster than its rate, in small
transactions with pauses between them, so that no snapshot keeps freed pages from being used again. Where it was is
remembered in the folder (SCRUB), and a restart goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import lmdb

from hicache.keys import KEY_BYTES, MAX_PAGE_BYTES
from hicache.tier.examine import judge_record
from hicache.tier.pieces import get_record
from hicache.tier.priority import idle
from hicache.tier.shelf import Look

_log = logging.getLogger(__name__)

CURSOR_FILE = "SCRUB"
#: Bytes verified in one transaction; the pause after it makes the rate.
STEP_BYTES = 1 << 20
STEP_PAGES = 64
#: How often the place is written down, and how long an empty or finished store is left alone.
SAVE_STEPS = 64
REST_S = 60.0


@dataclasses.dataclass(slots=True)
class ScrubStats:
    """Since the start; written by the scrubber's thread only. ``last_pass_ms``: wall clock, 0 never."""

    pages: int = 0
    bytes: int = 0
    corrupt_pages: int = 0
    passes: int = 0
    last_pass_ms: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where to go on: after this key of this shard."""

    shard: int = 0
    key: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class ScrubOptions:
    """``bytes_per_s``: rate in stored bytes. ``file``: where the place is kept. ``wall_ms``: unix time."""

    bytes_per_s: int
    file: Path
    wall_ms: Callable[[], int] = lambda: 0


class Scrubber:
    """The thread. ``purge(key, raw_bytes)`` removes a page unless it has been replaced meanwhile."""

    def __init__(
        self, look: Callable[[], Look], purge: Callable[[bytes, int], None], options: ScrubOptions
    ) -> None:
        assert options.bytes_per_s > 0, "a rate of 0 means: make no scrubber"
        self._look = look
        self._purge = purge
        self._options = options
        self._stop = threading.Event()
        self._place = _load(options.file)
        self.stats = ScrubStats()
        self._thread = threading.Thread(target=self._run, name="hicache-disk-scrub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and remember the place. Idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        idle()
        try:
            while not self._stop.is_set():
                walked = self._pass()
                if walked and not self._stop.is_set():
                    self._place = Place()
                    self.stats.passes += 1
                    self.stats.last_pass_ms = self._options.wall_ms()
                    self._save()
                    _log.info(
                        "disk: scrub pass done, pages=%d corrupt=%d",
                        self.stats.pages,
                        self.stats.corrupt_pages,
                    )
                self._stop.wait(REST_S)
        finally:
            self._save()

    def _pass(self) -> bool:
        """From the place to the end; False when it was cut short."""
        steps = 0
        while True:
            before = self._place
            try:
                size = self._step()
            except lmdb.Error as exc:  # the trees of a shard are rotten: its readers will say so, too
                _log.warning("disk: the scrubber leaves shard %d: %s", self._place.shard, exc)
                self._place, size = Place(self._place.shard + 1), 0
            if self._place == before:
                return True
            steps += 1
            if steps % SAVE_STEPS == 0:
                self._save()
            if self._stop.wait(size / self._options.bytes_per_s):
                return False

    def _step(self) -> int:
        """Verify some pages, move the place; returns their stored bytes. The place stays where nothing is left."""
        size, pages = 0, 0
        corrupt: list[tuple[bytes, int]] = []
        with self._look() as look:
            left = [shard for shard in look.shards if shard.info.number >= self._place.shard]
            shard = min(left, key=lambda each: each.info.number, default=None)
            if shard is None:
                return 0
            number = shard.info.number
            last = self._place.key if number == self._place.shard else b""
            with look.txn(shard).cursor(db=shard.db.pages) as cursor:
                found = cursor.set_range(last + b"\0") if last else cursor.first()
                while found and size < STEP_BYTES and pages < STEP_PAGES and not self._stop.is_set():
                    last = bytes(cursor.key())
                    record = get_record(look.txn(shard), shard.db, last) or memoryview(b"")
                    size, pages = size + max(record.nbytes, 1), pages + 1
                    bad, header = judge_record(record, last)
                    if bad is not None and len(last) == KEY_BYTES:
                        sane = header is not None and header.raw_bytes <= MAX_PAGE_BYTES
                        corrupt.append((last, header.raw_bytes if header is not None and sane else 0))
                        _log.warning("disk: the scrubber found page %s %s", last.hex(), bad.fault.value)
                    del record
                    found = cursor.next()
        self._place = Place(number, last) if found or self._stop.is_set() else Place(number + 1)
        for key, raw_bytes in corrupt:
            self._purge(key, raw_bytes)
        self.stats.pages += pages
        self.stats.bytes += size
        self.stats.corrupt_pages += len(corrupt)
        return size

    def _save(self) -> None:
        new = self._options.file.with_name(f"{self._options.file.name}.new")
        try:
            new.write_text(json.dumps({"shard": self._place.shard, "key": self._place.key.hex()}))
            new.replace(self._options.file)
        except OSError as exc:
            _log.debug("disk: the scrubber's place could not be written: %s", exc)


def _load(file: Path) -> Place:
    """The place of an earlier run; the beginning for a file that is missing or garbage."""
    try:
        found = json.loads(file.read_bytes())
        return Place(int(found["shard"]), bytes.fromhex(found["key"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Place()
