"""What of the CUDA runtime and driver is called here: declarations, constants, structures, and how they are called.

Declarations are those of the C headers, parameter types only; the types that ctypes is given are read from them. A
test compiles every one of them against the headers of a CUDA toolkit, where there is one, and compares constants,
sizes and offsets. CUDA 12.8 and 13.0.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

from hicache.device.driver import DriverError

RUNTIME = {
    "cudaRuntimeGetVersion": "int *",
    "cudaDriverGetVersion": "int *",
    "cudaGetDeviceCount": "int *",
    "cudaGetDevice": "int *",
    "cudaSetDevice": "int",
    "cudaDeviceGetAttribute": "int *, enum cudaDeviceAttr, int",
    "cudaDeviceGetPCIBusId": "char *, int, int",
    "cudaMalloc": "void **, size_t",
    "cudaFree": "void *",
    "cudaHostAlloc": "void **, size_t, unsigned int",
    "cudaFreeHost": "void *",
    "cudaHostRegister": "void *, size_t, unsigned int",
    "cudaHostUnregister": "void *",
    "cudaHostGetDevicePointer": "void **, void *, unsigned int",
    "cudaPointerGetAttributes": "struct cudaPointerAttributes *, const void *",
    "cudaStreamCreateWithPriority": "cudaStream_t *, unsigned int, int",
    "cudaStreamDestroy": "cudaStream_t",
    "cudaEventCreateWithFlags": "cudaEvent_t *, unsigned int",
    "cudaEventDestroy": "cudaEvent_t",
    "cudaEventRecord": "cudaEvent_t, cudaStream_t",
    "cudaEventQuery": "cudaEvent_t",
    "cudaEventElapsedTime": "float *, cudaEvent_t, cudaEvent_t",
    "cudaMemcpyAsync": "void *, const void *, size_t, enum cudaMemcpyKind, cudaStream_t",
    "cudaMemcpy2DAsync": "void *, size_t, const void *, size_t, size_t, size_t, enum cudaMemcpyKind,"
    " cudaStream_t",
    "cudaMemcpyBatchAsync": "void *const *, const void *const *, const size_t *, size_t,"
    " struct cudaMemcpyAttributes *, size_t *, size_t, cudaStream_t",
    "cudaMemsetAsync": "void *, int, size_t, cudaStream_t",
    "cudaIpcGetMemHandle": "cudaIpcMemHandle_t *, void *",
    "cudaIpcOpenMemHandle": "void **, cudaIpcMemHandle_t, unsigned int",
    "cudaIpcCloseMemHandle": "void *",
    "cudaGetLastError": "void",
}
#: Before CUDA 13 there was one parameter more, ``failIdx``.
BATCH_12 = "void **, void **, size_t *, size_t, struct cudaMemcpyAttributes *, size_t *, size_t, size_t *, cudaStream_t"
DRIVER = {
    "cuInit": "unsigned int",
    "cuDeviceGet": "CUdevice *, int",
    "cuDeviceGetAttribute": "int *, CUdevice_attribute, CUdevice",
    "cuDeviceGetUuid_v2": "CUuuid *, CUdevice",
    "cuDeviceGetName": "char *, int, CUdevice",
    "cuMemGetAddressRange_v2": "CUdeviceptr *, size_t *, CUdeviceptr",
    "cuMemGetAllocationGranularity": "size_t *, const CUmemAllocationProp *, CUmemAllocationGranularity_flags",
    "cuMemRetainAllocationHandle": "CUmemGenericAllocationHandle *, void *",
    "cuMemExportToShareableHandle": "void *, CUmemGenericAllocationHandle, CUmemAllocationHandleType,"
    " unsigned long long",
    "cuMemImportFromShareableHandle": "CUmemGenericAllocationHandle *, void *, CUmemAllocationHandleType",
    "cuMemAddressReserve": "CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long",
    "cuMemMap": "CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long",
    "cuMemSetAccess": "CUdeviceptr, size_t, const CUmemAccessDesc *, size_t",
    "cuMemUnmap": "CUdeviceptr, size_t",
    "cuMemAddressFree": "CUdeviceptr, size_t",
    "cuMemRelease": "CUmemGenericAllocationHandle",
    "cuStreamWaitValue64_v2": "CUstream, CUdeviceptr, cuuint64_t, unsigned int",
    "cuStreamWriteValue64_v2": "CUstream, CUdeviceptr, cuuint64_t, unsigned int",
}

#: Constants of the headers, by their names there.
CONSTANTS = {
    "cudaHostAllocPortable": 1,
    "cudaHostAllocMapped": 2,
    "cudaHostRegisterPortable": 1,
    "cudaHostRegisterMapped": 2,
    "cudaHostRegisterReadOnly": 8,
    "cudaMemcpyDefault": 4,
    "cudaMemcpySrcAccessOrderStream": 1,
    "cudaStreamNonBlocking": 1,
    "cudaEventDefault": 0,
    "cudaIpcMemLazyEnablePeerAccess": 1,
    "cudaDevAttrHostRegisterReadOnlySupported": 113,
    "cudaMemoryTypeDevice": 2,
    "CUDA_IPC_HANDLE_SIZE": 64,
    "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR": 1,
    "CU_MEM_ALLOCATION_TYPE_PINNED": 1,
    "CU_MEM_LOCATION_TYPE_DEVICE": 1,
    "CU_MEM_ACCESS_FLAGS_PROT_READWRITE": 3,
    "CU_MEM_ALLOC_GRANULARITY_MINIMUM": 0,
    "CU_STREAM_WAIT_VALUE_GEQ": 0,
    "CU_STREAM_WRITE_VALUE_DEFAULT": 0,
    "CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS": 122,
    "cudaErrorNotReady": 600,
}
#: Errors that say no to one call. After any other the device is taken for lost: CUDA repeats those for ever.
PASSING = {
    "cudaErrorInvalidValue": 1,
    "cudaErrorMemoryAllocation": 2,
    "cudaErrorInvalidPitchValue": 12,
    "cudaErrorCallRequiresNewerDriver": 36,
    "cudaErrorNoDevice": 100,
    "cudaErrorInvalidDevice": 101,
    "cudaErrorDeviceUninitialized": 201,  # also what opening a handle of one's own process gives
    "cudaErrorMapBufferObjectFailed": 205,
    "cudaErrorAlreadyMapped": 208,
    "cudaErrorPeerAccessUnsupported": 217,
    "cudaErrorOperatingSystem": 304,
    "cudaErrorInvalidResourceHandle": 400,
    "cudaErrorPeerAccessAlreadyEnabled": 704,
    "cudaErrorTooManyPeers": 711,
    "cudaErrorHostMemoryAlreadyRegistered": 712,
    "cudaErrorHostMemoryNotRegistered": 713,
    "cudaErrorNotPermitted": 800,
    "cudaErrorNotSupported": 801,
}
_PASSING = frozenset(PASSING.values())
NOT_READY = CONSTANTS["cudaErrorNotReady"]


class MemLocation(ctypes.Structure):
    """cudaMemLocation and CUmemLocation, as CUDA 12.8 and 13.0 have it."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class MemcpyAttributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_int),
        ("srcLocHint", MemLocation),
        ("dstLocHint", MemLocation),
        ("flags", ctypes.c_uint),
    )


class IpcMemHandle(ctypes.Structure):
    """cudaIpcMemHandle_t, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class PointerAttributes(ctypes.Structure):
    """cudaPointerAttributes. CUDA 13 appended eight longs; a 12 leaves them alone."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("devicePointer", ctypes.c_void_p),
        ("hostPointer", ctypes.c_void_p),
        ("reserved", ctypes.c_long * 8),
    )


class AllocationFlags(ctypes.Structure):
    """CUmemAllocationProp.allocFlags."""

    _fields_ = (
        ("compressionType", ctypes.c_ubyte),
        ("gpuDirectRDMACapable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class AllocationProp(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requestedHandleTypes", ctypes.c_int),
        ("location", MemLocation),
        ("win32HandleMetaData", ctypes.c_void_p),
        ("allocFlags", AllocationFlags),
    )


class AccessDesc(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", MemLocation), ("flags", ctypes.c_int))


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "struct cudaMemLocation": MemLocation,
    "CUmemLocation": MemLocation,
    "struct cudaMemcpyAttributes": MemcpyAttributes,
    "cudaIpcMemHandle_t": IpcMemHandle,
    "struct cudaPointerAttributes": PointerAttributes,
    "CUmemAllocationProp": AllocationProp,
    "CUmemAccessDesc": AccessDesc,
}
_TYPES: dict[str, Any] = {
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "size_t": ctypes.c_size_t,
    "unsigned long long": ctypes.c_ulonglong,
    "cuuint64_t": ctypes.c_uint64,
    "CUdeviceptr": ctypes.c_uint64,
    "CUmemGenericAllocationHandle": ctypes.c_uint64,
    "CUdevice": ctypes.c_int,
    "cudaStream_t": ctypes.c_void_p,
    "CUstream": ctypes.c_void_p,
    "cudaEvent_t": ctypes.c_void_p,
    "cudaIpcMemHandle_t": IpcMemHandle,
}


def argument_types(declaration: str) -> list[Any]:
    """What ctypes is told of a declaration: pointers are addresses, enumerations are ints."""
    names = [name.strip() for name in declaration.split(",")]
    if names == ["void"]:
        return []
    return [ctypes.c_void_p if "*" in name else _TYPES.get(name, ctypes.c_int) for name in names]


class Library:
    """A shared library of which every call returns an error code, 0 where all is well. Return codes are checked."""

    declarations: ClassVar[dict[str, str]]

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        self._functions = {
            name: self._declare(name, text)
            for name, text in self.declarations.items()
            if hasattr(self._library, name)
        }

    def has(self, name: str) -> bool:
        """Whether this version of the library has the function."""
        return name in self._functions

    def redeclare(self, name: str, declaration: str) -> None:
        """The function as another version has it."""
        self._functions[name] = self._declare(name, declaration)

    def call(self, name: str, *arguments: object) -> None:
        """Raises DriverError for any code but 0."""
        code = self.code(name, *arguments)
        if code:
            raise self.error(name, code)

    def code(self, name: str, *arguments: object) -> int:
        """What a call returned."""
        function = self._functions.get(name)
        if function is None:
            raise DriverError(name, f"{self.path} has no such function")
        return int(function(*arguments))

    def error(self, name: str, code: int) -> DriverError:
        """What a code means."""
        return DriverError(name, f"{self.text(code)} ({code})", fatal=code not in _PASSING)

    def text(self, code: int) -> str:
        """A code in words."""
        return f"error {code}"

    def _declare(self, name: str, declaration: str) -> Any:
        function = getattr(self._library, name)
        function.argtypes = argument_types(declaration)
        function.restype = ctypes.c_int
        return function
