"""Which store belongs to which look-up: what is seen of one request in two calls.

A session looks a prompt up, computes, and stores it, perhaps with its answer. So a store belongs to the look-up of
the same session and namespace whose prompt is the longest beginning of its own (or, where less is stored than was
asked for, goes on from it). Each look-up has one store at most, within a minute.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict

#: Look-ups that wait for their store: no longer, no more, and with no more bytes of prompts than this.
WAIT_MS = 60_000
WAITING = 2048
WAITING_BYTES = 32 << 20


@dataclasses.dataclass(slots=True, eq=False)
class Seen:
    """A look-up or a store; ``ids`` and ``link`` are filled when it is hashed."""

    number: int
    at_ms: int
    session: int
    namespace: int
    prompt: bytes
    ids: array[int] = dataclasses.field(default_factory=lambda: array("q"))
    link: bytes = b""


class Pairing:
    """Look-ups whose store may still come."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, Seen] = OrderedDict()
        self._by_caller: dict[tuple[int, int], list[Seen]] = {}
        self._bytes = 0

    def clear(self) -> None:
        """Forget them all: a new file begins."""
        self._waiting.clear()
        self._by_caller.clear()
        self._bytes = 0

    def look_up(self, seen: Seen) -> Seen | None:
        """Remember a look-up. Returns one that it repeats: a touch (of no session) of the same prompt, just before."""
        self._expire(seen.at_ms)
        if seen.session:
            for touched in reversed(self._by_caller.get((0, seen.namespace), ())):
                if touched.prompt == seen.prompt:
                    self._remove(touched)
                    touched.session = seen.session
                    self._add(touched)
                    return touched
        self._add(seen)
        return None

    def store(self, seen: Seen) -> Seen | None:
        """The look-up that a store belongs to; it waits no longer."""
        self._expire(seen.at_ms)
        best: Seen | None = None
        for session in (seen.session, 0):
            for found in self._by_caller.get((session, seen.namespace), ()):
                if _related(found.prompt, seen.prompt) and (
                    best is None or len(found.prompt) >= len(best.prompt)
                ):
                    best = found
            if best is not None:
                self._remove(best)
                return best
        return None

    def _add(self, seen: Seen) -> None:
        self._waiting[seen.number] = seen
        self._by_caller.setdefault((seen.session, seen.namespace), []).append(seen)
        self._bytes += len(seen.prompt)

    def _remove(self, seen: Seen) -> None:
        del self._waiting[seen.number]
        caller = (seen.session, seen.namespace)
        self._by_caller[caller].remove(seen)
        if not self._by_caller[caller]:
            del self._by_caller[caller]
        self._bytes -= len(seen.prompt)

    def _expire(self, now_ms: int) -> None:
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            if (
                oldest.at_ms >= now_ms - WAIT_MS
                and len(self._waiting) < WAITING
                and self._bytes < WAITING_BYTES
            ):
                return
            self._remove(oldest)


def _related(asked: bytes, stored: bytes) -> bool:
    return stored.startswith(asked) if len(stored) >= len(asked) else asked.startswith(stored)
