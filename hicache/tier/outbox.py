"""The way results leave a store: worker threads publish, the owner drains.

Shared by every store of this room. A batch may be worked on by several threads; its ``Pending`` counts them
down and publishes one completion.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

from hicache.types import Batch, Completion, Notify, Op, Outcome

_log = logging.getLogger(__name__)


class Outbox:
    """Completions on their way to the owner. ``publish`` from any thread, ``drain`` from the owner's."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._done: deque[Completion] = deque()

    def publish(self, completion: Completion) -> None:
        """Hand a completion to the owner and wake it."""
        self._done.append(completion)
        self.ring()

    def ring(self) -> None:
        """Wake the owner: there is something to ask for."""
        try:
            self._notify()
        except RuntimeError as exc:  # the owner's event loop is closed; the worker must go on
            _log.debug("nobody to notify: %s", exc)

    def drain(self) -> list[Completion]:
        """Everything published since the last call; never blocks."""
        done = []
        while True:
            try:
                done.append(self._done.popleft())
            except IndexError:
                return done


class Lost:
    """Keys of pages that are gone without anybody having asked. ``add`` from any thread, ``take`` from the owner's."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._keys: deque[bytes] = deque()

    def add(self, keys: list[bytes]) -> None:
        """These are gone."""
        self._keys.extend(keys)
        self._outbox.ring()

    def take(self) -> list[bytes]:
        """All since the last call; never blocks."""
        return [self._keys.popleft() for _ in range(len(self._keys))]


class Pending:
    """A batch under way. Whichever thread worked on a page settles it, once; the last one publishes."""

    __slots__ = ("_left", "_lock", "_outbox", "batch", "charges", "checksums", "error", "outcomes")

    def __init__(self, batch: Batch, pages: int, outbox: Outbox) -> None:
        self.batch = batch
        self.outcomes = [Outcome.FAULT] * pages
        self.checksums = [0] * pages if batch.op in (Op.PUT, Op.GET) else []
        self.charges = [0] * pages if batch.op is Op.PUT and batch.keys else []
        self.error = ""
        self._outbox = outbox
        self._lock = threading.Lock()
        self._left = pages

    def settle(self, pages: int = 1) -> None:
        """``pages`` more pages have their outcome; publishes when all have."""
        if not pages:
            return
        with self._lock:
            self._left -= pages
            assert self._left >= 0, "a page was settled twice"
            if self._left:
                return
        sums = [s if o is Outcome.OK else 0 for s, o in zip(self.checksums, self.outcomes, strict=False)]
        done = Completion(self.batch.id, tuple(self.outcomes), tuple(sums), tuple(self.charges), self.error)
        self._outbox.publish(done)
