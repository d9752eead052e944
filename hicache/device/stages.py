"""The stages of a lane: buffers of the chunks in flight, made when the first is wanted."""

from __future__ import annotations

import collections
import contextlib

import numpy as np

from hicache.device.driver import Driver, DriverError
from hicache.device.engines import Stage

#: Chunks in flight at a time: one is filled or emptied by the host while one is copied and one waits.
STAGES = 3
#: A stage's tables have room for so many rows.
LEAST_ROW_BYTES, ROWS_MAX = 512, 4096


class Stages:
    """``take`` one, ``give`` it back when its event is ready. Used by the lane's thread only.

    ``words``: of a table, where it needs more than four a row.
    """

    def __init__(self, driver: Driver, stage_bytes: int, *, words: int = 0) -> None:
        self._driver = driver
        self._stage_bytes = stage_bytes
        self._words = words
        self._free: collections.deque[Stage] = collections.deque()
        self._all: list[Stage] = []

    @property
    def stage_bytes(self) -> int:
        """What a stage has room for, if no row was larger."""
        return self._all[0].size_bytes if self._all else self._stage_bytes

    def take(self, row_bytes: int, *, idle: bool) -> Stage | None:
        """One with room for a row; None where none is free yet. ``idle``: all were given back.

        Raises DriverError where there is no memory for any.
        """
        if self._free and self._free[0].size_bytes >= row_bytes:
            return self._free.popleft()
        if not idle and (len(self._all) >= STAGES or self._all[0].size_bytes < row_bytes):
            return None  # larger pages than the stages': they are made anew once all have landed
        try:
            if self._all and self._all[0].size_bytes < row_bytes:
                self.close()
            while len(self._all) < STAGES:
                self._free.append(self._make(max(self._stage_bytes, row_bytes)))
        except DriverError:
            if not self._free:
                raise
        return self._free.popleft()

    def give(self, stage: Stage) -> None:
        """Nothing is under way in it."""
        self._free.append(stage)

    def close(self) -> None:
        """Give the memory back; nothing is under way. A device that was lost has taken it with it."""
        for stage in self._all:
            with contextlib.suppress(DriverError):
                self._driver.release_host(stage.host)
                self._driver.release_host(stage.table.view(np.uint8))
                for address in (stage.device, stage.device_table, stage.scratch):
                    self._driver.release(address)
        self._all.clear()
        self._free.clear()

    def _make(self, size_bytes: int) -> Stage:
        rows = max(1, min(size_bytes // LEAST_ROW_BYTES, ROWS_MAX))
        driver = self._driver
        table = driver.allocate_host(8 * max(rows * 4, self._words))
        stage = Stage(
            host=driver.allocate_host(size_bytes),
            device=driver.allocate(size_bytes),
            table=table.view(np.int64),
            device_table=driver.allocate(table.nbytes),
            scratch=driver.allocate(size_bytes // 16 + 64 * rows),
            event=driver.event(),
            begun=driver.event(),
            size_bytes=size_bytes,
        )
        self._all.append(stage)
        return stage
