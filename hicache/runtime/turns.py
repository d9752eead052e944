"""The owner's thread in short turns: what has finished is handed out a little at a time, so that no call waits long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

#: A turn ends with the first result that is handed out after so long. One result takes up to a millisecond.
TURN_NS = 200_000
#: What comes after so long a calm is done at once, and what comes within so short a time behind it.
CALM_NS, AT_ONCE_NS = 20_000_000, 50_000


class Turn:
    """Whether it is time to let others have theirs."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._until_ns = now_ns() + TURN_NS

    def over(self) -> bool:
        """Asked after each result, so that every turn gets something done."""
        return self._now_ns() > self._until_ns


class Turns:
    """Hands out from several sources by turns; each goes on where the last one had to stop.

    ``again``: asks for another turn, later.
    """

    def __init__(
        self,
        sources: Sequence[Callable[[Turn], int]],
        now_ns: Callable[[], int],
        again: Callable[[], None],
    ) -> None:
        self._sources = deque(sources)
        self._now_ns = now_ns
        self._again = again

    def take(self) -> None:
        """One turn."""
        turn = Turn(self._now_ns)
        for _ in range(len(self._sources)):
            self._sources[0](turn)
            self._sources.rotate(-1)
            if turn.over():
                self._again()
                return


class Backlog:
    """Things to do, in order: at once after a calm, else by turns, which ``ring`` asks for."""

    def __init__(self, ring: Callable[[], None], now_ns: Callable[[], int]) -> None:
        self._ring = ring
        self._now_ns = now_ns
        self._since_ns = -CALM_NS  # when something was last done at once, the first of a row
        self._calls: deque[Callable[[], None]] = deque()

    def add(self, call: Callable[[], None]) -> None:
        """It is done at once, or soon; behind all that was added before."""
        spent_ns = self._now_ns() - self._since_ns
        if spent_ns >= CALM_NS:
            self._since_ns += spent_ns
        if not self._calls and (spent_ns < AT_ONCE_NS or spent_ns >= CALM_NS):
            call()
        else:
            self._calls.append(call)
            self._ring()

    def poll(self, turn: Turn | None = None) -> int:
        """Do what is there, or as much as a turn takes; returns how much that was."""
        found = 0
        while self._calls:
            self._calls.popleft()()
            found += 1
            if turn is not None and turn.over():
                break
        return found
