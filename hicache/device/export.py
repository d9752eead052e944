"""An engine's CUDA tensors as memory that another process can map.

    cudaMalloc (torch's usual pool)      -> CUDA_IPC, of the allocation's start
    cuMemCreate with a posix descriptor  -> CUDA_FD
    anything else, expandable segments   -> UnsupportedError

The calls are made in the process that owns the tensors.
"""

from __future__ import annotations

from typing import Any, Protocol

from hicache.device.driver import DriverError
from hicache.device.kv import MemoryKind, SharedMemory
from hicache.errors import UnsupportedError


class Exporter(Protocol):
    """What the CUDA of this process says of one device's memory; ``CudaExporter`` asks it, tests stand in for it."""

    def allocation(self, address: int) -> tuple[int, int]:
        """Where the allocation that holds an address begins, and its size. Raises DriverError."""

    def handle(self, base: int) -> bytes:
        """Its IPC handle. Raises DriverError where it has none."""

    def descriptor(self, base: int) -> int:
        """A descriptor of it, the caller's to close. Raises DriverError where it has none."""

    def device_uuid(self) -> bytes:
        """16 bytes."""


class Allocations:
    """The allocations of some tensors of one device, each exported once: ``found``, by where they begin here."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self.found: dict[int, SharedMemory] = {}

    def of(self, address: int, span_bytes: int) -> tuple[int, SharedMemory, int]:
        """The allocation of these bytes: where it begins here, how another process maps it, and their offset in it.

        Raises UnsupportedError for memory that cannot be handed on.
        """
        try:
            base, size_bytes = self._exporter.allocation(address)
        except DriverError as error:
            raise _refused(f"it lies in no allocation that CUDA names: {error}") from None
        if address + span_bytes > base + size_bytes:
            raise _refused(f"{span_bytes} bytes lie in more than one allocation")
        if base not in self.found:
            self.found[base] = self._export(base, size_bytes)
        return base, self.found[base], address - base

    def _export(self, base: int, size_bytes: int) -> SharedMemory:
        uuid = self._exporter.device_uuid()
        try:
            handle = self._exporter.handle(base)
        except DriverError as no_handle:
            try:
                fd = self._exporter.descriptor(base)
            except DriverError as error:
                raise _refused(f"{no_handle}; {error}") from None
            return SharedMemory(MemoryKind.CUDA_FD, size_bytes, fd=fd, device_uuid=uuid)
        return SharedMemory(MemoryKind.CUDA_IPC, size_bytes, handle=handle, device_uuid=uuid)


def _refused(why: str) -> UnsupportedError:
    return UnsupportedError(
        f"the KV cache's GPU memory cannot be handed to another process: {why}",
        hint="expandable segments cannot be shared: start the engine without expandable_segments in"
        " PYTORCH_CUDA_ALLOC_CONF, or allocate the KV cache while it is off; or use the client's copier, which needs"
        " no sharing",
    )


def exporter_of(tensor: Any) -> Exporter:
    """What exports the memory of a CUDA tensor's device. Raises UnsupportedError where CUDA cannot be reached."""
    from hicache.device.cuda_export import CudaExporter

    return CudaExporter(tensor.device.index or 0)
