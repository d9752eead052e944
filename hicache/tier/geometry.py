"""How a capacity is divided: shards, the reserve, the quarantine, and what else the folder holds. Pure.

``capacity_bytes`` is what ``du`` shows. Small capacities are one shard for pages of any size: a reserve would
cost too much of them. Larger ones are 8 shards, with the capacity 16 or more, never more than 64, and one shard's
room stays free (the reserve), so that the live pages of any shard can be moved and its file given back.

What is usable. A page goes into one shard, so shards may be left with less room than a page each. As long as what
is stored leaves as many pages' room as there are shards, one of them has room for a page, in pieces if need be:
``usable_bytes`` leaves that much, for pages of up to ``PROMISED_BYTES`` or a 64th of the capacity.
"""

from __future__ import annotations

import dataclasses

from hicache.tier.rows import DISK_PAGE_BYTES

#: Part of the maps that charges may fill; the rest is head-room for fragmentation and copy-on-write.
USABLE_PART = 0.85
#: Puts beyond this part of a map are refused: deletes need free pages, too, for copy-on-write.
FILL_LIMIT = 0.95
#: And beyond this much before its end: a small delete copies some six pages of the trees and of the list of free
#: pages, and these come back two commits later.
COPY_BYTES = 128 << 10
#: From this capacity on there are several shards.
SEVERAL_FROM_BYTES = 256 << 20
#: SHARD, lock.mdb and the folder of one shard.
SHARD_FILES_BYTES = 32 << 10
#: Below this a shard is not worth its files.
MIN_SHARD_BYTES = 512 << 10
#: Lock, FORMAT, STATE and its replacement, folders, the file a probe writes; file-system metadata by the size.
PROBE_BYTES = 32 << 10
_OTHER_FILES_BYTES = (96 << 10) + PROBE_BYTES
_METADATA_PART = 1024
_QUARANTINE_PART = 64
_SHARDS_MIN, _SHARDS_MAX = 16, 64
#: Small capacities are fewer shards, so that a page of the promised size is an eighth to a tenth of one.
_SHARDS_FEW, _FEW_BYTES = 8, 80 << 20
#: A page of up to this size, or a 64th of the capacity, finds room until ``usable_bytes``.
PROMISED_BYTES, PROMISED_PART = 8 << 20, 64
_PROMISED_SLACK_PART = 32  # a record's header, its place in the trees, and pieces
_SHARD_BYTES_MAX = 4 << 30  # until 64 of them do not suffice
#: A shard of large pages holds at least this many, if a quarter of the capacity allows.
_CLASS_PAGES = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """What the parts may take. ``data_bytes``: maps and the files beside them, the reserve included."""

    data_bytes: int
    shard_bytes: int
    reserve_bytes: int
    quarantine_bytes: int
    promised_bytes: int  # charge of the largest page that finds room until ``usable_bytes``

    @property
    def several(self) -> bool:
        """Whether pages are kept apart by size class."""
        return self.reserve_bytes > 0

    @property
    def usable_bytes(self) -> int:
        """The sum of charges up to which pages find room."""
        shards, rest = divmod(self.data_bytes - self.reserve_bytes, self.shard_bytes + SHARD_FILES_BYTES)
        last = self.map_bytes(0, rest)
        maps = shards * self.shard_bytes + last
        shards = max(1, shards + bool(last))
        limits = min(int(maps * FILL_LIMIT), maps - shards * COPY_BYTES * 5 // 4)
        return min(int(maps * USABLE_PART), limits - (shards - 1) * self.promised_bytes)

    def map_bytes(self, size_class_bytes: int, free_bytes: int) -> int:
        """Map of a new shard for a class when so many bytes are free for it and its files; 0: not worth it."""
        wanted = max(self.shard_bytes, min(size_class_bytes * _CLASS_PAGES, self.data_bytes // 4))
        possible = _whole(min(wanted, free_bytes - SHARD_FILES_BYTES))
        least = max(MIN_SHARD_BYTES, self.shard_bytes // 4 if self.several else 0)
        return possible if possible >= min(least, self.shard_bytes) else 0


def divide(capacity_bytes: int, quarantine_bytes: int, shard_bytes: int = 0) -> Geometry:
    """The parts of a capacity. ``shard_bytes``: 0 chooses."""
    quarantine = min(quarantine_bytes, capacity_bytes // _QUARANTINE_PART)
    data = capacity_bytes - _OTHER_FILES_BYTES - capacity_bytes // _METADATA_PART - quarantine
    page = min(PROMISED_BYTES, capacity_bytes // PROMISED_PART)
    page += page // _PROMISED_SLACK_PART
    if not shard_bytes and capacity_bytes < SEVERAL_FROM_BYTES:
        return Geometry(data, _whole(data - SHARD_FILES_BYTES), 0, quarantine, page)
    few = data // max(_SHARDS_FEW, data // _FEW_BYTES)
    chosen = max(few, min(data // _SHARDS_MIN, _SHARD_BYTES_MAX), data // _SHARDS_MAX) - SHARD_FILES_BYTES
    size = _whole(min(shard_bytes or chosen, data // 2 - SHARD_FILES_BYTES))
    return Geometry(data, size, size + SHARD_FILES_BYTES, quarantine, page)


def _whole(size: int) -> int:
    return max(0, size) // DISK_PAGE_BYTES * DISK_PAGE_BYTES
