"""The CUDA runtime, by ctypes: memory, streams, events, copies. Return codes are checked, always.

What is called, and how, says ``cuda_abi.py``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

from hicache.device.cuda_abi import (
    BATCH_12,
    CONSTANTS,
    NOT_READY,
    RUNTIME,
    IpcMemHandle,
    Library,
    MemcpyAttributes,
    PointerAttributes,
)
from hicache.device.driver import DriverError, Strips
from hicache.device.kv import IPC_HANDLE_BYTES

_PINNED = CONSTANTS["cudaHostAllocPortable"] | CONSTANTS["cudaHostAllocMapped"]
_READ_ONLY = CONSTANTS["cudaHostRegisterReadOnly"]
_ANY_WAY = CONSTANTS["cudaMemcpyDefault"]  # the direction is told by the addresses
_BATCH_SINCE, _BATCH_13_SINCE = 12080, 13000
_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")


class _Runtime(Library):
    """Versions, errors, devices."""

    declarations = RUNTIME

    def __init__(self, path: str = "") -> None:
        super().__init__(path or _path())
        for name in ("cudaGetErrorString", "cudaGetErrorName"):
            getattr(self._library, name).restype = ctypes.c_char_p
            getattr(self._library, name).argtypes = [ctypes.c_int]
        self.version = self._number("cudaRuntimeGetVersion")
        if self.version < _BATCH_13_SINCE and self.has("cudaMemcpyBatchAsync"):
            self.redeclare("cudaMemcpyBatchAsync", BATCH_12)

    @functools.cached_property
    def has_batch(self) -> bool:
        """Whether ``copy_batch`` works: the runtime and the driver both know of it."""
        oldest = min(self.version, self._number("cudaDriverGetVersion"))
        return oldest >= _BATCH_SINCE and self.has("cudaMemcpyBatchAsync")

    def code(self, name: str, *arguments: object) -> int:
        """See Library. A passing error is not to be met again by another's call, in torch say."""
        found = super().code(name, *arguments)
        if found:
            super().code("cudaGetLastError")
        return found

    def text(self, code: int) -> str:
        """See Library."""
        return str(self._library.cudaGetErrorString(code).decode())

    # --- devices

    def devices(self) -> int:
        """How many; 0 where there is no driver."""
        try:
            return self._number("cudaGetDeviceCount")
        except DriverError:
            return 0

    @property
    def device(self) -> int:
        """The calling thread's."""
        return self._number("cudaGetDevice")

    def use(self, device: int) -> None:
        """cudaSetDevice: makes it the calling thread's, and its context, too."""
        self.call("cudaSetDevice", device)

    def attribute(self, name: str, device: int) -> int:
        """As cudaDeviceGetAttribute does."""
        found = ctypes.c_int()
        self.call("cudaDeviceGetAttribute", ctypes.byref(found), CONSTANTS[name], device)
        return found.value

    def pci_address(self, device: int) -> str:
        """As in ``0000:3b:00.0``, in lower case."""
        found = ctypes.create_string_buffer(32)
        self.call("cudaDeviceGetPCIBusId", found, len(found), device)
        return found.value.decode().lower()

    def device_of(self, address: int) -> int:
        """The device that has this memory; -1 for memory that is none's."""
        found = PointerAttributes()
        self.call("cudaPointerGetAttributes", ctypes.byref(found), address)
        return int(found.device) if found.type == CONSTANTS["cudaMemoryTypeDevice"] else -1

    def _address(self, name: str, *arguments: object) -> int:
        """The address or handle that a call writes through its first parameter."""
        found = ctypes.c_void_p()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value or 0

    def _number(self, name: str) -> int:
        found = ctypes.c_int()
        self.call(name, ctypes.byref(found))
        return found.value


class _Memory(_Runtime):
    """Memory of the device, of the host, and of other processes."""

    def malloc(self, size_bytes: int) -> int:
        """cudaMalloc: plain memory, which CUDA IPC can share."""
        return self._address("cudaMalloc", size_bytes)

    def free(self, address: int) -> None:
        """cudaFree; waits for the device."""
        self.call("cudaFree", address)

    def host_alloc(self, size_bytes: int) -> int:
        """cudaHostAlloc, portable and mapped."""
        return self._address("cudaHostAlloc", size_bytes, _PINNED)

    def free_host(self, address: int) -> None:
        """As cudaFreeHost does."""
        self.call("cudaFreeHost", address)

    def host_register(self, address: int, size_bytes: int, *, read_only: bool = False) -> None:
        """cudaHostRegister, portable and mapped; memory that this process may only read needs ``read_only``."""
        self.call("cudaHostRegister", address, size_bytes, _PINNED | (_READ_ONLY if read_only else 0))

    def host_unregister(self, address: int) -> None:
        """As cudaHostUnregister does."""
        self.call("cudaHostUnregister", address)

    def mapped(self, address: int) -> int:
        """cudaHostGetDevicePointer: where the device sees pinned host memory."""
        return self._address("cudaHostGetDevicePointer", address, 0)

    # --- memory of other processes

    def ipc_handle(self, address: int) -> bytes:
        """cudaIpcGetMemHandle: of the allocation that holds the address."""
        found = IpcMemHandle()
        self.call("cudaIpcGetMemHandle", ctypes.byref(found), address)
        return bytes(found.reserved)

    def ipc_open(self, handle: bytes) -> int:
        """cudaIpcOpenMemHandle: where the allocation begins here."""
        if len(handle) != IPC_HANDLE_BYTES:
            raise DriverError("cudaIpcOpenMemHandle", f"a handle of {len(handle)} bytes")
        given = IpcMemHandle.from_buffer_copy(handle)
        return self._address("cudaIpcOpenMemHandle", given, CONSTANTS["cudaIpcMemLazyEnablePeerAccess"])

    def ipc_close(self, address: int) -> None:
        """As cudaIpcCloseMemHandle does."""
        self.call("cudaIpcCloseMemHandle", address)


class Cudart(_Memory):
    """The runtime library that this process has loaded already, so that there is one and not two.

    Raises OSError where there is none.
    """

    # --- streams and events

    def stream(self, priority: int) -> int:
        """A stream that waits for no other, not even the default one."""
        return self._address("cudaStreamCreateWithPriority", CONSTANTS["cudaStreamNonBlocking"], priority)

    def destroy_stream(self, stream: int) -> None:
        """cudaStreamDestroy; what is queued still runs."""
        self.call("cudaStreamDestroy", stream)

    def event(self) -> int:
        """An event with times."""
        return self._address("cudaEventCreateWithFlags", CONSTANTS["cudaEventDefault"])

    def destroy_event(self, event: int) -> None:
        """As cudaEventDestroy does."""
        self.call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """As cudaEventRecord does."""
        self.call("cudaEventRecord", event, stream)

    def query(self, event: int) -> bool:
        """cudaEventQuery: whether the event is ready."""
        code = self.code("cudaEventQuery", event)
        if code not in {0, NOT_READY}:
            raise self.error("cudaEventQuery", code)
        return not code

    def elapsed_ms(self, first: int, second: int) -> float:
        """Between two ready events."""
        found = ctypes.c_float()
        self.call("cudaEventElapsedTime", ctypes.byref(found), first, second)
        return found.value

    # --- copies

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """As cudaMemcpyAsync does."""
        self.call("cudaMemcpyAsync", target, source, size_bytes, _ANY_WAY, stream)

    def copy_strips(self, strips: Strips, stream: int) -> None:
        """As cudaMemcpy2DAsync does."""
        s = strips
        ends = (s.target, s.target_pitch, s.source, s.source_pitch)
        self.call("cudaMemcpy2DAsync", *ends, s.width_bytes, s.count, _ANY_WAY, stream)

    def copy_batch(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int
    ) -> None:
        """cudaMemcpyBatchAsync, every copy with the same attributes; of none or of empty copies there is no batch."""
        count = len(targets)
        attributes = MemcpyAttributes(srcAccessOrder=CONSTANTS["cudaMemcpySrcAccessOrderStream"])
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        extra = [ctypes.byref(failed)] if self.version < _BATCH_13_SINCE else []
        self.call(
            "cudaMemcpyBatchAsync",
            (ctypes.c_void_p * count)(*targets),
            (ctypes.c_void_p * count)(*sources),
            (ctypes.c_size_t * count)(*sizes),
            count,
            ctypes.byref(attributes),
            ctypes.byref(first),
            1,
            *extra,
            stream,
        )

    def fill(self, address: int, value: int, size_bytes: int, stream: int) -> None:
        """As cudaMemsetAsync does."""
        self.call("cudaMemsetAsync", address, value, size_bytes, stream)


def _path() -> str:
    """The library as it is mapped here (torch brings its own), else whatever the loader finds."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = "/" + line.partition("/")[2]
        if Path(path).name.startswith("libcudart"):
            return path
    for name in _NAMES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    raise OSError(f"no CUDA runtime here: {' nor '.join(_NAMES)}")
