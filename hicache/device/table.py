"""What every device store does alike: segments, batches in flight, FLUSH, completions. How to copy is their own."""

from __future__ import annotations

import collections
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from hicache.device.kv import SharedMemory
from hicache.device.loans import Loan
from hicache.device.plan import Extent, locate, plan
from hicache.device.result import Result
from hicache.device.segment import Columns, Layout, Sums
from hicache.device.store import check_room
from hicache.errors import InvalidArgumentError, UnavailableError, UnsupportedError
from hicache.types import Batch, Completion, Notify, Op, TierSpec, slot_stride

S = TypeVar("S", bound=Columns)


class Lends(Generic[S]):
    """A store whose slots transfers may read where they lie."""

    _lock: threading.Lock
    _segments: dict[int, S]

    def lend(self, slots: Sequence[int]) -> Loan:
        """Some slots. Raises InvalidArgumentError for those of no open segment."""
        with self._lock:
            extents = locate(slots, self._segments)
        return Loan(extents, len(slots), self._lock)


class SegmentTable(ABC, Lends[S]):
    """A store's segments and the batches that move their pages. One thread owns it: all calls come from there.

    A store adds ``open_segment``, ``close`` and the two that start work. It calls ``_finish`` once for each batch that
    was started, from whatever thread.
    """

    #: What a FLUSH passes through.
    lanes = 2

    def __init__(self, spec: TierSpec, notify: Notify) -> None:
        self._spec = spec
        self._notify = notify
        self._lock = threading.Lock()  # the segments' columns and counts
        self._segments: dict[int, S] = {}
        self._done: collections.deque[Completion] = collections.deque()
        self._closed = False
        self._memory_bytes = spec.segment_bytes  # of one segment

    @property
    def problem(self) -> str:
        """Why the device was given up; empty while it serves."""
        return ""

    @abstractmethod
    def _start(self, extents: list[Extent[S]], result: Result) -> None:
        """Move a batch's pages, then ``_finish``."""

    @abstractmethod
    def shared(self, segment: int) -> SharedMemory:
        """See DeviceStore."""

    @abstractmethod
    def _pass(self, batch: Batch, then: Callable[[], None]) -> None:
        """Call ``then`` once a lane, when all that it was given before is done."""

    # --- segments

    def _check_room(self, segment: int, page_bytes: int, slots: int) -> None:
        """What ``open_segment`` asks first."""
        self._check_open()
        check_room(self._spec, segment, page_bytes, slots, self._segments)

    def _take_out(self, segment: int) -> S:
        """The segment, which is open no more. Raises as ``close_segment`` does."""
        found = self._segment(segment)
        with self._lock:
            moving = found.batches_in_flight
        if moving:
            raise InvalidArgumentError(
                f"segment {segment}: {moving} batches move its pages", hint="close it after their completions"
            )
        with self._lock:
            found.empty(np.arange(found.slots))  # loans learn of it
        return self._segments.pop(segment)

    def layout(self, segment: int) -> Layout:
        """See DeviceStore."""
        found = self._segment(segment)
        return Layout(self._memory_bytes, found.page_bytes, found.slots, slot_stride(found.page_bytes))

    def fd(self, segment: int) -> int:
        """See DeviceStore."""
        fd = self.shared(segment).fd
        if fd < 0:
            raise UnsupportedError(
                f"segment {segment}: its memory is mapped by its handle, not by a descriptor"
            )
        return fd

    def columns(self, slots: Sequence[int]) -> tuple[Sums, Sums]:
        """See DeviceStore."""
        checksums, generations = np.zeros(len(slots), np.uint64), np.zeros(len(slots), np.uint64)
        with self._lock:
            for extent in locate(slots, self._segments):
                checksums[extent.positions] = extent.segment.checksums[extent.indices]
                generations[extent.positions] = extent.segment.writes[extent.indices]
        return checksums, generations

    def _segment(self, segment: int) -> S:
        found = self._segments.get(segment)
        if found is None:
            raise InvalidArgumentError(f"segment {segment} is not open")
        return found

    def free(self, slots: Sequence[int]) -> None:
        """See DeviceStore."""
        with self._lock:
            for extent in locate(slots, self._segments):
                extent.segment.empty(extent.indices)
                extent.segment.frees[extent.indices] += np.uint32(1)

    # --- the port

    def submit(self, batch: Batch) -> None:
        """Queue a batch. Raises InvalidArgumentError where it does not fit, UnavailableError once closed."""
        self._check_open()
        if batch.op is Op.FLUSH:
            self._pass(batch, self._latch(batch))
            return
        with self._lock:
            extents = plan(batch, self._segments)
            for extent in extents:
                extent.segment.batches_in_flight += 1
        self._start(extents, Result(batch))

    def check(self, batch: Batch) -> None:
        """Raise InvalidArgumentError for a batch that ``submit`` would refuse."""
        if batch.op is not Op.FLUSH:
            with self._lock:
                plan(batch, self._segments)

    def poll(self) -> list[Completion]:
        """Completions since the last call, in order within a lane; never blocks."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError(f"tier {self._spec.name!r} is closed")

    # --- from any thread

    def _finish(self, extents: list[Extent[S]], result: Result) -> None:
        """A batch is done."""
        with self._lock:
            for extent in extents:
                extent.segment.batches_in_flight -= 1
        self._complete(result.completion())

    def _latch(self, batch: Batch) -> Callable[[], None]:
        """Completes the batch when it has been called by every lane."""
        waiting = self.lanes

        def pass_by() -> None:
            nonlocal waiting
            with self._lock:
                waiting -= 1
                last = not waiting
            if last:
                self._complete(Completion(batch.id, ()))

        return pass_by

    def _complete(self, completion: Completion) -> None:
        self._done.append(completion)
        self._notify()


def require_sharing(spec: TierSpec, *, on: bool) -> None:
    """Raise UnsupportedError where the store does not share its memory."""
    if not on:
        raise UnsupportedError(
            f"tier {spec.name!r} does not share its memory", hint="start with --share-device"
        )
