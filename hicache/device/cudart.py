"""The few calls of the CUDA runtime that torch does not offer, by ctypes. Return codes are checked, always.

Signatures: CUDA Runtime API, "Memory Management" and "Unified Addressing", versions 12.8 and 13.0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from hicache.device.driver import DriverError

HOST_PORTABLE, HOST_MAPPED = 1, 2
_COPY_DEFAULT = 4  # the direction is told by the addresses
_BATCH_SINCE = 12080
_ORDER_STREAM = 1  # sources are read in stream order
#: Errors after which the device takes nothing any more are those that a later call repeats; these are not.
_PASSING = {
    1,
    2,
    100,
    101,
    712,
    713,
    801,
}  # invalid value, no memory, no device, (not) registered, not supported


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


class Cudart:
    """The runtime library that this process has loaded already, so that there is one and not two."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(_path())
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        version = ctypes.c_int()
        self._call("cudaRuntimeGetVersion", ctypes.byref(version))
        self.version = version.value
        self.has_batch = version.value >= _BATCH_SINCE and hasattr(self._library, "cudaMemcpyBatchAsync")

    def malloc(self, size_bytes: int) -> int:
        """cudaMalloc: plain memory, which CUDA IPC can share."""
        found = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(found), ctypes.c_size_t(size_bytes))
        return found.value or 0

    def free(self, address: int) -> None:
        """cudaFree; waits for the device."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def host_alloc(self, size_bytes: int) -> int:
        """cudaHostAlloc, portable and mapped."""
        found = ctypes.c_void_p()
        flags = ctypes.c_uint(HOST_PORTABLE | HOST_MAPPED)
        self._call("cudaHostAlloc", ctypes.byref(found), ctypes.c_size_t(size_bytes), flags)
        return found.value or 0

    def free_host(self, address: int) -> None:
        """CudaFreeHost."""
        self._call("cudaFreeHost", ctypes.c_void_p(address))

    def host_register(self, address: int, size_bytes: int) -> None:
        """cudaHostRegister, portable and mapped. The memory must be writable for this process."""
        flags = ctypes.c_uint(HOST_PORTABLE | HOST_MAPPED)
        self._call("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), flags)

    def host_unregister(self, address: int) -> None:
        """CudaHostUnregister."""
        self._call("cudaHostUnregister", ctypes.c_void_p(address))

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """CudaMemcpyAsync."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size_bytes),
            ctypes.c_int(_COPY_DEFAULT),
            ctypes.c_void_p(stream),
        )

    def copy_batch(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int
    ) -> None:
        """cudaMemcpyBatchAsync, every copy with the same attributes. CUDA 13 dropped the parameter failIdx."""
        count = len(targets)
        attributes = _Attributes(order=_ORDER_STREAM)
        first = ctypes.c_size_t(0)
        failed = ctypes.c_size_t(0)
        extra = [ctypes.byref(failed)] if self.version < 13000 else []
        self._call(
            "cudaMemcpyBatchAsync",
            (ctypes.c_void_p * count)(*targets),
            (ctypes.c_void_p * count)(*sources),
            (ctypes.c_size_t * count)(*sizes),
            ctypes.c_size_t(count),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
            *extra,
            ctypes.c_void_p(stream),
        )

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetLastError()  # a passing error is not to be met again by another call
            problem = self._library.cudaGetErrorString(code).decode()
            raise DriverError(name, f"{problem} ({code})", fatal=code not in _PASSING)


def _path() -> str:
    """The library as it is mapped here (torch brings its own), else whatever the loader finds."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if "libcudart" in path:
            return "/" + path
    return "libcudart.so"
