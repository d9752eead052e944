"""What the engine counts: plain ints, read by the shells."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since the start. Pages unless the name says otherwise."""

    tiers: int
    pages: list[list[int]] = dataclasses.field(default_factory=list)  # [tier][residency]: pages now
    hit_pages: list[int] = dataclasses.field(default_factory=list)  # by tier, served by Fetch
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
        for name in ("hit_pages", "evicted_pages", "dropped_pages", "corrupt_pages", "failed_copy_pages"):
            setattr(self, name, [0] * count)
