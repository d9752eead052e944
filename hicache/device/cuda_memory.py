"""A CUDA device's memory, the host's that it reaches, and other processes'. See ``driver.py``."""

from __future__ import annotations

import ctypes

import numpy as np

from hicache.device.cuda_api import CudaApi
from hicache.device.cudart import Cudart
from hicache.device.driver import Bytes, DriverError
from hicache.errors import UnsupportedError

Libraries = tuple[Cudart, CudaApi]
#: Allocations of a MiB and more are whole blocks of this size: CUDA IPC hands out whole blocks, and what else lay
#: in one would be handed out with it.
BLOCK_BYTES = 2 << 20
_WHOLE_FROM_BYTES = 1 << 20


class CudaMemory:
    """Of device ``index``. Raises UnsupportedError where this machine has no such device.

    A thread may own several devices, so whatever is made says where.
    """

    def __init__(self, index: int, libraries: Libraries | None = None) -> None:
        self._index = index
        self._cudart, self._api = libraries or _load(index)
        devices = self._cudart.devices()
        if index >= devices:
            raise _missing(index, f"CUDA sees {devices} devices")
        self._cudart.use(index)
        self.uuid = self._api.uuid(index)

    def allocate(self, size_bytes: int) -> int:
        """See Driver."""
        self._cudart.use(self._index)
        whole = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        return self._cudart.malloc(whole if size_bytes >= _WHOLE_FROM_BYTES else size_bytes)

    def release(self, address: int) -> None:
        """See Driver."""
        self._cudart.free(address)

    def allocate_host(self, size_bytes: int) -> Bytes:
        """See Driver."""
        self._cudart.use(self._index)
        address = self._cudart.host_alloc(size_bytes)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def release_host(self, memory: Bytes) -> None:
        """See Driver."""
        self._cudart.free_host(memory.ctypes.data)

    def register(self, address: int, size_bytes: int) -> None:
        """See Driver."""
        self._cudart.use(self._index)
        self._cudart.host_register(address, size_bytes)

    def register_read_only(self, address: int, size_bytes: int) -> None:
        """``register`` for memory that this process may only read. Raises DriverError where the device cannot."""
        self._cudart.use(self._index)
        if not self._cudart.attribute("cudaDevAttrHostRegisterReadOnlySupported", self._index):
            raise DriverError("cudaHostRegister", "the device registers no read-only memory")
        self._cudart.host_register(address, size_bytes, read_only=True)

    def unregister(self, address: int) -> None:
        """See Driver."""
        self._cudart.host_unregister(address)

    def mapped(self, address: int) -> int:
        """Where the device sees registered host memory."""
        return self._cudart.mapped(address)

    # --- memory of other processes

    def share(self, address: int) -> bytes:
        """See Driver."""
        return self._cudart.ipc_handle(address)

    def open_shared(self, handle: bytes) -> int:
        """See Driver."""
        self._cudart.use(self._index)
        return self._cudart.ipc_open(handle)

    def close_shared(self, address: int) -> None:
        """See Driver."""
        self._cudart.ipc_close(address)

    def open_exported(self, fd: int, size_bytes: int) -> int:
        """See Driver."""
        self._cudart.use(self._index)
        return self._api.import_fd(fd, size_bytes, self._index)

    def close_exported(self, address: int) -> None:
        """See Driver."""
        self._api.unmap(address)

    def extent(self, address: int) -> tuple[int, int]:
        """Where the allocation that holds an address begins, and its size; also of another process's."""
        self._cudart.use(self._index)
        return self._api.address_range(address)


def _load(index: int) -> Libraries:
    try:
        return Cudart(), CudaApi()
    except (OSError, DriverError) as error:
        raise _missing(index, f"this machine has no CUDA: {error}") from error


def _missing(index: int, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"device 'cuda:{index}': {why}",
        hint="use device 'cpu', or see what nvidia-smi says of the driver",
    )
