"""One direction's stream with what its copies need: tables, a stage on the device, a bounce buffer on the host.

One thread uses it, for one job at a time. Whatever happens to a job, ``drain`` or ``quiet`` has returned before its
memory is anybody else's.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hicache.device import kernels
from hicache.device.copying.cuda_seam import Coding, CopyDriver
from hicache.device.copying.kv import EngineKv
from hicache.device.driver import Bytes, DriverError, Strips, UnitMove
from hicache.device.kv import Places

Addresses = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

#: How often a thread asks for its event.
POLL_S = 30e-6
#: How often a stream that takes no event is asked again before the device is given up.
ASK_MOST = 100
LEAST_WORDS = 1 << 14


@dataclasses.dataclass(frozen=True, slots=True)
class Spot:
    """Where some pages' units lie in the planes: an uploaded table of places."""

    at: int
    pages: int
    units: int
    unit_tokens: int

    def part(self, first: int, pages: int) -> Spot:
        """Some of the pages."""
        return Spot(self.at + 8 * first * self.units, pages, self.units, self.unit_tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Where pages lie, or their parts: an uploaded table, and what all its addresses are a multiple of.

    ``host``: in host memory.
    """

    at: int
    aligned_to: int
    host: bool = False

    def part(self, first: int) -> Rows:
        """From some row on."""
        return Rows(self.at + 8 * first, self.aligned_to, self.host)


class Lane:
    """See above. ``dead``: why the device was given up; empty while it serves."""

    def __init__(self, kv: EngineKv, driver: CopyDriver, *, priority: int, stage_bytes: int) -> None:
        self.kv = kv
        self.driver = driver
        self.dead = ""
        self.stage_bytes = max(stage_bytes, kv.page_bytes)
        self.stream = driver.stream(priority)
        self._event = driver.event()
        self._ends = (driver.event(), driver.event())
        self._pause = threading.Event()
        self._host: list[Bytes] = []
        self._device: list[int] = []
        self.stage = self._allocate(self.stage_bytes)
        self._bounce: Bytes | None = None
        self._table, self._device_table = np.empty(0, np.int64), 0
        self._used = 0
        self._scratch, self._scratch_bytes = 0, 0
        planes = np.array([plane.data_ptr() for plane in kv.planes], np.int64)
        self._aligned_to = int(np.gcd.reduce(np.concatenate([planes, [16]])))
        self.begin(len(planes))
        self._planes = self._allocate(planes.nbytes)
        staged = self.put(planes)
        driver.copy(self.stream, [self._planes], [staged], [planes.nbytes])
        self.drain()

    def close(self) -> None:
        """Give all memory back; nothing is under way. A device that was lost has taken it with it."""
        for address in self._device:
            _ignored(self.driver.release, address)
        for memory in self._host:
            _ignored(self.driver.release_host, memory)
        self._device.clear()
        self._host.clear()

    # --- memory

    def begin(self, words: int, hashed_bytes: int = 0) -> None:
        """A job begins that puts so many words into tables, and hashes rows of so many bytes in all at a time."""
        if words > len(self._table):
            count = max(LEAST_WORDS, 2 * words)
            self._table = self._allocate_host(8 * count).view(np.int64)
            self._device_table = self._allocate(8 * count)
        if hashed_bytes > self._scratch_bytes:
            self._scratch, self._scratch_bytes = self._allocate(hashed_bytes), hashed_bytes
        self._used = 0

    def put(self, values: Addresses) -> int:
        """Upload a table; its address on the device."""
        start, end = self._used, self._used + values.size
        assert end <= len(self._table), "the job said how many words it needs"
        self._table[start:end] = values.reshape(-1)
        self._used = end
        at = self._device_table + 8 * start
        if values.size:
            self.driver.copy(self.stream, [at], [self._table.ctypes.data + 8 * start], [8 * values.size])
        return at

    def fetch(self, at: int, words: int) -> Addresses:
        """Queue the way back of a part of a table; what is answered is valid once drained."""
        start = (at - self._device_table) // 8
        found = self._table[start : start + words]
        if words:
            self.driver.copy(self.stream, [found.ctypes.data], [at], [8 * words])
        return found

    def spot(self, places: Places) -> Spot:
        """Upload places."""
        pages, units = places.shape
        return Spot(self.put(places), pages, units, self.kv.page_tokens // units)

    def rows(self, addresses: Addresses, *, host: bool = False) -> Rows:
        """Upload where rows lie."""
        aligned_to = int(np.gcd.reduce(np.concatenate([addresses.reshape(-1), [16]])))
        return Rows(self.put(addresses), aligned_to, host)

    def stage_rows(self, count: int, row_bytes: int) -> Addresses:
        """Rows in the stage, side by side."""
        assert count * row_bytes <= self.stage_bytes
        return self.stage + np.arange(count, dtype=np.int64) * row_bytes

    def bounce(self, count: int) -> Bytes:
        """Pinned memory for whole pages, one row each."""
        if self._bounce is None:
            self._bounce = self._allocate_host(self.stage_bytes)
        size = self.kv.page_bytes
        return self._bounce[: count * size].reshape(count, size)

    def _allocate(self, size_bytes: int) -> int:
        found = self.driver.allocate(max(size_bytes, 8))
        self._device.append(found)
        return found

    def _allocate_host(self, size_bytes: int) -> Bytes:
        found = self.driver.allocate_host(size_bytes)
        self._host.append(found)
        return found

    # --- what is queued

    def move(self, layers: range, spot: Spot, rows: Rows, *, pack: bool) -> None:
        """Between planes and rows that begin with the first of these layers."""
        if spot.pages:
            self.driver.move_units(self.stream, self._unit_move(layers, spot, rows), pack=pack)

    def code(self, layer: int, spot: Spot, rows: Rows, refused: int | None) -> None:
        """A layer of planes to quantised rows where ``refused`` is given, else the other way."""
        kv, one = self.kv, range(layer, layer + 1)
        dtype = str(kv.planes[0].dtype).removeprefix("torch.")
        coding = Coding(kv.codec, len(kv.planes), layer * kv.planes_per_layer, dtype)
        move = self._unit_move(one, spot, rows)
        if not spot.pages:
            return
        if refused is None:
            self.driver.decode_units(self.stream, move, coding)
        else:
            self.driver.encode_units(self.stream, move, coding, refused)

    def _unit_move(self, layers: range, spot: Spot, rows: Rows) -> UnitMove:
        kv = self.kv
        _, block, heads, dim = kv.planes[0].shape
        first = layers.start * kv.planes_per_layer
        return UnitMove(
            planes=self._planes + 8 * first,
            plane_count=len(layers) * kv.planes_per_layer,
            places=spot.at,
            rows=rows.at,
            pages=spot.pages,
            units=spot.units,
            unit_tokens=spot.unit_tokens,
            block_tokens=int(block),
            heads=int(heads),
            head_size=int(dim),
            element_bytes=kv.planes[0].element_size(),
            strides=_four(kv.planes[0].stride()),
            aligned_to=int(np.gcd(self._aligned_to, rows.aligned_to)),
            host_rows=rows.host,
        )

    def strips(self, targets: Addresses, sources: Addresses, width_bytes: int, pieces: Addresses) -> None:
        """Copy rows, those that are equally spaced in one piece of memory with one call."""
        for first, count, target_pitch, source_pitch in _runs(targets, sources, width_bytes, pieces):
            target, source = int(targets[first]), int(sources[first])
            self.driver.copy_strips(
                self.stream, Strips(target, target_pitch, source, source_pitch, width_bytes, count)
            )

    def hash(self, addresses: Addresses) -> Addresses:
        """xxh3-64 of whole pages on the device; valid once drained."""
        table = np.concatenate([addresses, np.zeros_like(addresses)])
        at, count = self.put(table), len(addresses)
        if not count:
            return np.empty(0, np.int64)
        self.driver.hash_rows(self.stream, at, count, self.kv.page_bytes, self._scratch)
        return self.fetch(at + 8 * count, count)

    # --- time

    def follow(self, mark: Any) -> None:
        """What is queued from now on comes behind a mark of the engine's."""
        if mark is not None:
            self.driver.follow(self.stream, mark)

    def start_clock(self) -> None:
        """Copies that are timed begin. Only where nothing is under way: an event takes failures before it with it."""
        self.driver.record(self._ends[0], self.stream)

    def stop_clock(self) -> int:
        """Drain; what the copies took, in ns."""
        self.drain(self._ends[1])
        self.driver.ready(self._ends[0])
        return max(1, self.driver.elapsed_ns(*self._ends))

    def drain(self, event: int | None = None) -> None:
        """Until nothing is under way. Raises DriverError where some of it failed."""
        event = self._event if event is None else event
        self.driver.record(event, self.stream)
        while not self.driver.ready(event):
            self._pause.wait(POLL_S)

    def quiet(self) -> bool:
        """As ``drain``, after something failed. False where the device was given up, and may still be at it."""
        for _ in range(ASK_MOST):
            try:
                self.drain()
                return True
            except DriverError as error:
                if error.fatal:
                    self.dead = self.dead or f"the device was given up: {error}"
                    return False
                if error.call != "record":
                    return True  # what was queued has happened, in part or not at all, and will not later
        self.dead = self.dead or "the device was given up: its stream takes no event"
        return False


def scratch_bytes(rows: int, row_bytes: int) -> int:
    """Device memory that hashing needs."""
    return kernels.hash_scratch_bytes(rows, row_bytes)


def _runs(
    targets: Addresses, sources: Addresses, width: int, pieces: Addresses
) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, pitch of targets, pitch of sources) where both are equally spaced, wide enough apart."""
    first, count = 0, len(targets)
    steps = np.stack([np.diff(targets), np.diff(sources), np.diff(pieces)], 1).tolist()
    while first < count:
        end, step = first + 1, [width, width, 0]
        if end < count and min(steps[first][:2]) >= width and not steps[first][2]:
            step = steps[first]
            while end < count and steps[end - 1] == step:
                end += 1
        yield first, end - first, step[0], step[1]
        first = end


def _four(stride: Any) -> tuple[int, int, int, int]:
    block, token, head, element = (int(step) for step in stride)
    return block, token, head, element


def _ignored(work: Any, argument: Any) -> None:
    try:
        work(argument)
    except DriverError:
        return
