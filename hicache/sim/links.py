"""Time as the simulator has it: an agenda of calls to come, and servers that work first come, first served.

All times are whole microseconds, so that a replay is the same on every machine.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable


class Agenda:
    """Calls to make at moments of virtual time; those of one moment in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now_us = 0
        self._calls: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time_us: int, call: Callable[[], None]) -> None:
        """Make a call then; a moment that has passed means now."""
        heapq.heappush(self._calls, (max(time_us, self.now_us), next(self._order), call))

    @property
    def next_us(self) -> int | None:
        """When the next call is due; None if there is none."""
        return self._calls[0][0] if self._calls else None

    def step(self) -> None:
        """Make the next call, at its time."""
        self.now_us, _, call = heapq.heappop(self._calls)
        call()


@dataclasses.dataclass(frozen=True, slots=True)
class LinkSpec:
    """What one way between two memories can carry.

    ``bytes_per_s`` is what all ``lanes`` carry together; one transfer uses one lane, and takes
    ``latency_us + bytes / (bytes_per_s / lanes)``.
    """

    bytes_per_s: float
    latency_us: int = 0
    lanes: int = 1

    def carry_us(self, size_bytes: float) -> int:
        """How long one transfer takes once it has a lane."""
        return self.latency_us + round(size_bytes * self.lanes * 1e6 / self.bytes_per_s)


class Server:
    """Some lanes that work is given to in the order in which it comes; each takes one piece at a time."""

    def __init__(self, agenda: Agenda, lanes: int) -> None:
        self._agenda = agenda
        self._free_us = [0] * lanes  # a heap: when each lane is next free
        self.busy_us = 0  # of all lanes together
        self.waited_us = 0  # of all work together, before it began

    def give(self, work_us: int, done: Callable[[], None]) -> int:
        """Have some work done; returns when it will be."""
        now_us = self._agenda.now_us
        begin_us = max(now_us, self._free_us[0])
        end_us = begin_us + work_us
        heapq.heapreplace(self._free_us, end_us)
        self.busy_us += work_us
        self.waited_us += begin_us - now_us
        self._agenda.at(end_us, done)
        return end_us


class Link:
    """A server that carries bytes."""

    def __init__(self, agenda: Agenda, spec: LinkSpec) -> None:
        self.spec = spec
        self.server = Server(agenda, spec.lanes)
        self.carried_bytes = 0

    def carry(self, size_bytes: int, done: Callable[[], None]) -> int:
        """Carry some bytes; returns when they will have arrived."""
        self.carried_bytes += size_bytes
        return self.server.give(self.spec.carry_us(size_bytes), done)
