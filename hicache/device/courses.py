"""A transfer on its way over a CUDA device, and the chunks it goes in: how they are queued, what is made of them.

How a chunk of some layers of some pages (*strips* of their slots) goes:

    slots    the slots lie on the device: the kernel reads them there
    kernel   the kernel reads or writes registered host memory itself
    staged   one copy a run of neighbouring slots, to or from a bay on the device; the kernel works on that
    bounce   through the bay's pinned half as well: for host memory that is not registered
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xxhash

from hicache.device.bays import WORDS, Bay
from hicache.device.driver import Addresses, Driver, Strips, UnitMove
from hicache.device.pinned import Hold
from hicache.device.stages import LEAST_ROW_BYTES, ROWS_MAX
from hicache.device.tasks import Indices, Task, memory_at

Steps = Iterator[bool]
#: Of cudaMemcpy2DAsync.
PITCH_MAX = (1 << 31) - 1
ROW_ALIGN = 64


@dataclasses.dataclass(eq=False, slots=True)
class Course:
    """A task on its way. ``rows``: where its pages' slots begin, in the order of their addresses.

    ``hold``: that its host pages stay registered; None: they are not, or there are none. ``whole``: its pages travel
    whole and are hashed on the device. ``then``: to be called when it has ended.
    """

    task: Task
    hold: Hold | None
    whole: bool
    then: Callable[[], None]
    steps: Steps = dataclasses.field(default_factory=lambda: iter(()))
    pages: Indices = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    rows: Addresses = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    skips: bool = False  # some of its units are not moved
    flying: int = 0

    def begin(self) -> None:
        """Take down what is to be moved."""
        task = self.task
        rows = task.rows
        live = task.live()
        self.pages = live[np.argsort(rows[live], kind="stable")]
        self.rows = rows[self.pages]
        self.skips = bool((task.transfer.places < 0).any())


@dataclasses.dataclass(eq=False, slots=True)
class Chunk:
    """Layers [first, first + layers) of the transfer, of the pages at these positions of the course.

    ``whole``: pages travel to the bay whole and are hashed there. ``only_hash``: nothing is moved.
    ``arrives``: how many layers of all pages have come once it has landed; 0: nothing to tell.
    """

    course: Course
    engine: str
    at: slice
    first: int
    layers: int
    whole: bool = False
    only_hash: bool = False
    arrives: int = 0
    problem: str = ""
    since_ns: int = 0  # in flight
    timed: bool = False
    hashes: int = -1  # where they begin in the bay's table

    @property
    def pages(self) -> Indices:
        """Which pages of the transfer."""
        return self.course.pages[self.at]

    @property
    def rows(self) -> Addresses:
        """Where what travels of each page begins in its slot."""
        return self.course.rows[self.at] + (0 if self.whole or self.only_hash else self.first_byte)

    @property
    def plane_bytes(self) -> int:
        """One plane of one page."""
        shape = self.course.task.shape
        return shape.units * shape.unit_bytes

    @property
    def planes(self) -> slice:
        """Which planes of the region."""
        kv, shape = self.course.task.kv.kv, self.course.task.shape
        first = (shape.first + self.first) * kv.planes_per_layer
        return slice(first, first + self.layers * kv.planes_per_layer)

    @property
    def first_byte(self) -> int:
        """Where its planes begin in a page."""
        first: int = self.planes.start
        return self.course.task.kv.kv.page_offset + first * self.plane_bytes

    @property
    def width(self) -> int:
        """Bytes of a page that travel."""
        planes: int = self.planes.stop - self.planes.start
        return (
            self.course.task.transfer.page_bytes
            if self.whole or self.only_hash
            else planes * self.plane_bytes
        )

    @property
    def pitch(self) -> int:
        """From row to row in a bay."""
        return pitch_of(self.width)


def pitch_of(width: int) -> int:
    """From row to row in a bay, for rows of so many bytes."""
    return -(-width // ROW_ALIGN) * ROW_ALIGN


def pages_max(task: Task, planes: int, width: int, bay_bytes: int) -> int:
    """How many pages a chunk has room for; 0 where not even one."""
    words = (WORDS - planes) // (task.shape.units + 3)
    return min(words, ROWS_MAX, max(1, bay_bytes // max(pitch_of(width), LEAST_ROW_BYTES)))


def queue(driver: Driver, stream: int, chunk: Chunk, bay: Bay) -> None:
    """Queue a chunk. Raises DriverError; some may be queued then. ValueError for a buffer that is gone."""
    task, rows = chunk.course.task, chunk.rows
    if chunk.only_hash:
        _queue_hash(driver, stream, chunk, bay, rows)
        return
    moves = rows
    if chunk.engine in {"staged", "bounce"}:
        moves = bay.stage.device + np.arange(len(rows), dtype=np.int64) * chunk.pitch
        if not task.pack or chunk.course.skips:
            _bring_in(driver, stream, chunk, bay, rows)
    inside = chunk.first_byte if chunk.whole else 0
    if task.pack:
        _queue_move(driver, stream, chunk, bay, moves + inside)
        if chunk.whole:
            _queue_hash(driver, stream, chunk, bay, moves)
    else:
        if chunk.whole:
            _queue_hash(driver, stream, chunk, bay, moves)
        _queue_move(driver, stream, chunk, bay, moves + inside)
    if task.pack and chunk.engine in {"staged", "bounce"}:
        _bring_out(driver, stream, chunk, bay, rows)


def _queue_move(driver: Driver, stream: int, chunk: Chunk, bay: Bay, rows: Addresses) -> None:
    task = chunk.course.task
    kv, shape, planes = task.kv.kv, task.shape, task.kv.planes[chunk.planes]
    start = bay.used_words
    at_planes = bay.put(planes)
    at_places = bay.put(task.transfer.places[chunk.pages].reshape(-1))
    at_rows = bay.put(rows)
    bay.send(driver, stream, start)
    move = UnitMove(
        planes=at_planes,
        plane_count=len(planes),
        places=at_places,
        rows=at_rows,
        pages=len(rows),
        units=shape.units,
        unit_tokens=shape.unit_tokens,
        block_tokens=kv.block_tokens,
        heads=kv.heads,
        head_size=kv.head_size,
        element_bytes=kv.element_bytes,
        strides=kv.strides,
        aligned_to=alignment(planes, rows),
        host_rows=chunk.engine == "kernel",
    )
    driver.move_units(stream, move, pack=task.pack)


def _queue_hash(driver: Driver, stream: int, chunk: Chunk, bay: Bay, rows: Addresses) -> None:
    page_bytes, count = chunk.course.task.transfer.page_bytes, len(rows)
    if (
        chunk.only_hash and chunk.engine == "bounce"
    ):  # the device cannot hash pages of this size: the host does
        targets = [bay.host_address + at * chunk.pitch for at in range(count)]
        driver.copy(stream, targets, rows.tolist(), [page_bytes] * count)
        return
    start = bay.used_words
    table = bay.put(rows)
    bay.send(driver, stream, start)
    chunk.hashes = bay.used_words
    bay.used_words += count
    driver.hash_rows(stream, table, count, page_bytes, bay.stage.scratch)
    driver.copy(stream, [bay.table_address + 8 * chunk.hashes], [table + 8 * count], [8 * count])


def _bring_in(driver: Driver, stream: int, chunk: Chunk, bay: Bay, rows: Addresses) -> None:
    """Slots to the bay."""
    if chunk.engine == "bounce":
        start = bay.host_address
        for at, row in enumerate(rows.tolist()):
            ctypes.memmove(start + at * chunk.pitch, row, chunk.width)
        driver.copy(stream, [bay.stage.device], [start], [len(rows) * chunk.pitch])
        return
    for at, count, pitch in runs(rows, chunk.width, chunk.course.hold or ()):
        target = bay.stage.device + at * chunk.pitch
        driver.copy_strips(stream, Strips(target, chunk.pitch, int(rows[at]), pitch, chunk.width, count))


def _bring_out(driver: Driver, stream: int, chunk: Chunk, bay: Bay, rows: Addresses) -> None:
    """The bay to slots, or to its pinned half, from where ``land`` takes it."""
    if chunk.engine == "bounce":
        driver.copy(stream, [bay.host_address], [bay.stage.device], [len(rows) * chunk.pitch])
        return
    for at, count, pitch in runs(rows, chunk.width, chunk.course.hold or ()):
        source = bay.stage.device + at * chunk.pitch
        driver.copy_strips(stream, Strips(int(rows[at]), pitch, source, chunk.pitch, chunk.width, count))


def bounce_out(chunk: Chunk, bay: Bay) -> None:
    """A pack that bounced has landed in the pinned half: to the slots."""
    start = bay.host_address
    for at, row in enumerate(chunk.rows.tolist()):
        ctypes.memmove(row, start + at * chunk.pitch, chunk.width)


def hashes(chunk: Chunk, bay: Bay) -> Addresses:
    """What a chunk's pages hash to, as int64; it has landed."""
    count = len(chunk.pages)
    if chunk.hashes >= 0:
        return bay.stage.table[chunk.hashes : chunk.hashes + count].copy()
    start = bay.host_address
    pages = [memory_at(start + at * chunk.pitch, chunk.width) for at in range(count)]
    return np.array([xxhash.xxh3_64_intdigest(page.data) for page in pages], np.uint64).view(np.int64)


def runs(rows: Addresses, width: int, pieces: Sequence[int]) -> list[tuple[int, int, int]]:
    """Rows, sorted, as runs of equal distance: (first, count, distance), each of which one copy of strips takes.

    ``pieces``: where registered memory begins; no copy may reach from one into another.
    """
    owner = np.searchsorted(np.sort(np.array(pieces, np.int64)), rows, "right")
    steps = np.where(np.diff(owner) == 0, np.diff(rows), 0).tolist()
    found, at = [], 0
    while at < len(rows):
        end = at + 1
        pitch = steps[at] if at < len(steps) else width
        if width <= pitch <= PITCH_MAX:
            while end < len(rows) and steps[end - 1] == pitch:
                end += 1
        found.append((at, end - at, pitch if end - at > 1 else width))
        at = end
    return found


def alignment(planes: Addresses, rows: Addresses) -> int:
    """What all of them are multiples of, up to 16."""
    return int(np.gcd.reduce(np.concatenate([planes, rows, [16]])))
