"""What a lane does for a segment before its first batch: wipe its memory, find the engines for its pages.

A chore waits its turn in the lane like a batch and holds up what comes behind it; the owner never waits for either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from hicache.device.driver import Driver, DriverError
from hicache.device.patience import Patience
from hicache.device.segment import DeviceSegment

_log = logging.getLogger(__name__)

#: So often a fill is tried; a device that is lost says so at the first.
TRIES = 3


class Chore(Protocol):
    """A step of its work at a time."""

    def step(self) -> bool:
        """True when it is over. Raises DriverError only where the device is to be given up."""


class Wipe:
    """Zeros over all of a segment's memory, so that no byte of an earlier one can be read, whoever maps it.

    A segment whose memory could not be wiped takes no pages: ``segment.problem`` says why. ``event``: of the chores of
    the lane, of which there is one at a time.
    """

    def __init__(
        self,
        driver: Driver,
        segment: DeviceSegment,
        size_bytes: int,
        *,
        stream: int,
        event: int,
        patience: Patience,
    ) -> None:
        self._driver = driver
        self._stream = stream
        self._segment = segment
        self._size_bytes = size_bytes
        self._patience = patience
        self._event = event
        self._since_ns = 0
        self._under_way = False
        self._tries = 0

    def step(self) -> bool:
        """See Chore."""
        try:
            if not self._under_way:
                self._driver.fill(self._stream, self._segment.address, 0, self._size_bytes)
                self._driver.record(self._event, self._stream)
                self._since_ns, self._under_way = self._patience.now_ns(), True
            if not self._driver.ready(self._event):
                self._patience.check(self._since_ns)
                return False
        except DriverError as error:
            self._under_way = False
            self._tries += 1
            if error.fatal or self._tries >= TRIES:
                self._segment.problem = f"the segment's memory was not wiped: {error}"
                _log.error("%s", self._segment.problem)
            if error.fatal:
                raise
            return bool(self._segment.problem)
        self._segment.clean = True
        return True


class Calibrate:
    """The engines for pages of a size are found before the first of them is copied."""

    def __init__(self, calibrate: Callable[[], bool]) -> None:
        self._calibrate = calibrate

    def step(self) -> bool:
        """See Chore."""
        return self._calibrate()
