"""The CUDA driver's own calls, by ctypes: what the runtime has not. Return codes are checked, always.

The calling thread has a context: it has called the runtime before (``Cudart.use``).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading

from hicache.device.cuda_abi import CONSTANTS, DRIVER, AccessDesc, AllocationProp, Library, MemLocation
from hicache.device.driver import DriverError
from hicache.device.kv import UUID_BYTES

_FD = CONSTANTS["CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR"]
_NAME_BYTES = 256


class CudaApi(Library):
    """libcuda. Raises OSError where there is none, DriverError where it finds no device."""

    declarations = DRIVER

    def __init__(self, path: str = "libcuda.so.1") -> None:
        super().__init__(path)
        self._library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._lock = threading.Lock()
        self._imported: dict[int, int] = {}  # where imported memory is mapped -> its size
        self.call("cuInit", 0)

    def text(self, code: int) -> str:
        """See Library."""
        found = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(found))
        return (found.value or b"unknown error").decode()

    # --- devices

    def uuid(self, device: int) -> bytes:
        """16 bytes."""
        found = (ctypes.c_ubyte * UUID_BYTES)()
        self.call("cuDeviceGetUuid_v2", found, self._device(device))
        return bytes(found)

    def name(self, device: int) -> str:
        """Of the device, for people."""
        found = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", found, _NAME_BYTES, self._device(device))
        return found.value.decode()

    def attribute(self, name: str, device: int) -> int:
        """As cuDeviceGetAttribute does."""
        found = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(found), CONSTANTS[name], self._device(device))
        return found.value

    def _device(self, device: int) -> int:
        found = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(found), device)
        return found.value

    # --- memory

    def address_range(self, address: int) -> tuple[int, int]:
        """Where the allocation that holds an address begins, and its size."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        return base.value, size.value

    def export_fd(self, address: int) -> int:
        """A descriptor of the mapped physical memory that holds an address; the caller closes it.

        Only memory of cuMemCreate has one, and only where it was asked for when the memory was made.
        """
        handle, found = ctypes.c_uint64(), ctypes.c_int(-1)
        self.call("cuMemRetainAllocationHandle", ctypes.byref(handle), address)
        try:
            self.call("cuMemExportToShareableHandle", ctypes.byref(found), handle.value, _FD, 0)
        finally:
            self.call("cuMemRelease", handle.value)
        return found.value

    def import_fd(self, fd: int, size_bytes: int, device: int) -> int:
        """Map memory that was exported by descriptor, which stays open; its address here."""
        where = MemLocation(CONSTANTS["CU_MEM_LOCATION_TYPE_DEVICE"], self._device(device))
        self._check_size(size_bytes, where)
        handle = ctypes.c_uint64()
        self.call("cuMemImportFromShareableHandle", ctypes.byref(handle), fd, _FD)
        try:  # the mapping keeps the memory; the handle is not needed any more
            address = self._map(handle.value, size_bytes, where)
        finally:
            self.call("cuMemRelease", handle.value)
        with self._lock:
            self._imported[address] = size_bytes
        return address

    def unmap(self, address: int) -> None:
        """Undo ``import_fd``."""
        with self._lock:
            size_bytes = self._imported.pop(address, 0)
        if not size_bytes:
            raise DriverError("cuMemUnmap", "no memory was imported there")
        self.call("cuMemUnmap", address, size_bytes)
        self.call("cuMemAddressFree", address, size_bytes)

    def _check_size(self, size_bytes: int, where: MemLocation) -> None:
        wanted = AllocationProp(
            type=CONSTANTS["CU_MEM_ALLOCATION_TYPE_PINNED"], requestedHandleTypes=_FD, location=where
        )
        step = ctypes.c_size_t()
        least = CONSTANTS["CU_MEM_ALLOC_GRANULARITY_MINIMUM"]
        self.call("cuMemGetAllocationGranularity", ctypes.byref(step), ctypes.byref(wanted), least)
        if size_bytes <= 0 or size_bytes % step.value:
            raise DriverError("cuMemMap", f"{size_bytes} bytes are not whole pieces of {step.value}")

    def _map(self, handle: int, size_bytes: int, where: MemLocation) -> int:
        place = ctypes.c_uint64()
        self.call("cuMemAddressReserve", ctypes.byref(place), size_bytes, 0, 0, 0)
        mapped = False
        try:
            self.call("cuMemMap", place.value, size_bytes, 0, handle, 0)
            mapped = True
            access = AccessDesc(where, CONSTANTS["CU_MEM_ACCESS_FLAGS_PROT_READWRITE"])
            self.call("cuMemSetAccess", place.value, size_bytes, ctypes.byref(access), 1)
        except DriverError:
            with contextlib.suppress(DriverError):
                if mapped:
                    self.call("cuMemUnmap", place.value, size_bytes)
                self.call("cuMemAddressFree", place.value, size_bytes)
            raise
        return place.value

    # --- counters in shared memory, by streams

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """The stream goes on when the u64 there is ``value`` or more; address: as the device sees it.

        CUDA compares the difference as a signed number: it would wait for 0 for ever where the counter says FAILED.
        """
        if value <= 0:
            return
        at_least = CONSTANTS["CU_STREAM_WAIT_VALUE_GEQ"]
        self.call("cuStreamWaitValue64_v2", stream, address, value, at_least)

    def write_value(self, stream: int, address: int, value: int) -> None:
        """The stream writes the u64, after all that was queued before is seen."""
        plain = CONSTANTS["CU_STREAM_WRITE_VALUE_DEFAULT"]
        self.call("cuStreamWriteValue64_v2", stream, address, value, plain)
