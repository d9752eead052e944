"""What the CUDA driver says of this process's memory, for ``export``. Has not run on a GPU yet.

Signatures: CUDA Driver API, "Memory Management" and "Virtual Memory Management", versions 12.0 and later.
"""

from __future__ import annotations

import ctypes

from hicache.device.driver import DriverError
from hicache.device.kv import IPC_HANDLE_BYTES, UUID_BYTES
from hicache.errors import UnsupportedError

_POSIX_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


class CudaExporter:
    """One device of this process."""

    def __init__(self, device: int) -> None:
        """Raises UnsupportedError where this process has no CUDA."""
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise UnsupportedError(f"no CUDA in this process: {error}") from None
        self._device = device

    def allocation(self, address: int) -> tuple[int, int]:
        """As Exporter has it."""
        base, size_bytes = ctypes.c_uint64(), ctypes.c_size_t()
        self._call(
            "cuMemGetAddressRange_v2",
            ctypes.byref(base),
            ctypes.byref(size_bytes),
            ctypes.c_uint64(address),
        )
        return base.value, size_bytes.value

    def handle(self, base: int) -> bytes:
        """As Exporter has it."""
        handle = (ctypes.c_char * IPC_HANDLE_BYTES)()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        return handle.raw

    def descriptor(self, base: int) -> int:
        """As Exporter has it."""
        allocation, fd = ctypes.c_uint64(), ctypes.c_int(-1)
        self._call("cuMemRetainAllocationHandle", ctypes.byref(allocation), ctypes.c_void_p(base))
        try:
            self._call(
                "cuMemExportToShareableHandle",
                ctypes.byref(fd),
                allocation,
                ctypes.c_int(_POSIX_FD),
                ctypes.c_ulonglong(0),
            )
        finally:
            self._call("cuMemRelease", allocation)
        return fd.value

    def device_uuid(self) -> bytes:
        """As Exporter has it."""
        device, uuid = ctypes.c_int(), (ctypes.c_char * UUID_BYTES)()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(self._device))
        self._call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
        return uuid.raw

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise DriverError(name, f"error {code}")
