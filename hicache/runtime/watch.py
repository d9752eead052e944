"""Looks after a tier that has latched: tries its medium at growing intervals until it is well again."""

from __future__ import annotations

import logging

from hicache.runtime.clock import Alarm, Clock
from hicache.runtime.ports import TierPort

_log = logging.getLogger(__name__)

FIRST_MS = 1_000
LONGEST_MS = 30_000
#: A tier that latches again within this time of its recovery is tried less and less often, not from the start.
STEADY_MS = 60_000


class Watch:
    """Of one port; the loop's thread owns it."""

    def __init__(self, port: TierPort, clock: Clock) -> None:
        self._port = port
        self._clock = clock
        self._alarm: Alarm | None = None
        self._interval_ms = FIRST_MS
        self._restored_ms = -STEADY_MS
        self._closed = False
        port.on_ill = self._ill

    def _ill(self) -> None:
        if self._clock.now_ms() - self._restored_ms >= STEADY_MS:
            self._interval_ms = FIRST_MS
        self._wait()

    def _wait(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        if not self._closed:
            self._alarm = self._clock.alarm(self._interval_ms, self._try)
            self._interval_ms = min(2 * self._interval_ms, LONGEST_MS)

    def _try(self) -> None:
        self._alarm = None
        if not self._closed:
            self._port.probe(self._tried)

    def _tried(self, well: bool) -> None:  # noqa: FBT001  # a callback's only argument
        if self._closed:
            return
        if not well:
            self._wait()
            return
        self._restored_ms = self._clock.now_ms()
        _log.warning("tier %s is well again", self._port.spec.name)
        self._port.restore()

    def close(self) -> None:
        """Try no more."""
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
