"""Tells the disk store which pages were used, every now and then, so that a restart knows what is worth keeping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hicache.engine import Engine
from hicache.runtime.clock import Alarm, Clock

EVERY_MS = 30_000
RUNS_AT_ONCE = 4096  # the engine looks them up in a few milliseconds


class HeatStore(Protocol):
    """A store that keeps heat beside its pages."""

    def put_heat(self, keys: Sequence[bytes], last_use_ms: Sequence[int], hits: Sequence[int]) -> None:
        """The runs that end with these pages were used so often, and last then (wall clock). Does not wait."""


class HeatTeller:
    """Asks the engine and tells the store. ``store`` may be one that keeps no heat: then nothing is done."""

    def __init__(self, engine: Engine, store: object, clock: Clock) -> None:
        self._engine = engine
        self._store: HeatStore | None = store if hasattr(store, "put_heat") else None
        self._clock = clock
        self._alarm: Alarm | None = None

    def start(self) -> None:
        """Tell every ``EVERY_MS`` from now on."""
        if self._store is not None:
            self._alarm = self._clock.alarm(EVERY_MS, self._again)

    def _again(self) -> None:
        self.tell()
        self.start()

    def tell(self) -> int:
        """Tell of at most ``RUNS_AT_ONCE`` runs now; returns how many there were."""
        if self._store is None:
            return 0
        found = self._engine.heat(RUNS_AT_ONCE)
        if found:
            now_ms, wall_ms = self._clock.now_ms(), int(self._clock.wall_s() * 1000)
            _, keys, used_ms, hits = zip(*found, strict=True)
            self._store.put_heat(keys, [wall_ms - (now_ms - ms) for ms in used_ms], hits)
        return len(found)

    def stop(self) -> None:
        """Tell what is left, and no more after that."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        while self.tell():
            pass
