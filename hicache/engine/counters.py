"""What the engine counts: plain ints, read by the shells."""

from __future__ import annotations

import dataclasses

_BY_TIER = (
    "hit_pages",
    "hit_bytes",
    "admitted_pages",
    "refused_pages",
    "evicted_pages",
    "dropped_pages",
    "corrupt_pages",
    "failed_copy_pages",
)


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since the start. Pages unless the name says otherwise."""

    tiers: int
    pages: list[list[int]] = dataclasses.field(default_factory=list)  # [tier][residency]: pages now
    hit_pages: list[int] = dataclasses.field(default_factory=list)  # by tier, served by Fetch
    hit_bytes: list[int] = dataclasses.field(default_factory=list)  # the same in bytes
    admitted_pages: list[int] = dataclasses.field(
        default_factory=list
    )  # by lower tier, of those admission was asked
    refused_pages: list[int] = dataclasses.field(
        default_factory=list
    )  # by lower tier, not worth writing to it
    missed_pages: int = 0  # asked for by Fetch and not cached
    copied_pages: list[list[int]] = dataclasses.field(default_factory=list)  # [from][to]
    copied_bytes: list[list[int]] = dataclasses.field(default_factory=list)  # [from][to]
    committed_pages: int = 0
    committed_bytes: int = 0
    already_present_pages: int = 0
    evicted_pages: list[int] = dataclasses.field(default_factory=list)  # left a tier, still in another
    dropped_pages: list[int] = dataclasses.field(default_factory=list)  # left their last tier, by that tier
    unsaved_dropped_pages: int = 0  # of those: dropped under pressure although a lower tier is configured
    corrupt_pages: list[int] = dataclasses.field(default_factory=list)  # by tier
    failed_copy_pages: list[int] = dataclasses.field(default_factory=list)  # by destination tier
    recovered_pages: int = 0
    revived_pages: int = 0  # were stranded, and hang in the tree again
    prefetched_pages: int = 0  # promoted for look-ups
    used_prefetched_pages: int = 0  # of those: a Fetch came for them
    unused_prefetched_pages: int = 0  # of those: left the leases' tier before one came
    skipped_prefetches: int = 0  # look-ups for which there was no bandwidth
    rescued_pages: int = 0
    refused_calls: int = 0
    waited_calls: int = 0
    fetches: int = 0
    reserves: int = 0
    commits: int = 0
    expired_leases: int = 0
    expired_reservations: int = 0
    lost_sessions: int = 0
    reclaimed_segments: int = 0

    def __post_init__(self) -> None:
        """Make the per-tier columns."""
        count = self.tiers
        self.pages = [[0, 0, 0, 0] for _ in range(count)]
        self.copied_pages = [[0] * count for _ in range(count)]
        self.copied_bytes = [[0] * count for _ in range(count)]
        for name in _BY_TIER:
            setattr(self, name, [0] * count)

    def written_bytes(self, tier: int) -> int:
        """Raw bytes written to a tier, by commits or copies."""
        copied = sum(column[tier] for column in self.copied_bytes)
        return copied if tier else copied + self.committed_bytes
