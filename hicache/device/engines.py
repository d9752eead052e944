"""Ways to copy rows between host and device, and which one to take: measured, not guessed.

    kernel  a kernel reads or writes the pinned host memory itself, whatever the rows' addresses
    staged  rows to or from a contiguous buffer on the device by a kernel; one large copy from there where the host's
            rows lie side by side
    batch   one cudaMemcpyBatchAsync
    dma     one cudaMemcpyAsync a run of neighbouring rows; always there

``Chooser`` times each for a shape (direction, bytes of a page, a few rows or many) when it is first asked, on the
lane's thread and with the device's own clock, and keeps the best; ``--copy-engine`` overrides it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from hicache.device import kernels
from hicache.device.driver import Addresses, Bytes, Driver, DriverError
from hicache.device.patience import ENDLESS, Patience, Unanswered

ENGINES = ("kernel", "staged", "batch", "dma")
#: Those that leave the multiprocessors alone, and how near they must come to the fastest to be taken.
COPY_ENGINES, NEARLY = ("batch", "dma"), 0.95
#: From this many rows on a shape counts as many.
MANY_ROWS = 8


@dataclasses.dataclass(slots=True)
class Stage:
    """Buffers of one chunk in flight. ``host`` and ``table`` are pinned; the others are device addresses.

    ``table`` holds 2 * rows int64 for a kernel's addresses, then 2 * rows for hashing: addresses in, hashes out.
    """

    host: Bytes
    device: int
    table: Addresses
    device_table: int
    scratch: int
    event: int
    size_bytes: int
    begun: int = 0  # an event, for those who measure


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Rows to copy: where from, where to; ``to_host`` says which side is the device's."""

    targets: Addresses
    sources: Addresses
    row_bytes: int
    to_host: bool

    @property
    def aligned_to(self) -> int:
        """What every address is a multiple of, up to 16."""
        return int(np.gcd.reduce(np.concatenate([self.targets, self.sources, [16]])))


def copy_rows(engine: str, driver: Driver, stream: int, rows: Rows, stage: Stage) -> None:
    """Queue the copies on the stream. Raises DriverError; some may be queued then."""
    if len(rows.targets):
        _COPY[engine](driver, stream, rows, stage)


def hash_rows(driver: Driver, stream: int, addresses: Addresses, row_bytes: int, stage: Stage) -> None:
    """Queue xxh3-64 of rows on the device; the hashes arrive in ``hashes(stage, rows)``."""
    count = len(addresses)
    if not count:
        return
    start = len(stage.table) // 2
    stage.table[start : start + count] = addresses
    at = stage.device_table + 8 * start
    driver.copy(stream, [at], [_address(stage.table) + 8 * start], [8 * count])
    driver.hash_rows(stream, at, count, row_bytes, stage.scratch)
    driver.copy(stream, [_address(stage.table) + 8 * (start + count)], [at + 8 * count], [8 * count])


def hashes(stage: Stage, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """What ``hash_rows`` found; valid once its event is ready."""
    start = len(stage.table) // 2 + count
    return stage.table[start : start + count].view(np.uint64).copy()


def _kernel(driver: Driver, stream: int, rows: Rows, stage: Stage) -> None:
    count = len(rows.targets)
    stage.table[:count] = rows.targets
    stage.table[count : 2 * count] = rows.sources
    driver.copy(stream, [stage.device_table], [_address(stage.table)], [16 * count])
    driver.move_rows(stream, stage.device_table, count, rows.row_bytes, rows.aligned_to)


def _staged(driver: Driver, stream: int, rows: Rows, stage: Stage) -> None:
    steps = np.arange(len(rows.targets), dtype=np.int64) * rows.row_bytes + stage.device
    if rows.to_host:
        _kernel(driver, stream, dataclasses.replace(rows, targets=steps), stage)
        _dma(driver, stream, dataclasses.replace(rows, sources=steps), stage)
    else:
        _dma(driver, stream, dataclasses.replace(rows, targets=steps), stage)
        _kernel(driver, stream, dataclasses.replace(rows, sources=steps), stage)


def _batch(driver: Driver, stream: int, rows: Rows, stage: Stage) -> None:
    driver.copy_batch(stream, *_runs(rows))


def _dma(driver: Driver, stream: int, rows: Rows, stage: Stage) -> None:
    driver.copy(stream, *_runs(rows))


_COPY: dict[str, Callable[[Driver, int, Rows, Stage], None]] = {
    "kernel": _kernel,
    "staged": _staged,
    "batch": _batch,
    "dma": _dma,
}


def _runs(rows: Rows) -> tuple[list[int], list[int], list[int]]:
    """Targets, sources and sizes, rows that lie side by side on both sides made one."""
    apart = (np.diff(rows.targets) != rows.row_bytes) | (np.diff(rows.sources) != rows.row_bytes)
    starts = np.concatenate([[0], np.flatnonzero(apart) + 1])
    counts = np.diff(np.concatenate([starts, [len(rows.targets)]]))
    return (
        rows.targets[starts].tolist(),
        rows.sources[starts].tolist(),
        (counts * rows.row_bytes).tolist(),
    )


def _address(array: np.ndarray[tuple[int], np.dtype[np.int64]]) -> int:
    return int(array.ctypes.data)


def available(driver: Driver) -> list[str]:
    """The engines that the device can run."""
    found = ["kernel", "staged"] if driver.has_kernels else []
    return [*found, *(["batch"] if driver.has_batch else []), "dma"]


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """The engine of a shape, and what was measured: engine -> GB/s. Empty where it was said, not measured."""

    engine: str
    gb_per_s: dict[str, float]


def best(gb_per_s: Mapping[str, float]) -> str:
    """The fastest, or one of the copy engines where it is nearly as fast: they take no multiprocessor from compute."""
    enough = NEARLY * max(gb_per_s.values())
    near = {name: speed for name, speed in gb_per_s.items() if speed >= enough}
    return max(near, key=lambda name: (name in COPY_ENGINES, near[name]))


class Chooser:
    """The engines of one lane. Used by its thread; ``choices`` may be read from any."""

    def __init__(self, driver: Driver, stream: int, engine: str, patience: Patience = ENDLESS) -> None:
        self._patience = patience
        self._driver = driver
        self._stream = stream
        self._said = engine
        self._ends = (driver.event(), driver.event())
        self.choices: dict[tuple[str, int, str], Choice] = {}

    def engine(self, count: int, row_bytes: int, stage: Stage, *, to_host: bool) -> str:
        """The engine for so many rows. ``stage`` lends its buffers where the shape must be measured first."""
        if self._said != "auto":
            return self._said
        few = count < MANY_ROWS
        shape = ("to host" if to_host else "to device", row_bytes, "few" if few else "many")
        choice = self.choices.get(shape)
        if choice is None:
            room = min(stage.size_bytes // row_bytes, len(stage.table) // 4)
            try:
                choice = self._measure(
                    max(1, min(room, MANY_ROWS // 2) if few else room), row_bytes, stage, to_host
                )
            except Unanswered:
                raise
            except DriverError:  # it will show in the copy itself; the shape is measured another time
                return "dma"
            self.choices[shape] = choice
        return choice.engine

    def _measure(self, count: int, row_bytes: int, stage: Stage, to_host: bool) -> Choice:  # noqa: FBT001
        """Time every engine on rows of memory that holds nothing."""
        slots = self._driver.allocate(stage.size_bytes)
        silent = False
        try:
            order = np.arange(count, dtype=np.int64)
            device = slots + np.random.default_rng(0).permutation(order) * row_bytes
            host = stage.host.ctypes.data + order * row_bytes
            ends = (host, device) if to_host else (device, host)
            rows = Rows(ends[0], ends[1], row_bytes, to_host)
            found = {name: self._time(name, rows, stage) for name in available(self._driver)}
        except Unanswered:
            silent = True  # it may still copy
            raise
        finally:
            if not silent:
                self._wait()
                self._driver.release(slots)
        speeds = {name: round(count * row_bytes / ns, 2) for name, ns in found.items()}
        return Choice(best(speeds), speeds)

    def _time(self, engine: str, rows: Rows, stage: Stage) -> int:
        """The least of three times, after one to warm up, in ns."""
        driver, taken = self._driver, []
        for _ in range(4):
            driver.record(self._ends[0], self._stream)
            copy_rows(engine, driver, self._stream, rows, stage)
            driver.record(self._ends[1], self._stream)
            self._patience.wait(lambda: driver.ready(self._ends[1]))
            driver.ready(self._ends[0])
            taken.append(max(driver.elapsed_ns(*self._ends), 1))
        return min(taken[1:])

    def _wait(self) -> None:
        """Until nothing of a measurement is queued any more, whatever became of it."""
        while True:
            try:
                self._driver.record(self._ends[1], self._stream)
                self._patience.wait(lambda: self._driver.ready(self._ends[1]))
            except Unanswered:
                raise
            except DriverError as error:
                if error.call == "record" and not error.fatal:
                    continue
            return


def scratch_bytes(rows: int, row_bytes: int) -> int:
    """Device memory that hashing needs."""
    return kernels.hash_scratch_bytes(rows, row_bytes)
