"""FIFO over runs: the run that came first goes first, whatever was hit since.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.segments import SegmentedPolicy, Tally


class FifoPolicy(SegmentedPolicy):
    """Ranks a run by its arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals = 0

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """Its first place."""
        self.arrivals += 1
        record.place(self.arrivals)

    def hit(self, run: int, now: int) -> None:
        """Nothing changes. O(1)."""
        self.find(run)
