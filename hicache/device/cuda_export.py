"""What CUDA says of memory that this process has on one device, so that another process can map it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hicache.device.cuda_api import CudaApi
from hicache.device.cudart import Cudart
from hicache.device.driver import DriverError
from hicache.errors import UnsupportedError


class CudaExporter:
    """Device ``index`` of this process. Raises UnsupportedError where CUDA cannot be reached.

    The calling thread's device is as it was after each call: it is the engine's.
    """

    def __init__(self, index: int, libraries: tuple[Cudart, CudaApi] | None = None) -> None:
        self._index = index
        try:
            self._cudart, self._api = libraries or (Cudart(), CudaApi())
        except (OSError, DriverError) as error:
            raise UnsupportedError(f"CUDA cannot be reached: {error}") from error

    def allocation(self, address: int) -> tuple[int, int]:
        """Where the allocation that holds an address begins, and its size. Raises DriverError."""
        with self._device():
            return self._api.address_range(address)

    def handle(self, base: int) -> bytes:
        """Its IPC handle. Raises DriverError where it has none, as memory of cuMemCreate."""
        with self._device():
            return self._cudart.ipc_handle(base)

    def descriptor(self, base: int) -> int:
        """A descriptor of it, the caller's to close. Raises DriverError where it has none, as cudaMalloc's."""
        with self._device():
            return self._api.export_fd(base)

    def device_uuid(self) -> bytes:
        """16 bytes."""
        return self._api.uuid(self._index)

    @contextlib.contextmanager
    def _device(self) -> Iterator[None]:
        before = self._cudart.device
        self._cudart.use(self._index)
        try:
            yield
        finally:
            if before != self._index:
                self._cudart.use(before)
