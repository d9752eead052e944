"""Bounds: what no policy can beat, and what one that sees a little of the future would do.

Block ids are prefix-chained, so a block's next use is never later than that of a block behind it. Belady's rule with
the deepest first among equals therefore never takes a block before those behind it, and its hits are prefix hits: it
bounds every leaf-first policy. Working on blocks instead of runs, an oracle needs no tree.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

NEVER = 1 << 60

Requests = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """Hits out of blocks asked for."""

    hits: int
    blocks: int

    @property
    def ratio(self) -> float:
        """Hits over blocks."""
        return self.hits / self.blocks if self.blocks else 0.0


def unbounded(requests: Requests) -> Bound:
    """What a pool hits that never evicts."""
    seen: set[int] = set()
    blocks = 0
    for request in requests:
        blocks += len(request)
        seen.update(request)
    return Bound(blocks - len(seen), blocks)


def belady(requests: Requests, capacity: int, *, bypass: bool = False, pinned: bool = True) -> Bound:
    """Belady, "A study of replacement algorithms", 1966: the block used again last leaves first.

    ``pinned``: blocks of the request under way stay, and what finds no room is not stored. ``bypass``: a block that
    comes back later than any that would have to leave for it is not stored, nor what hangs behind it.
    """
    return _Oracle(requests, capacity, lookahead=NEVER).run(bypass=bypass, pinned=pinned)


def lookahead(requests: Requests, capacity: int, horizon: int) -> Bound:
    """Belady that sees the next ``horizon`` requests, and is LRU among the blocks that are not in them."""
    return _Oracle(requests, capacity, lookahead=horizon).run(bypass=False, pinned=True)


class _Oracle:
    """One replay. A block's place is (next use, last first; last use, oldest first; depth, deepest first)."""

    def __init__(self, requests: Requests, capacity: int, lookahead: int) -> None:
        self._requests = requests
        self._capacity = capacity
        self._lookahead = lookahead
        self._uses = _next_uses(requests)
        self._place: dict[int, tuple[int, int, int, int]] = {}
        self._queue: list[tuple[int, int, int, int]] = []

    def run(self, *, bypass: bool, pinned: bool) -> Bound:
        """All requests in turn."""
        hits = blocks = 0
        for now, request in enumerate(self._requests):
            if self._lookahead < NEVER:
                self._foresee(now)
            found = next((at for at, block in enumerate(request) if block not in self._place), len(request))
            hits += found
            blocks += len(request)
            uses = self._uses[now]
            later = []  # what is pinned now is no candidate before the next request
            for depth, block in enumerate(request):
                place = (-uses[depth] if uses[depth] - now <= self._lookahead else -NEVER, now, -depth, block)
                if depth >= found and not self._admit(place, bypass=bypass):
                    break
                self._place[block] = place
                if pinned:
                    later.append(place)
                else:
                    heapq.heappush(self._queue, place)
            for place in later:
                heapq.heappush(self._queue, place)
        return Bound(hits, blocks)

    def _foresee(self, now: int) -> None:
        """The request that comes into sight gives its blocks a time."""
        ahead = now + self._lookahead
        if ahead < len(self._requests):
            for depth, block in enumerate(self._requests[ahead]):
                old = self._place.get(block)
                if old is not None and old[0] == -NEVER:
                    self._place[block] = place = (-ahead, old[1], -depth, block)
                    heapq.heappush(self._queue, place)

    def _admit(self, place: tuple[int, int, int, int], *, bypass: bool) -> bool:
        """Whether the block may be stored; makes room."""
        if len(self._place) < self._capacity:
            return True
        while self._queue:
            victim = heapq.heappop(self._queue)
            if self._place.get(victim[3]) is victim:
                break
        else:
            return False
        if bypass and place[0] <= victim[0]:
            heapq.heappush(self._queue, victim)
            return False
        del self._place[victim[3]]
        return True


def _next_uses(requests: Requests) -> list[list[int]]:
    """For each block of each request the number of the next request with it."""
    following: dict[int, int] = {}
    uses: list[list[int]] = []
    for now in range(len(requests) - 1, -1, -1):
        uses.append([following.get(block, NEVER) for block in requests[now]])
        for block in requests[now]:
            following[block] = now
    uses.reverse()
    return uses
