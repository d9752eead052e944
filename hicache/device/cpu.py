"""A device store in ordinary memory that behaves like a CUDA one.

Two threads are the two copy streams, one a direction. What ``poll`` gives is what the streams have finished,
as if events had been queried. The copies themselves are in ``copies.py``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch

from hicache.device import copies
from hicache.device.copies import Staging
from hicache.device.kv import MemoryKind, SharedMemory
from hicache.device.plan import Extent
from hicache.device.result import Result
from hicache.device.segment import Segment
from hicache.device.store import DeviceOptions
from hicache.device.streams import CopyStream
from hicache.device.table import SegmentTable, require_sharing
from hicache.errors import ExhaustedError
from hicache.sealed import SealedMemory
from hicache.types import Batch, Notify, Op, TierSpec

Step = Callable[[Extent[Segment], Result, Staging, threading.Lock], None]
STEPS: dict[Op, Step] = {Op.PUT: copies.put, Op.GET: copies.get, Op.DELETE: copies.delete}


class CpuDevice(SegmentTable[Segment]):
    """The DeviceStore of ``cpu``."""

    def __init__(self, spec: TierSpec, notify: Notify, options: DeviceOptions) -> None:
        super().__init__(spec, notify)
        self.name = "cpu"
        self._share = options.share
        self._put_staging = Staging(options.staging_bytes)
        self._get_staging = Staging(options.staging_bytes)
        threads = torch.get_num_threads()
        self._writes = CopyStream(f"hicache-{spec.name}-put", _use_one_core)
        self._reads = CopyStream(f"hicache-{spec.name}-get", _use_one_core)
        torch.set_num_threads(threads)  # the streams keep theirs; threads to come get the process's again

    # --- segments

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """See DeviceStore."""
        self._check_room(segment, page_bytes, slots)
        try:
            memory = SealedMemory("hicache-device", self._memory_bytes) if self._share else None
            opened = Segment(domain, page_bytes, slots, memory)
        except (OSError, MemoryError) as error:
            raise ExhaustedError(f"no memory for segment {segment}: {error}") from error
        self._segments[segment] = opened

    def close_segment(self, segment: int, *, reusable: bool = True) -> None:
        """See DeviceStore. The memory goes back to the system, so that it need not be fit for another segment."""
        found = self._take_out(segment)
        if found.shared is not None:
            found.shared.close()

    def shared(self, segment: int) -> SharedMemory:
        """See DeviceStore."""
        require_sharing(self._spec, on=self._share)
        memory = self._segment(segment).shared
        assert memory is not None, "a store that shares has a segment that it cannot share"
        return SharedMemory(MemoryKind.MEMFD, memory.size_bytes, fd=memory.fd)

    # --- the port

    def settle(self) -> None:
        """Finish what was submitted; from now on only ``poll`` and ``close`` are called. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._writes.close()
        self._reads.close()

    def close(self) -> None:
        """Finish what was submitted, end the streams, give all memory back. ``poll`` still gives the rest."""
        self.settle()
        for segment in self._segments.values():
            if segment.shared is not None:
                segment.shared.close()
        self._segments.clear()
        self._put_staging = self._get_staging = Staging(0)

    def _start(self, extents: list[Extent[Segment]], result: Result) -> None:
        stream, staging = self._writes, self._put_staging
        if result.batch.op is Op.GET:
            stream, staging = self._reads, self._get_staging
        stream.launch(functools.partial(self._move, extents, result, staging))

    def _pass(self, batch: Batch, then: Callable[[], None]) -> None:
        for stream in (self._writes, self._reads):
            stream.launch(then)

    # --- on the streams

    def _move(self, extents: list[Extent[Segment]], result: Result, staging: Staging) -> None:
        for extent in extents:
            try:
                STEPS[result.batch.op](extent, result, staging, self._lock)
            except copies.COPY_FAULTS as error:
                result.fault(f"{type(error).__name__}: {error}")
        self._finish(extents, result)


def _use_one_core() -> None:
    """Give this thread's torch calls one core.

    torch's OpenMP teams slow down by orders of magnitude when others take the cores, as they do in a sidecar.
    ``get_num_threads`` comes first: a thread's first torch call would otherwise overwrite the setting.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
