"""CUDA streams that wait for a counter in shared memory, or show a value in it, without a thread of ours.

The counters' memory is pinned and mapped for the device once (``admit``), and stays so: it is a page or two a session.
Signatures: CUDA Driver API, "Stream Memory Operations", versions 12.0 and later. Has not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, Protocol

from hicache.device.cudart import Cudart
from hicache.device.driver import DriverError
from hicache.errors import UnsupportedError

_WAIT_GEQ = 0  # (int64)(shown - value) >= 0: FAILED, 2^63, lets go of whoever waits for 1 or more
_WRITE_DEFAULT = 0  # with a barrier: what the stream wrote before is seen first


class Fences(Protocol):
    """What streams can do with counters. Both calls answer what says that the stream has come so far; never block."""

    def admit(self, address: int, size_bytes: int, owner: object) -> None:
        """Make memory reachable for streams, for good: ``owner``, which keeps it mapped, is held from now on.

        Idempotent. Raises UnsupportedError where that cannot be had.
        """

    def wait(self, stream: Any, address: int, value: int) -> Callable[[], bool]:
        """Queue: the stream goes on when the counter shows ``value`` or more."""

    def write(self, stream: Any, address: int, value: int) -> Callable[[], bool]:
        """Queue: the counter shows ``value`` when the stream has come so far."""


class CudaFences:
    """The streams of torch, on any device of this process. Any thread may call it."""

    def __init__(self) -> None:
        """Raises UnsupportedError where this process has no CUDA with stream memory operations."""
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
            self._runtime = Cudart()
        except (OSError, AttributeError, DriverError) as error:
            raise UnsupportedError(f"no CUDA in this process: {error}") from None
        self._lock = threading.Lock()
        self._admitted: dict[int, tuple[int, object]] = {}  # the device's addresses

    def admit(self, address: int, size_bytes: int, owner: object) -> None:
        """As Fences has it."""
        with self._lock:
            if address in self._admitted:
                return
            found = ctypes.c_uint64()
            try:
                self._runtime.host_register(address, size_bytes)
                self._call(
                    "cuMemHostGetDevicePointer_v2",
                    ctypes.byref(found),
                    ctypes.c_void_p(address),
                    ctypes.c_uint(),
                )
            except DriverError as error:
                raise UnsupportedError(f"counters cannot be mapped for the GPU: {error}") from None
            self._admitted[address] = (found.value, owner)

    def wait(self, stream: Any, address: int, value: int) -> Callable[[], bool]:
        """As Fences has it."""
        return self._queue("cuStreamWaitValue64_v2", stream, self._seen(address), (value, _WAIT_GEQ))

    def write(self, stream: Any, address: int, value: int) -> Callable[[], bool]:
        """As Fences has it."""
        return self._queue("cuStreamWriteValue64_v2", stream, self._seen(address), (value, _WRITE_DEFAULT))

    def _queue(self, name: str, stream: Any, address: int, value: tuple[int, int]) -> Callable[[], bool]:
        import torch

        shown, flags = value
        handle = ctypes.c_void_p(stream.cuda_stream)
        with torch.cuda.device(stream.device):
            self._call(name, handle, ctypes.c_uint64(address), ctypes.c_uint64(shown), ctypes.c_uint(flags))
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch annotates it not
            event.record(stream)
        ready: Callable[[], bool] = event.query
        return ready

    def _seen(self, address: int) -> int:
        """A counter's address as the device sees it."""
        with self._lock:
            base = max(start for start in self._admitted if start <= address)
            return self._admitted[base][0] + address - base

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise DriverError(name, f"error {code}")


_lock = threading.Lock()
_opened: list[CudaFences] = []


def open_fences() -> Fences:
    """The fences of this process. Raises UnsupportedError where there is no CUDA."""
    with _lock:
        if not _opened:
            _opened.append(CudaFences())
        return _opened[0]
