"""What the shell counts itself, beside the engine's counters: durations of calls, and its own failures."""

from __future__ import annotations

import dataclasses
import math

BUCKETS_PER_OCTAVE = 4  # a bucket is 19 % wide
OCTAVES = 27  # 1 us .. 134 s
_BUCKETS = OCTAVES * BUCKETS_PER_OCTAVE


@dataclasses.dataclass(frozen=True, slots=True)
class CallLatency:
    """Calls of one name since the start; quantiles are upper bounds of their bucket."""

    call: str
    count: int
    p50_ms: float
    p99_ms: float


class Histogram:
    """Counts durations in logarithmic buckets; a few hundred nanoseconds each."""

    __slots__ = ("counts", "total_ns")

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS
        self.total_ns = 0

    def observe(self, duration_ns: int) -> None:
        """Count one."""
        bucket = int(math.log2(max(duration_ns / 1000, 1.0)) * BUCKETS_PER_OCTAVE)
        self.counts[min(bucket, _BUCKETS - 1)] += 1
        self.total_ns += duration_ns

    def quantile_ms(self, share: float) -> float:
        """The upper bound of the bucket in which this share of the calls is reached; 0 without calls."""
        rank = share * sum(self.counts)
        seen = 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return float(2 ** ((bucket + 1) / BUCKETS_PER_OCTAVE)) / 1000
        return 0.0

    def octaves(self) -> list[tuple[float, int]]:
        """(upper bound in seconds, calls up to it), one entry for each doubling."""
        found = []
        seen = 0
        for octave in range(OCTAVES):
            seen += sum(self.counts[octave * BUCKETS_PER_OCTAVE : (octave + 1) * BUCKETS_PER_OCTAVE])
            found.append((2.0 ** (octave + 1) / 1e6, seen))
        return found


class Latencies:
    """One histogram for each name of a call."""

    def __init__(self) -> None:
        self.calls: dict[str, Histogram] = {}

    def observe(self, call: str, duration_ns: int) -> None:
        """Count one call."""
        histogram = self.calls.get(call)
        if histogram is None:
            histogram = self.calls[call] = Histogram()
        histogram.observe(duration_ns)

    def snapshot(self) -> list[CallLatency]:
        """All calls seen so far, by name."""
        return [
            CallLatency(call, sum(found.counts), found.quantile_ms(0.5), found.quantile_ms(0.99))
            for call, found in sorted(self.calls.items())
        ]
