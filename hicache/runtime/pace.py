"""How fast promotions really are, tier by tier, so that an engine can choose between waiting and computing again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hicache.engine.actions import FetchResult
    from hicache.runtime.ports import TierPort

#: A period of work counts by this share; periods before it by the rest.
NEWEST_SHARE = 0.3
#: Work is averaged over periods of at least this length, so that small copies do not make the figure jump.
PERIOD_NS = 20_000_000


class Pace:
    """Bytes per second while at least one promotion from a tier is under way: a moving average."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0  # 0: not measured yet
        self.in_flight_bytes = 0
        self._busy_ns = 0
        self._moved_bytes = 0
        self._since_ns = 0

    def begin(self, size_bytes: int, now_ns: int) -> None:
        """A copy has started."""
        self._count(now_ns)
        self.in_flight_bytes += size_bytes

    def end(self, size_bytes: int, moved_bytes: int, now_ns: int) -> None:
        """It has ended; so much of it arrived."""
        self._count(now_ns)
        self.in_flight_bytes -= size_bytes
        self._moved_bytes += moved_bytes
        if self._moved_bytes and (self._busy_ns >= PERIOD_NS or not self.bytes_per_s):
            rate = self._moved_bytes * 1e9 / max(self._busy_ns, 1)
            before = self.bytes_per_s or rate
            self.bytes_per_s = before + NEWEST_SHARE * (rate - before)
            self._busy_ns = self._moved_bytes = 0

    def _count(self, now_ns: int) -> None:
        if self.in_flight_bytes:
            self._busy_ns += now_ns - self._since_ns
        self._since_ns = now_ns

    def wait_ms(self, size_bytes: int) -> int:
        """How long so many bytes will take, at least as long as what is under way already; 0: not measured yet."""
        if not self.bytes_per_s:
            return 0
        return max(int(max(size_bytes, self.in_flight_bytes) * 1000 / self.bytes_per_s), 1)


def pending(ports: Sequence[TierPort], result: FetchResult) -> tuple[int, int]:
    """Pages of a lease that are still on their way, and in how many ms the last may be there.

    By the measured pace of the slowest tier that they come from. 0 ms: nothing is pending, or nothing was promoted
    from there yet.
    """
    if not result.operation:
        return 0, 0
    pages = result.matched_pages - result.granted_pages
    sources = [
        port.pace
        for port, served in zip(ports, result.tier_pages, strict=True)
        if served and port.index != result.tier
    ]
    size_bytes = pages * result.page_bytes
    return pages, max((pace.wait_ms(size_bytes) for pace in sources), default=0)
