"""The device tier's shared pool on a GPU, as this process sees it: segments by their ids, mapped when first read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from hicache.device.kv import MemoryKind, SharedMemory
from hicache.errors import HicacheError, NotFoundError, StaleError
from hicache.rpc.client.results import Extent, PoolInfo

if TYPE_CHECKING:
    from hicache.device.pools import GpuPool


class Pools:
    """The segments of one session. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._incarnation = 0
        self._infos: dict[int, PoolInfo] = {}
        self._mapped: dict[int, GpuPool] = {}

    @property
    def ids(self) -> set[int]:
        """Of those that the server was heard to list."""
        return set(self._infos)

    def add(self, incarnation: int, infos: Iterable[PoolInfo]) -> None:
        """What the server lists, in that session."""
        with self._lock:
            if incarnation == self._incarnation:
                self._infos.update({info.region.region_id: info for info in infos})

    def begin(self, incarnation: int) -> None:
        """Forget all: this session has begun. Tensors keep what they show mapped."""
        with self._lock:
            self._incarnation = incarnation
            self._infos, self._mapped = {}, {}

    def retire(self, region_id: int, then: Callable[[], None]) -> bool:
        """Forget a segment. False: it was not mapped; else ``then`` is called when it is not mapped any more."""
        with self._lock:
            self._infos.pop(region_id, None)
            pool = self._mapped.pop(region_id, None)
        if pool is None:
            return False
        pool.when_unmapped(then)
        return True

    def find(self, extent: Extent, page_bytes: int) -> tuple[PoolInfo, GpuPool | None]:
        """The segment of an extent. Raises NotFoundError for one that is gone, HicacheError for one that cannot be."""
        with self._lock:
            info, pool = self._infos.get(extent.region_id), self._mapped.get(extent.region_id)
        if info is None:
            raise NotFoundError(
                "the lease points to a region that the server does not list", hint="fetch again"
            )
        region = info.region
        end = extent.offset + (extent.pages - 1) * region.slot_stride + page_bytes
        if page_bytes > region.slot_stride or not 0 <= extent.offset < end <= info.size_bytes:
            raise HicacheError(
                f"the server sent an extent that is not in region {region.region_id}: {extent}"
            )
        return info, pool

    def open(self, info: PoolInfo, incarnation: int, fd: int = -1) -> GpuPool:
        """Map a segment; the descriptor is closed, whatever comes of it. One that is mapped already wins.

        Raises UnsupportedError where it cannot be mapped, StaleError where the session is over.
        """
        from hicache.device.pools import GpuPool

        number = info.region.region_id
        with self._lock:  # one at a time: CUDA may refuse to open a handle twice
            over = incarnation != self._incarnation or number not in self._infos
            if over or number in self._mapped:
                if fd >= 0:
                    os.close(fd)
                if over:
                    raise StaleError("the segment was given back, or the session ended", hint="fetch again")
                return self._mapped[number]
            kind = MemoryKind.CUDA_IPC if info.handle else MemoryKind.CUDA_FD
            pool = GpuPool(SharedMemory(kind, info.size_bytes, info.handle, fd, info.device_uuid))
            self._mapped[number] = pool
            return pool
