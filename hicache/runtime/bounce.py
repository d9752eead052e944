"""Bounds for copies under way: lanes (how many at a time) and bounce buffers (how much memory)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np


class Lane:
    """Lets ``limit`` in at a time, the others in the order in which they came."""

    def __init__(self, limit: int) -> None:
        assert limit > 0, "a lane that lets nobody in"
        self._limit = limit
        self._inside = 0
        self._waiting: deque[Callable[[], None]] = deque()
        self._admitting = False

    @property
    def waiting(self) -> int:
        """How many are not in yet."""
        return len(self._waiting)

    def enter(self, then: Callable[[], None]) -> None:
        """``then`` is called once there is room, perhaps at once. It must ``leave`` some time."""
        self._waiting.append(then)
        self._admit()

    def leave(self) -> None:
        """One is out; the next may come in."""
        assert self._inside > 0, "left a lane twice"
        self._inside -= 1
        self._admit()

    def _admit(self) -> None:
        # A loop, not recursion: who comes in may leave at once.
        if self._admitting:
            return
        self._admitting = True
        try:
            while self._waiting and self._inside < self._limit:
                self._inside += 1
                self._waiting.popleft()()
        finally:
            self._admitting = False


def page_buffer(size_bytes: int) -> memoryview:
    """Writable memory that is not cleared first."""
    return np.empty(size_bytes, dtype=np.uint8).data


class BouncePool:
    """Slabs of memory for pages in transit between two tiers that cannot see each other's memory.

    A slab is ``slab_bytes``, or one page where that is larger; it is made when it is first needed and kept.
    Waiting is first come, first served: chunks get their slabs in the order in which they were planned.
    """

    def __init__(self, slabs: int, slab_bytes: int) -> None:
        self._lane = Lane(slabs)
        self._slab_bytes = slab_bytes
        self._free: list[memoryview] = []

    @property
    def waiting(self) -> int:
        """How many chunks wait for a slab."""
        return self._lane.waiting

    def pages_per_slab(self, page_bytes: int) -> int:
        """How many pages one slab takes."""
        return max(1, self._slab_bytes // page_bytes)

    def take(self, pages: int, page_bytes: int, then: Callable[[Slab], None]) -> None:
        """``then`` gets a slab of at least this many pages when one is free; it must ``release`` it some time."""
        need = max(pages * page_bytes, self._slab_bytes)

        def enter() -> None:
            memory = self._free.pop() if self._free else page_buffer(need)
            if memory.nbytes < need:
                memory = page_buffer(need)
            then(Slab(self, memory, page_bytes))

        self._lane.enter(enter)

    def give_back(self, memory: memoryview) -> None:
        """A slab's memory, once."""
        if memory.nbytes == self._slab_bytes:
            self._free.append(memory)  # larger ones go: pages that large are rare, and would all be kept
        self._lane.leave()


class Slab:
    """Memory of one chunk in transit."""

    __slots__ = ("_memory", "_page_bytes", "_pool")

    def __init__(self, pool: BouncePool, memory: memoryview, page_bytes: int) -> None:
        self._pool = pool
        self._memory: memoryview | None = memory
        self._page_bytes = page_bytes

    def pages(self, count: int) -> list[memoryview]:
        """The first ``count`` page buffers."""
        assert self._memory is not None, "a slab was used after its release"
        size = self._page_bytes
        return [self._memory[at * size : (at + 1) * size] for at in range(count)]

    def release(self) -> None:
        """Nothing reads or writes it any more."""
        assert self._memory is not None, "a slab was released twice"
        memory, self._memory = self._memory, None
        self._pool.give_back(memory)


class Turnstile:
    """Has things done, by ``do``, in the order of their tickets, whatever order they become ready in."""

    def __init__(self, do: Callable[[Callable[[], None]], None]) -> None:
        self._do = do
        self._line: deque[list[Callable[[], None]]] = deque()

    def ticket(self) -> list[Callable[[], None]]:
        """A place in the line."""
        place: list[Callable[[], None]] = []
        self._line.append(place)
        return place

    def ready(self, place: list[Callable[[], None]], call: Callable[[], None]) -> None:
        """``call`` happens when everything with an earlier ticket has."""
        place.append(call)
        while self._line and self._line[0]:
            self._do(self._line.popleft()[0])
