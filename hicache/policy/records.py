"""Records of runs, and a queue of the exposed ones.

A run's place is ``(rank, -depth, run)``: smaller leaves first, and of two runs with one rank (touched by the
same request, or pieces of one run) the deeper one, so that a prefix outlives what hangs below it. The id only
makes the order total. The three are packed into one int, the *key*: with 100k runs the time of a heap
operation is that of its cache misses, and a tuple of ints has four times as many.
"""

from __future__ import annotations

import heapq

Key = int

_RUN_BITS = 64
_DEPTH_BITS = 40
_RUN_MASK = (1 << _RUN_BITS) - 1
_DEPTH_MASK = (1 << _DEPTH_BITS) - 1
_RANK_SHIFT = _RUN_BITS + _DEPTH_BITS

#: Below this many entries a queue is not worth cleaning.
SLACK_ENTRIES = 64


def run_of(key: Key) -> int:
    """The run that a key is of."""
    return key & _RUN_MASK


class Record:
    """One run as a policy knows it."""

    __slots__ = ("depth", "entry", "exposed", "newer", "older", "pages", "rank", "run", "visited")

    def __init__(self, run: int, pages: int, depth: int, rank: int) -> None:
        self.run = run
        self.pages = pages
        self.depth = depth
        self.rank = rank
        self.exposed = False
        self.entry: Key | None = None  # the one object in a queue that stands for this record
        self.visited = False
        self.newer: Record | None = None
        self.older: Record | None = None

    def place(self, rank: int) -> None:
        """Give the run its rank."""
        self.rank = rank

    @property
    def key(self) -> Key:
        """Its place. Made when it is looked at: most hits are of runs that no queue looks at before the next."""
        return ((self.rank << _DEPTH_BITS | _DEPTH_MASK - self.depth) << _RUN_BITS) | self.run


class Queue:
    """Exposed records, smallest key first.

    A heap with lazy deletion: hiding, hitting and forgetting a run leave its entry where it is. An entry at
    the top is dropped if its run is gone or hidden, and moved if the key has grown (keys never shrink).
    Every entry is taken out once and moved once a hit, so the cost is O(log n) amortised. A record has at
    most one entry, and ``clean`` bounds what forgotten ones leave behind, so there are never more entries
    than three times the records and ``SLACK_ENTRIES``.
    """

    def __init__(self, records: dict[int, Record]) -> None:
        self._records = records
        self._entries: list[Key] = []

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, record: Record) -> None:
        """Queue a record that has no entry."""
        record.entry = key = record.key
        heapq.heappush(self._entries, key)

    def peek(self) -> Record | None:
        """The first exposed record."""
        entries = self._entries
        while entries:
            entry = entries[0]
            record = self._records.get(entry & _RUN_MASK)
            if record is None or record.entry is not entry:
                heapq.heappop(entries)
            elif not record.exposed:
                record.entry = None
                heapq.heappop(entries)
            elif record.rank != entry >> _RANK_SHIFT:
                record.entry = key = record.key
                heapq.heapreplace(entries, key)
            else:
                return record
        return None

    def pop(self) -> None:
        """Take out what ``peek`` has just returned."""
        entry = heapq.heappop(self._entries)
        self._records[entry & _RUN_MASK].entry = None

    def clean(self) -> None:
        """Drop stale entries when they are the majority: O(entries), paid for by the entries that go."""
        if len(self._entries) <= 2 * len(self._records) + SLACK_ENTRIES:
            return
        kept = []
        for entry in self._entries:
            record = self._records.get(entry & _RUN_MASK)
            if record is not None and record.entry is entry:
                kept.append(entry)
        heapq.heapify(kept)
        self._entries = kept
