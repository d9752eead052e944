"""A clock that counts uses, whatever the caller's ticks are.

Ticks order uses, but how much lies between two of them is the caller's choice: a counter, or the time of day. Ages are
counted in steps: one for each use of the pool. A fetch and the store that follows it in the next tick are one use.

A tick before the latest (a page that was used before a restart) lies as many steps back as that time took on
average.
"""

from __future__ import annotations

_START = 1 << 20  # room for what is older than the clock
_TRUSTED = 64  # steps after which the average counts
_SHIFT = 18  # until then: ticks to a step, as a power of two


class StepClock:
    """``step``: where it stands. It never goes back and never falls below 0."""

    __slots__ = ("_first", "_stepped", "now", "step")

    def __init__(self) -> None:
        self.step = _START
        self.now: int | None = None  # the latest tick
        self._first = 0
        self._stepped = 0

    def tell(self, now: int) -> int:
        """The step of a use at that tick. O(1)."""
        if self.now is None:
            self._first = self._stepped = self.now = now
        elif now > self.now:
            self.now = now
            if now > self._stepped + 1:
                self._stepped = now
                self.step += 1
        elif now < self.now:
            return self._back(self.now - now)
        return self.step

    def _back(self, ticks: int) -> int:
        assert self.now is not None
        taken = self.step - _START
        steps = ticks >> _SHIFT if taken < _TRUSTED else ticks * taken // max(1, self.now - self._first)
        return max(0, self.step - steps)
