"""The host tier: pages in slots of sealed shared-memory segments.

Rules. The owner thread opens and closes segments, takes views, seals and frees; worker threads only copy and
hash, through numpy and xxhash, which release the GIL. A slot is worked on by one worker always the same (slot
modulo workers), so operations on one slot take effect in submission order. Nothing is trusted in place: a PUT
hashes the copy it made, a GET hashes the copy it hands out. Generations start at 1 and move on by one each
time a slot is freed.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from hicache.errors import InvalidArgumentError, UnavailableError
from hicache.tier.outbox import Outbox, Pending
from hicache.tier.prefault import SparePool
from hicache.tier.priority import background
from hicache.tier.segment import Segment, SegmentLayout, plan_layout
from hicache.types import SLOTS_PER_SEGMENT, Batch, Completion, Notify, Op, Outcome, TierSpec

_log = logging.getLogger(__name__)

#: Pages of one batch that belong to one worker: (batch, positions in it, the slots as (segment, index)).
_Task = tuple[Pending, list[int], list[tuple[Segment, int]]]
_Where = npt.NDArray[np.bool_] | slice
_Indices = npt.NDArray[np.int64]
_Sums = npt.NDArray[np.uint64]
_Queue = queue.SimpleQueue[_Task | None]


class HostStore:
    """Slotted page store in host memory that clients of this host can map read-only."""

    def __init__(self, spec: TierSpec, notify: Notify, *, workers: int = 1, prefault: bool = True) -> None:
        """Start the threads.

        Args:
        spec: ``segment_bytes`` and ``capacity_bytes`` bound the memory; ``header_bytes_per_slot`` must be 8.
        notify: called from worker threads when ``poll`` has something.
        workers: copying threads.
        prefault: fault spare segments in ahead of need, in the background.
        """
        if spec.segment_bytes < 1 or spec.capacity_bytes < spec.segment_bytes:
            raise InvalidArgumentError(
                f"tier {spec.name}: {spec.capacity_bytes} bytes hold no segment of {spec.segment_bytes}"
            )
        self._spec = spec
        self._segments: dict[int, Segment] = {}
        self._outbox = Outbox(notify)
        self._spares = SparePool(
            spec.segment_bytes, spec.capacity_bytes // spec.segment_bytes, prefault=prefault
        )
        self._queues: list[_Queue] = [queue.SimpleQueue() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=_work, args=(q,), name=f"hicache-host-{i}", daemon=True)
            for i, q in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()
        self._closed = False
        self._opened: Callable[[int, int], None] = lambda _address, _size_bytes: None
        self._closing: Callable[[int, int, Callable[[], None]], None] = lambda _address, _size_bytes, then: (
            then()
        )

    def on_memory(
        self,
        opened: Callable[[int, int], None],
        closing: Callable[[int, int, Callable[[], None]], None],
    ) -> None:
        """Tell of every segment's memory, (address, bytes), when it is taken and before it is given back.

        ``closing`` also gets what gives it back, to call when that may be, from any thread. For devices that
        register host memory; set before the first segment is opened.
        """
        self._opened, self._closing = opened, closing

    # -- segments: owner thread only

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """Give a segment its domain and slot size; every slot starts empty, at generation 1.

        Raises InvalidArgumentError for a segment that is open or does not fit, ExhaustedError without memory.
        """
        if segment in self._segments:
            raise InvalidArgumentError(f"segment {segment} is open already")
        layout = plan_layout(self._spec, segment, domain, page_bytes, slots)
        memory = self._spares.take()
        self._segments[segment] = Segment(memory, layout)
        self._opened(memory.bytes.ctypes.data, memory.size_bytes)

    def close_segment(self, segment: int) -> None:
        """Give the segment's memory back (when the last client unmaps it, too). Its batches must be over."""
        found = self._segment(segment)
        del self._segments[segment]
        memory = found.memory
        self._closing(memory.bytes.ctypes.data, memory.size_bytes, lambda: self._spares.give_back(memory))

    def layout(self, segment: int) -> SegmentLayout:
        """Where the slots lie, for clients that map the segment."""
        return self._segment(segment).layout

    def fd(self, segment: int) -> int:
        """The segment's memfd, owned by the store: pass it on (SCM_RIGHTS), never close it."""
        return self._segment(segment).memory.fd

    @property
    def populated_bytes(self) -> int:
        """Bytes of spare segments faulted in so far."""
        return self._spares.populated_bytes

    # -- slots: owner thread only

    def views(self, slots: Sequence[int]) -> list[memoryview]:
        """Writable views of the slots, ``page_bytes`` each. Valid until the segment is closed."""
        return [memoryview(cast(bytes, segment.page(index))) for segment, index in self._find(slots)]

    def addresses(self, slots: Sequence[int], page_bytes: int) -> tuple[_Indices, list[object]]:
        """Where the slots begin in this process, and what keeps them mapped as long as somebody has it.

        Raises InvalidArgumentError for slots of another size.
        """
        found, keep = np.empty(len(slots), np.int64), list[object]()
        for segment, where, indices in self._group(slots):
            layout, memory = segment.layout, segment.memory.bytes
            if layout.page_bytes != page_bytes:
                raise InvalidArgumentError(f"slots of {layout.page_bytes} bytes, not {page_bytes}")
            found[where] = memory.ctypes.data + layout.first_slot_offset + indices * layout.stride
            keep.append(memory)
        return found, keep

    def seal(self, slots: Sequence[int], checksums: Sequence[int]) -> None:
        """Record the checksums of pages that were copied into their slots through ``views``."""
        if len(slots) != len(checksums):
            raise InvalidArgumentError(f"{len(slots)} slots and {len(checksums)} checksums")
        values = np.asarray(checksums, dtype=np.uint64)
        for segment, where, indices in self._group(slots):
            segment.checksums[indices] = values[where]
            segment.sealed[indices] = 1

    def checksums(self, slots: Sequence[int]) -> list[int]:
        """The recorded checksums; 0 for a slot that never held a page."""
        found = np.empty(len(slots), dtype=np.uint64)
        for segment, where, indices in self._group(slots):
            found[where] = segment.checksums[indices]
        return found.tolist()

    def columns(self, slots: Sequence[int]) -> tuple[_Sums, _Sums]:
        """The recorded checksums, and the generations as clients see them in the segment's header."""
        checksums, generations = np.empty(len(slots), np.uint64), np.empty(len(slots), np.uint64)
        for segment, where, indices in self._group(slots):
            checksums[where] = segment.checksums[indices]
            generations[where] = segment.generations[indices]
        return checksums, generations

    def free(self, slots: Sequence[int]) -> None:
        """The slots hold nothing from now on; their generations move on."""
        for segment, _, indices in self._group(slots):
            segment.sealed[indices] = 0
            segment.generations[indices] += np.uint64(1)

    def _group(self, slots: Sequence[int]) -> Iterator[tuple[Segment, _Where, _Indices]]:
        """The slots by segment: which entries of ``slots`` lie in it, and their indices there. No loop over slots."""
        every = np.asarray(slots, dtype=np.int64)
        if not len(every):
            return
        number = int(every.min()) // SLOTS_PER_SEGMENT
        if number == int(every.max()) // SLOTS_PER_SEGMENT:  # as it is nearly always
            segment, inside = self._segment(number), every - number * SLOTS_PER_SEGMENT
            self._check_inside(segment, number, inside)
            yield segment, slice(None), inside
            return
        numbers, indices = np.divmod(every, SLOTS_PER_SEGMENT)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            segment, inside = self._segment(number), indices[mine]
            self._check_inside(segment, number, inside)
            yield segment, mine, inside

    def _check_inside(self, segment: Segment, number: int, inside: _Indices) -> None:
        if int(inside.max()) >= segment.layout.slots:
            raise InvalidArgumentError(f"segment {number} has only {segment.layout.slots} slots")

    # -- the store port

    def submit(self, batch: Batch) -> None:
        """Queue a batch.

        Raises InvalidArgumentError for one that does not fit, UnavailableError when closed.
        """
        if self._closed:
            raise UnavailableError(f"tier {self._spec.name} is closed")
        if batch.op is Op.FLUSH:
            pending = Pending(batch, len(self._queues), self._outbox)
            pending.outcomes = []
            for work in self._queues:
                work.put((pending, [], []))
            return
        found = self._find(batch.slots)
        _check(batch, found)
        pending = Pending(batch, len(found), self._outbox)
        if not found:
            self._outbox.publish(Completion(batch.id, ()))
            return
        workers = len(self._queues)
        if workers == 1:
            self._queues[0].put((pending, list(range(len(found))), found))
            return
        for worker, work in enumerate(self._queues):
            mine = [at for at, slot in enumerate(batch.slots) if slot % workers == worker]
            if mine:
                work.put((pending, mine, [found[at] for at in mine]))

    def poll(self) -> list[Completion]:
        """Completions since the last call; never blocks."""
        return self._outbox.drain()

    def close(self) -> None:
        """Finish what was submitted, release every segment. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for work in self._queues:
            work.put(None)
        for thread in self._threads:
            thread.join()
        for segment in self._segments.values():
            memory = segment.memory
            self._closing(memory.bytes.ctypes.data, memory.size_bytes, memory.close)
        self._segments.clear()
        self._spares.close()

    def _segment(self, segment: int) -> Segment:
        found = self._segments.get(segment)
        if found is None:
            raise InvalidArgumentError(f"tier {self._spec.name}: segment {segment} is not open")
        return found

    def _find(self, slots: Sequence[int]) -> list[tuple[Segment, int]]:
        found = []
        number, segment = -1, None
        for slot in slots:
            at, index = divmod(slot, SLOTS_PER_SEGMENT)
            if segment is None or at != number:
                number, segment = at, self._segment(at)
            if index >= segment.layout.slots:
                raise InvalidArgumentError(f"slot {slot}: segment {at} has {segment.layout.slots} slots")
            found.append((segment, index))
        return found


def _check(batch: Batch, found: list[tuple[Segment, int]]) -> None:
    if batch.op is Op.DELETE:
        return
    if len(batch.buffers) != len(found):
        raise InvalidArgumentError(f"batch {batch.id}: {len(found)} slots and {len(batch.buffers)} buffers")
    if batch.op is Op.PUT and len(batch.checksums) not in (0, len(found)):
        raise InvalidArgumentError(
            f"batch {batch.id}: {len(found)} slots and {len(batch.checksums)} checksums"
        )
    for buffer, (segment, _) in zip(batch.buffers, found, strict=True):
        if buffer.nbytes != segment.layout.page_bytes or not buffer.contiguous:
            raise InvalidArgumentError(
                f"batch {batch.id}: a buffer of {buffer.nbytes} bytes, slots of {segment.layout.page_bytes}"
            )
        if batch.op is Op.GET and buffer.readonly:
            raise InvalidArgumentError(f"batch {batch.id}: GET into a read-only buffer")


def _work(tasks: _Queue) -> None:
    background()
    while (task := tasks.get()) is not None:
        _run(task)
        del task  # an idle worker must not keep a closed segment mapped


def _run(task: _Task) -> None:
    pending, positions, places = task
    try:
        for at, (segment, index) in zip(positions, places, strict=True):
            pending.outcomes[at] = _one(pending, at, segment, index)
    except Exception as exc:  # noqa: BLE001 - the loop's edge: reported as a fault of what was left
        _log.exception("host store: batch %d failed", pending.batch.id)
        pending.error = f"{type(exc).__name__}: {exc}"
    pending.settle(len(positions) or 1)


def _one(pending: Pending, at: int, segment: Segment, index: int) -> Outcome:
    batch = pending.batch
    if batch.op is Op.DELETE:
        return Outcome.OK if segment.free(index) else Outcome.MISS
    page = segment.page(index)
    outside = np.frombuffer(batch.buffers[at], dtype=np.uint8)
    if batch.op is Op.PUT:
        segment.sealed[index] = 0
        np.copyto(page, outside)
        checksum = xxh3_64_intdigest(cast(bytes, page))
        if batch.checksums and checksum != batch.checksums[at]:
            return Outcome.CORRUPT
        segment.seal(index, checksum)
    else:
        if not segment.sealed[index]:
            return Outcome.MISS
        np.copyto(outside, page)
        checksum = xxh3_64_intdigest(cast(bytes, outside))
        if checksum != int(segment.checksums[index]):
            segment.sealed[index] = 0
            return Outcome.CORRUPT
    pending.checksums[at] = checksum
    return Outcome.OK
