"""What the writer does between two groups: shards are emptied and given back, in small steps.

    a smaller capacity     until the files fit; puts wait for that. Pages that are too many, coldest leaves
                           first, are for the runtime to delete after its recovery; what is then still too
                           much is removed here
    a class without room   while a shard of another class would fit into its siblings
    pages of any size      a shard of version 1, or of a capacity that was small, becomes shards of one size each
    fragmentation          a shard that has room by its figures and no place for a whole record
    ``compact``            shards whose files are much larger than what lives in them

The reserve, one shard's room inside the bound, makes each of them possible. Nothing is moved while a
recovery reads.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from hicache.tier.attempts import Attempts
from hicache.tier.evacuate import Evacuation
from hicache.tier.geometry import SHARD_FILES_BYTES, USABLE_PART
from hicache.tier.lmdb_env import DATA
from hicache.tier.ops import WriterStats
from hicache.tier.remove import Remover
from hicache.tier.shelf import Shard, Shelf
from hicache.tier.smallfile import du_bytes

_log = logging.getLogger(__name__)

#: Emptying must leave the others this much of their room.
_FIT_PART = 0.9
#: Times a shard must have had no place for a whole record before it is written anew.
_FRAGMENTED_AFTER = 3
#: A file that is larger than its live data by this factor is worth compacting.
_SPARSE_FACTOR = 1.25
_SPARSE_BYTES = 1 << 20


class Counter:
    """A number that several threads change."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, amount: int) -> None:
        """Change it."""
        with self._lock:
            self.value += amount


class Upkeep:
    """Decides what is emptied, and does it step by step. For the writer's thread only."""

    def __init__(
        self,
        shelf: Shelf,
        attempts: Attempts,
        remover: Remover,
        *,
        stats: WriterStats,
        surplus: Callable[[int], list[bytes]],
    ) -> None:
        self._shelf = shelf
        self._attempts = attempts
        self._remover = remover
        self._stats = stats
        self._surplus = surplus
        self._evacuation: Evacuation | None = None
        self._queue: deque[int] = deque()  # shards to empty, by number
        self._what = ""
        self.recoveries = Counter()  # readers of everything; nothing is moved meanwhile
        self.too_large = shelf.free_bytes < 0
        self.gave_up = ""
        self._free_before = shelf.free_bytes - 1
        self._target_bytes = shelf.geometry.usable_bytes
        self._split_bytes = 1 << 62  # a mixed shard that holds more is left as it is

    @property
    def holds_puts(self) -> bool:
        """Whether puts must wait because the files are still larger than the capacity."""
        return self.too_large and not self.gave_up

    @property
    def busy(self) -> bool:
        """Whether ``step`` has something to do."""
        return not self.recoveries.value and (
            self._evacuation is not None or bool(self._queue) or self.holds_puts
        )

    def progress(self) -> str:
        """What is going on; empty when nothing is."""
        if self.too_large:
            over = -self._shelf.free_bytes
            what = f"shrinking: {max(0, over)} bytes over the capacity"
        elif self._evacuation is None and not self._queue:
            return ""
        else:
            what = self._what
        evacuation = self._evacuation
        if evacuation is not None:
            what += f", shard {evacuation.source.info.number}: {evacuation.source.used_bytes} bytes left"
        return f"{what} ({self.gave_up})" if self.gave_up else what

    # -- what to start

    def wanted(self, size_class: int) -> bool:
        """A class needs a shard: start to empty one of another class if its siblings have room for it."""
        if self._evacuation is not None or self._queue or self.recoveries.value:
            return False
        candidates = [s for s in self._shelf.shards if s.info.size_class_bytes != size_class]
        source = min(candidates, key=lambda s: s.used_bytes, default=None)
        if source is None or source.used_bytes > self._sibling_room(source) * _FIT_PART:
            return False
        self._what = "making room for another page size"
        self._start(source)
        return True

    def note_mixed(self) -> None:
        """Take a shard of pages of any size apart, once what lives in it fits elsewhere, the reserve included."""
        shelf = self._shelf
        if self.busy or self.recoveries.value or not shelf.geometry.several:
            return
        for shard in shelf.shards:
            if shard.info.size_class_bytes or shard.leaving or shard.used_bytes > self._split_bytes:
                continue
            room = sum(s.room_bytes for s in shelf.shards if s is not shard)
            room += int(max(0, shelf.free_bytes) * USABLE_PART)
            if shard.used_bytes <= room * _FIT_PART:
                self._what = "taking a file of mixed page sizes apart"
                self._start(shard)
                return

    def note_fragmented(self) -> None:
        """Write shards anew that have room and no place, if the reserve is there."""
        if self._evacuation is not None or self._queue or not self._shelf.geometry.several:
            return
        for shard in self._shelf.shards:
            if shard.map_full >= _FRAGMENTED_AFTER and shard.file_bytes <= self._shelf.free_bytes:
                self._what = "compacting a fragmented shard"
                self._start(shard)
                return

    def compact(self) -> None:
        """Queue every shard whose file is much larger than what lives in it."""
        for shard in self._shelf.shards:
            size = du_bytes(shard.info.path / DATA)
            if size > shard.used_bytes * _SPARSE_FACTOR + _SPARSE_BYTES:
                self._queue.append(shard.info.number)
        self._what = "compacting"

    def drop_copies(self, copies: Sequence[tuple[Shard, bytes]]) -> None:
        """Remove what a crash left in a second shard."""
        homes = self._remover.locate({key for _, key in copies})
        for shard, key in copies:  # what happened since may have left one copy only, this one
            if shard in homes[key] and len(homes[key]) > 1:
                self._remover.delete({key: (shard,)})

    def resume(self) -> None:
        """A recovery ended."""
        self.recoveries.add(-1)
        self.note_mixed()

    # -- steps

    def step(self) -> None:
        """Do a little."""
        if self._evacuation is None:
            self._next()
        evacuation = self._evacuation
        if evacuation is None:
            return
        evacuation.step()
        if evacuation.stuck and not evacuation.done:
            _log.warning("disk: shard %d stays: %s", evacuation.source.info.number, evacuation.stuck)
            evacuation.abandon()
            if not evacuation.source.info.size_class_bytes:
                self._split_bytes = evacuation.source.used_bytes * 7 // 8
            self._evacuation = None
            if self.too_large:
                self.gave_up = evacuation.stuck
        elif evacuation.done:
            self._evacuation = None

    def retry(self) -> None:
        """Time has passed: what could not be done may work now."""
        self._attempts.run(self._shelf.clear_leftovers)
        self.gave_up = ""
        self._free_before = self._shelf.free_bytes - 1
        self.note_mixed()

    def _next(self) -> None:
        if self.too_large:
            self._shrink()
            return
        while self._queue and self._evacuation is None:
            number = self._queue.popleft()
            for shard in self._shelf.shards:
                if shard.info.number == number and not shard.leaving:
                    self._start(shard)

    def _shrink(self) -> None:
        """The next shard to empty so that the files fit; after the pages that are too many are gone."""
        if self._shelf.free_bytes >= 0:
            self.too_large = False
            _log.info("disk: the files are within the capacity again")
            return
        if self._shelf.free_bytes <= self._free_before:
            self._target_bytes = self._target_bytes * 9 // 10  # what lives on is too scattered: fewer pages
        doomed = self._surplus(self._target_bytes) if self._shelf.used_bytes > self._target_bytes else []
        self._free_before = self._shelf.free_bytes
        if doomed:
            failed = self._remover.delete(self._remover.locate(doomed))
            self.gave_up = next(iter(failed.values()), "")
            self._free_before -= 1  # nothing was given back yet
            return
        shards = self._shelf.shards
        largest = max(shards, key=lambda s: s.file_bytes)
        if largest.file_bytes > self._shelf.geometry.data_bytes:
            self._start(largest)
        else:
            self._start(min(shards, key=lambda s: s.used_bytes))

    def _start(self, source: Shard) -> None:
        self._evacuation = Evacuation(
            self._shelf,
            source,
            self._choose,
            attempts=self._attempts,
            remover=self._remover,
            stats=self._stats,
        )

    def _sibling_room(self, source: Shard) -> int:
        return sum(
            s.room_bytes
            for s in self._shelf.shards
            if s is not source and s.info.size_class_bytes == source.info.size_class_bytes
        )

    def _choose(self, source: Shard, size: int, size_class: int) -> Shard | None:
        """Where the next pages of a shard go: siblings if all fits there, else a new shard, else anywhere."""
        shelf = self._shelf
        others = [s for s in shelf.shards if s is not source and s.room_bytes >= size]
        siblings = [s for s in others if s.info.size_class_bytes == size_class]
        best = max(siblings, key=lambda s: s.room_bytes, default=None)
        apart = size_class != source.info.size_class_bytes
        fits = apart or self._sibling_room(source) * _FIT_PART >= source.used_bytes
        if best is not None and (fits or not best.used_bytes or self.too_large):
            return best
        free = shelf.free_bytes
        if self.too_large:  # for a while more than the capacity; no page is taken until the files fit
            free = shelf.geometry.shard_bytes + SHARD_FILES_BYTES
            anywhere = max(others, key=lambda s: s.room_bytes, default=None)
            if anywhere is not None:
                return anywhere
        map_bytes = shelf.geometry.map_bytes(size_class, free)
        if map_bytes:
            return shelf.create(size_class, map_bytes)
        return best or max(others, key=lambda s: s.room_bytes, default=None)
