"""A policy of one's own, to copy and change: LRU that lets deep runs go first.

    hicache policy check py:policy_template:MyPolicy       (from the folder of this file)
    hicache serve --policy py:policy_template:MyPolicy ... (with the folder in PYTHONPATH)

``SegmentedPolicy`` keeps the records, the queues and the plans; what is left is where a run stands. Smaller ranks leave
first, of equal ones the deepest. For a policy with several queues, or one that remembers pages that have left, see
``hicache/policy/two_queue.py``; for the contract itself ``hicache/policy/base.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from hicache.policy.base import RunInfo
from hicache.policy.segments import SegmentedPolicy, Tally


class MyPolicy(SegmentedPolicy):
    """Each page of depth makes a run older by ``pull`` ticks."""

    def __init__(self, pull: float = 0.5) -> None:
        super().__init__()
        self.pull = pull

    def rank(self, record: Tally) -> int:
        """Smaller leaves first; never below zero."""
        return max(0, record.last - int(self.pull * record.depth))

    def welcome(self, record: Tally, info: RunInfo, ghosts: Sequence[int]) -> None:
        """A run has arrived: ``record`` is new, ``record.last`` is now."""
        record.place(self.rank(record))

    def hit(self, run: int, now: int) -> None:
        """A run was used."""
        record = self.find(run)
        record.last = max(now, record.last)
        self.move(record, 0, self.rank(record))
