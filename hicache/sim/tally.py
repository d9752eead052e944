"""What a replay counts: totals, a row for each stretch of requests (for intervals), and a histogram of TTFT.

Memory does not grow with the trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Stretches that a replay is cut into: enough to resample, few enough to keep in every result.
STRETCHES = 200
#: Columns of a stretch's row.
COLUMNS = ("requests", "asked", "hits", "saved_us", "computed_us", "ttft_us")

#: Buckets of the histogram a factor of e: neighbouring ones are 1 % apart.
_FINE = 100


class Histogram:
    """Durations, to 1 %."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._log = math.log

    def add(self, time_us: int) -> None:
        """Count one."""
        index = int(self._log(time_us) * _FINE) if time_us > 0 else -1
        self._counts[index] = self._counts.get(index, 0) + 1

    def quantile_us(self, share: float) -> float:
        """The duration that this share of all does not exceed; 0 where there are none."""
        total = sum(self._counts.values())
        rank = math.ceil(share * total)
        seen = 0
        for index in sorted(self._counts):
            seen += self._counts[index]
            if seen >= rank:
                return math.exp((index + 0.5) / _FINE) if index >= 0 else 0.0
        return 0.0


class Tally:
    """Counts requests after the warm-up. ``requests``: how many the trace has, ``warmup`` of them only warm the cache.

    A stretch holds the same requests in every replay of a trace, so that replays are compared stretch by stretch.
    """

    def __init__(self, requests: int, warmup: int, tiers: int) -> None:
        counted = max(requests - warmup, 1)
        self._size = -(-counted // STRETCHES)
        self.rows = [[0] * len(COLUMNS) for _ in range(-(-counted // self._size))]
        self.ttft = Histogram()
        self.hits_by_tier = [0] * tiers
        self.late_pages = 0  # matched, but not there in time
        self.refused_stores = 0
        self._next = -warmup

    def number(self) -> int:
        """Of the next request, in the order of the trace; negative in the warm-up."""
        self._next += 1
        return self._next - 1

    def add(
        self, number: int, asked: int, granted: int, *, saved_us: int, computed_us: int, ttft_us: int
    ) -> None:
        """One request: pages asked for and pages that it need not compute."""
        row = self.rows[number // self._size]
        row[0] += 1
        row[1] += asked
        row[2] += granted
        row[3] += saved_us
        row[4] += computed_us
        row[5] += ttft_us
        self.ttft.add(ttft_us)

    def add_tiers(self, tier_pages: Sequence[int]) -> None:
        """From where the pages of a request were served."""
        hits = self.hits_by_tier
        for tier, pages in enumerate(tier_pages):
            hits[tier] += pages

    def total(self, column: str) -> int:
        """Over all stretches."""
        index = COLUMNS.index(column)
        return sum(row[index] for row in self.rows)
