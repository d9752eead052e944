"""Which segments of a slotted tier are being read or written, so that none is closed under a copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from hicache.types import SLOTS_PER_SEGMENT


class BusySegments:
    """Counts, for each segment, who moves its pages: batches of the store, and transfers that go past it."""

    def __init__(self) -> None:
        self._moving: Counter[int] = Counter()
        self._closing: dict[int, Callable[[], None]] = {}

    def take(self, slots: Sequence[int]) -> None:
        """Somebody moves pages of these slots, until ``leave`` with the same ones."""
        for segment in _segments(slots):
            self._moving[segment] += 1

    def leave(self, slots: Sequence[int]) -> None:
        """Undo one ``take``; what waited for a segment to be idle is done now."""
        for segment in _segments(slots):
            self._moving[segment] -= 1
            if not self._moving[segment]:
                del self._moving[segment]
                closing = self._closing.pop(segment, None)
                if closing is not None:
                    closing()

    def when_idle(self, segment: int, close: Callable[[], None]) -> None:
        """``close`` is called when nobody moves the segment's pages, perhaps at once."""
        if self._moving[segment]:
            self._closing[segment] = close
        else:
            close()


def _segments(slots: Sequence[int]) -> set[int]:
    """Nearly always one: then without an object a slot."""
    if not len(slots):
        return set()
    first, last = min(slots) // SLOTS_PER_SEGMENT, max(slots) // SLOTS_PER_SEGMENT
    return {first} if first == last else {slot // SLOTS_PER_SEGMENT for slot in slots}
