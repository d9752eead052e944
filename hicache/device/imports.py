"""Mapping the memory of engines: where each plane of a KV region lies here.

Host memory is a memfd that cannot shrink: then no engine, not even one that dies or means harm, can make a copy here
end in SIGBUS. It is mapped writable, and the descriptor is closed. CUDA memory is opened through the driver, once an
allocation however many regions name it: CUDA refuses a second opening of a handle, or counts it, by its version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hicache.device.driver import Addresses, Driver, DriverError
from hicache.device.kv import MemoryKind, PagedKv, SharedMemory
from hicache.errors import ExhaustedError, HicacheError, InvalidArgumentError, UnsupportedError

ADVICE = {
    MemoryKind.CUDA_IPC: "memory of torch's expandable segments has no such handle: set PYTORCH_CUDA_ALLOC_CONF="
    "expandable_segments:False, or export it by descriptor; in containers, share the PID and IPC namespaces"
    " (docker --pid --ipc) and the device",
    MemoryKind.CUDA_FD: "export the allocation with CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR and say its whole size;"
    " in containers, share the device",
}
CLIENT_COPIES = "or let the client copy itself: fetch into host memory and use its copier"


@dataclasses.dataclass(eq=False, slots=True)
class OpenKv:
    """An engine's paged KV as it is mapped here: the KvHandle of ``transfers.py``.

    ``planes``: the address of each. ``device_uuid``: of the device where they lie; empty: host memory. The rest is
    for whoever opened it, under a lock of its own.
    """

    kv: PagedKv
    planes: Addresses
    device_uuid: bytes
    unmap: Callable[[], None]
    users: int = 0
    closing: bool = False
    then: Callable[[], None] | None = None


class HostMemory:
    """A memfd, mapped. The descriptor is closed, whatever comes of it."""

    def __init__(self, memory: SharedMemory) -> None:
        """Raises InvalidArgumentError for one that may be torn or is too small, ExhaustedError without room to map."""
        try:
            _check_memfd(memory)
            try:
                self._mapped = mmap.mmap(
                    memory.fd, memory.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
                )
            except PermissionError as error:
                hint = "do not seal it against writing (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE)"
                raise InvalidArgumentError(
                    f"the memfd cannot be mapped to be written: {error}", hint=hint
                ) from error
            except OSError as error:
                raise ExhaustedError(f"no room to map {memory.size_bytes} bytes: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                os.close(memory.fd)
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._mapped, np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def close(self) -> None:
        """Unmap it."""
        self._bytes = None
        with contextlib.suppress(BufferError):  # somebody has a view of it still: it goes with that
            self._mapped.close()


def _check_memfd(memory: SharedMemory) -> None:
    hint = "make it with memfd_create(MFD_ALLOW_SEALING) and add F_SEAL_SHRINK when it has its size"
    try:
        seals, size = fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS), os.fstat(memory.fd).st_size
        block_bytes = os.fstatvfs(memory.fd).f_bsize
    except OSError as error:
        raise InvalidArgumentError(f"host memory of an engine must be a memfd: {error}", hint=hint) from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise InvalidArgumentError("the memfd is not sealed against shrinking", hint=hint)
    if size < memory.size_bytes:
        raise InvalidArgumentError(
            f"the memfd has {size} bytes, not the {memory.size_bytes} it is said to have"
        )
    if block_bytes > mmap.PAGESIZE:  # hugetlbfs: a hole punched there may not be filled again
        raise InvalidArgumentError(
            "the memfd is of reserved huge pages",
            hint="leave MFD_HUGETLB out; transparent huge pages are fine",
        )


class HostImports:
    """Opens KV regions in host memory. From any thread."""

    def open(self, kv: PagedKv) -> OpenKv:
        """Map every memory of the region. Raises as HostMemory does; all descriptors are closed then."""
        opened: list[HostMemory] = []
        with contextlib.ExitStack() as undo:
            undo.callback(_close_all, opened)
            for at, memory in enumerate(kv.memories):
                try:
                    opened.append(HostMemory(memory))
                except HicacheError:
                    for other in kv.memories[at + 1 :]:
                        close_descriptor(other)
                    raise
            undo.pop_all()
        planes = _planes(kv, [memory.address for memory in opened])
        return OpenKv(kv, planes, b"", lambda: _close_all(opened))


def close_descriptor(memory: SharedMemory) -> None:
    """Close what came with it, if anything did."""
    if memory.fd >= 0:
        with contextlib.suppress(OSError):
            os.close(memory.fd)


def _close_all(opened: list[HostMemory]) -> None:
    for memory in opened:
        memory.close()


def _planes(kv: PagedKv, starts: list[int]) -> Addresses:
    return np.array(
        [starts[memory] + offset for memory, offset in zip(kv.plane_memory, kv.plane_offset, strict=True)],
        np.int64,
    )


@dataclasses.dataclass(slots=True)
class _Mapped:
    """An allocation of another process, and how many regions need it."""

    address: int
    size_bytes: int
    close: Callable[[int], None]
    regions: int = 0


class CudaImports:
    """Opens KV regions on one device. From any thread."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._opened: dict[object, _Mapped] = {}  # by what names it

    def open(self, kv: PagedKv) -> OpenKv:
        """Map every memory of the region; descriptors are closed. Raises UnsupportedError."""
        names: list[object] = []
        starts: list[int] = []
        with contextlib.ExitStack() as undo:
            for memory in kv.memories:
                undo.callback(close_descriptor, memory)
            undo.callback(lambda: None if len(starts) == len(kv.memories) else self._give(names))
            self._driver.bind()
            for memory in kv.memories:
                name = _name(memory)
                starts.append(self._take(name, memory))
                names.append(name)
        return OpenKv(kv, _planes(kv, starts), self._driver.uuid, lambda: self._give(names))

    def _take(self, name: object, memory: SharedMemory) -> int:
        if memory.device_uuid != self._driver.uuid:
            raise UnsupportedError(
                f"the memory is on device {memory.device_uuid.hex()}, the sidecar serves {self._driver.uuid.hex()}"
                f" ({self._driver.name})",
                hint=f"give the sidecar the engine's device (--device), {CLIENT_COPIES}",
            )
        with self._lock:
            found = self._opened.get(name) or self._map(memory)
            if found.size_bytes < memory.size_bytes:  # a kernel that reads behind it ends the device for all
                if not found.regions:
                    self._unmap(found)
                raise InvalidArgumentError(
                    f"the allocation has {found.size_bytes} bytes, not the {memory.size_bytes} it is said to have"
                )
            found.regions += 1
            self._opened[name] = found
            return found.address

    def _map(self, memory: SharedMemory) -> _Mapped:
        try:
            if memory.kind is MemoryKind.CUDA_FD:
                address = self._driver.open_exported(memory.fd, memory.size_bytes)
                return _Mapped(address, memory.size_bytes, self._driver.close_exported)
            address = self._driver.open_shared(memory.handle)
            start, size = self._driver.extent(address)
        except DriverError as error:
            raise UnsupportedError(
                f"memory of kind {memory.kind} could not be mapped: {error}",
                hint=f"{ADVICE[memory.kind]}; {CLIENT_COPIES}",
            ) from error
        return _Mapped(address, start + size - address, self._driver.close_shared)

    def _give(self, names: list[object]) -> None:
        self._driver.bind()
        for name in names:
            with self._lock:
                found = self._opened[name]
                found.regions -= 1
                if not found.regions:
                    del self._opened[name]
                    self._unmap(found)

    def _unmap(self, found: _Mapped) -> None:
        with contextlib.suppress(DriverError):  # a device that was lost has taken it with it
            found.close(found.address)


def _name(memory: SharedMemory) -> object:
    """What is the same of two descriptions of one allocation. Descriptors of CUDA do not tell: each is mapped."""
    return memory.handle if memory.kind is MemoryKind.CUDA_IPC else object()
