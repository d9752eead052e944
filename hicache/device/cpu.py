"""A device store in ordinary memory that behaves like a CUDA one.

Two threads are the two copy streams, one a direction. What ``poll`` gives is what the streams have finished,
as if events had been queried. The copies themselves are in ``copies.py``.
"""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hicache.device import copies
from hicache.device.copies import Staging
from hicache.device.plan import Extent, locate, plan
from hicache.device.result import Result
from hicache.device.segment import Segment
from hicache.device.store import DeviceOptions, check_room
from hicache.device.streams import CopyStream
from hicache.errors import ExhaustedError, InvalidArgumentError, UnavailableError
from hicache.types import Batch, Completion, Notify, Op, TierSpec

Step = Callable[[Extent[Segment], Result, Staging, threading.Lock], None]
STEPS: dict[Op, Step] = {Op.PUT: copies.put, Op.GET: copies.get, Op.DELETE: copies.delete}


class CpuDevice:
    """The DeviceStore of ``cpu``. One thread owns it: all calls come from there."""

    def __init__(self, spec: TierSpec, notify: Notify, options: DeviceOptions) -> None:
        self._spec = spec
        self._notify = notify
        self._lock = threading.Lock()  # the segments' columns and counts
        self._segments: dict[int, Segment] = {}
        self._done: collections.deque[Completion] = collections.deque()
        self._closed = False
        self._put_staging = Staging(options.staging_bytes)
        self._get_staging = Staging(options.staging_bytes)
        threads = torch.get_num_threads()
        self._writes = CopyStream(f"hicache-{spec.name}-put", _use_one_core)
        self._reads = CopyStream(f"hicache-{spec.name}-get", _use_one_core)
        torch.set_num_threads(threads)  # the streams keep theirs; threads to come get the process's again

    # --- segments ------------------------------------------------------------------------------------------

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """See DeviceStore."""
        self._check_open()
        check_room(self._spec, segment, page_bytes, slots, self._segments)
        try:
            opened = Segment(domain, page_bytes, slots)
        except RuntimeError as error:
            raise ExhaustedError(f"no memory for segment {segment}: {error}") from error
        self._segments[segment] = opened

    def close_segment(self, segment: int) -> None:
        """See DeviceStore."""
        found = self._segments.get(segment)
        if found is None:
            raise InvalidArgumentError(f"segment {segment} is not open")
        with self._lock:
            moving = found.batches_in_flight
        if moving:
            raise InvalidArgumentError(
                f"segment {segment}: {moving} batches move its pages", hint="close it after their completions"
            )
        del self._segments[segment]

    def free(self, slots: Sequence[int]) -> None:
        """See DeviceStore."""
        with self._lock:
            for extent in locate(slots, self._segments):
                extent.segment.empty(extent.indices)
                extent.segment.frees[extent.indices] += np.uint32(1)

    # --- the port ------------------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        """Queue a batch. Raises InvalidArgumentError where it does not fit, UnavailableError once closed."""
        self._check_open()
        if batch.op is Op.FLUSH:
            self._flush(batch)
            return
        with self._lock:
            extents = plan(batch, self._segments)
            for extent in extents:
                extent.segment.batches_in_flight += 1
        stream, staging = self._writes, self._put_staging
        if batch.op is Op.GET:
            stream, staging = self._reads, self._get_staging
        stream.launch(functools.partial(self._move, extents, Result(batch), staging))

    def poll(self) -> list[Completion]:
        """Completions since the last call, in order within a stream; never blocks."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self) -> None:
        """Finish what was submitted, end the streams, give all memory back. ``poll`` still gives the rest."""
        if self._closed:
            return
        self._closed = True
        self._writes.close()
        self._reads.close()
        self._segments.clear()
        self._put_staging = self._get_staging = Staging(0)

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError(f"tier {self._spec.name!r} is closed")

    # --- on the streams ------------------------------------------------------------------------------------

    def _move(self, extents: list[Extent[Segment]], result: Result, staging: Staging) -> None:
        for extent in extents:
            try:
                STEPS[result.batch.op](extent, result, staging, self._lock)
            except copies.COPY_FAULTS as error:
                result.fault(f"{type(error).__name__}: {error}")
        with self._lock:
            for extent in extents:
                extent.segment.batches_in_flight -= 1
        self._complete(result)

    def _flush(self, batch: Batch) -> None:
        streams = [self._writes, self._reads]
        waiting = len(streams)

        def pass_by() -> None:
            nonlocal waiting
            with self._lock:
                waiting -= 1
                last = not waiting
            if last:
                self._done.append(Completion(batch.id, ()))
                self._notify()

        for stream in streams:
            stream.launch(pass_by)

    def _complete(self, result: Result) -> None:
        self._done.append(result.completion())
        self._notify()


def _use_one_core() -> None:
    """Give this thread's torch calls one core.

    torch's OpenMP teams slow down by orders of magnitude when others take the cores, as they do in a sidecar.
    ``get_num_threads`` comes first: a thread's first torch call would otherwise overwrite the setting.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
