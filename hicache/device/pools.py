"""Segments of a device tier's shared pool, mapped into an engine's process, and seen as tensors in place.

The sidecar's pool is read here and never written: nothing but the lease says that its pages are still what they were.
Has not run on a GPU yet, only on the CUDA of the tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from hicache.device.cuda_api import CudaApi
from hicache.device.cudart import Cudart
from hicache.device.driver import DriverError
from hicache.device.kv import MemoryKind, SharedMemory
from hicache.errors import UnsupportedError


class GpuPool:
    """One segment. It is unmapped when nothing refers to it any more; tensors of it do."""

    def __init__(self, memory: SharedMemory) -> None:
        """A descriptor is closed, whatever comes of it. Raises UnsupportedError where it cannot be mapped here."""
        import torch

        try:
            try:
                self._cudart, self._api = Cudart(), CudaApi()
                self.device = self._find(memory.device_uuid)
                with torch.cuda.device(self.device):  # the thread's own afterwards again
                    self.address = self._open(memory)
            except (OSError, DriverError) as error:
                raise UnsupportedError(
                    f"the device tier's memory cannot be mapped here: {error}",
                    hint="see the same GPU as the sidecar, and share its IPC namespace; or let it copy (Lease.load)",
                ) from error
        finally:
            if memory.fd >= 0:
                os.close(memory.fd)
        self.size_bytes = memory.size_bytes
        by_handle = memory.kind is MemoryKind.CUDA_IPC
        unmap = self._cudart.ipc_close if by_handle else self._api.unmap
        self._then: list[Callable[[], None]] = []
        weakref.finalize(
            self, _close, self.device, functools.partial(unmap, self.address), self._then
        ).atexit = False

    def when_unmapped(self, then: Callable[[], None]) -> None:
        """Call this when nothing refers to it any more and it is unmapped, from any thread."""
        self._then.append(then)

    def rows(self, offset: int, rows: int, row_bytes: int, stride_bytes: int) -> Any:
        """Rows in place: a uint8 tensor of shape (rows, row_bytes) on the device, which keeps the segment mapped."""
        import torch

        return torch.as_tensor(
            _Rows(self, offset, (rows, row_bytes), stride_bytes), device=torch.device("cuda", self.device)
        )

    def _find(self, uuid: bytes) -> int:
        for device in range(self._cudart.devices()):
            if self._api.uuid(device) == uuid:
                return device
        raise DriverError("cuDeviceGetUuid", f"this process does not see GPU {uuid.hex()}")

    def _open(self, memory: SharedMemory) -> int:
        if memory.kind is MemoryKind.CUDA_IPC:
            return self._cudart.ipc_open(memory.handle)
        return self._api.import_fd(memory.fd, memory.size_bytes, self.device)


class _Rows:
    """What torch makes a tensor of, and keeps as long as the tensor: __cuda_array_interface__, version 3."""

    def __init__(self, pool: GpuPool, offset: int, shape: tuple[int, int], stride_bytes: int) -> None:
        self.pool = pool
        self.__cuda_array_interface__ = {
            "shape": shape,
            "strides": (stride_bytes, 1),
            "typestr": "|u1",
            "data": (pool.address + offset, False),
            "version": 3,
        }


def _close(device: int, unmap: Callable[[], None], then: Sequence[Callable[[], None]]) -> None:
    import torch

    with contextlib.suppress(DriverError), torch.cuda.device(device):  # it may be broken
        unmap()
    for each in then:
        each()
