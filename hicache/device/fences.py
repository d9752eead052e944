"""CUDA streams that wait for a counter in shared memory, or show a value in it, without a thread of ours.

The counters' memory is pinned and mapped for the device once (``admit``), and stays so: it is a page or two a session.
A failed load shows 2^63, which lets go of whoever waits for one layer or more: the comparison is signed and cyclic.
Has not run on a GPU yet, only on the CUDA of the tests.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from hicache.device.cuda_api import CudaApi
from hicache.device.cudart import Cudart
from hicache.device.driver import DriverError
from hicache.errors import UnsupportedError

_Queue = Callable[[int, int, int], None]


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
    """Streams of any device of this process; a stream is torch's, or what looks like it. Any thread may call it."""

    def __init__(self) -> None:
        """Raises UnsupportedError where CUDA cannot be reached."""
        try:
            self._cudart, self._api = Cudart(), CudaApi()
        except (OSError, DriverError) as error:
            raise UnsupportedError(f"CUDA cannot be reached: {error}") from error
        self._lock = threading.Lock()
        self._admitted: dict[int, tuple[int, object]] = {}  # by address here: the device's

    def admit(self, address: int, size_bytes: int, owner: object) -> None:
        """See Fences."""
        with self._lock:
            if address in self._admitted:
                return
            try:
                self._cudart.host_register(address, size_bytes)
                self._admitted[address] = (self._cudart.mapped(address), owner)
            except DriverError as error:
                raise UnsupportedError(f"counters cannot be mapped for the GPU: {error}") from error

    def wait(self, stream: Any, address: int, value: int) -> Callable[[], bool]:
        """See Fences. Raises UnsupportedError where the stream's device cannot."""
        return self._queue(self._api.wait_value, stream, address, value)

    def write(self, stream: Any, address: int, value: int) -> Callable[[], bool]:
        """See Fences. Raises UnsupportedError where the stream's device cannot."""
        return self._queue(self._api.write_value, stream, address, value)

    def _queue(self, queue: _Queue, stream: Any, address: int, value: int) -> Callable[[], bool]:
        with self._lock:
            base = max(start for start in self._admitted if start <= address)
            seen = self._admitted[base][0] + address - base
        with self._device(stream.device.index or 0):
            try:
                queue(stream.cuda_stream, seen, value)
            except DriverError as error:
                raise UnsupportedError(f"the stream cannot use counters: {error}") from error
            event = self._cudart.event()
            self._cudart.record(event, stream.cuda_stream)
        return _Ready(self._cudart, event).ask

    @contextlib.contextmanager
    def _device(self, index: int) -> Iterator[None]:
        """The calling thread's device is as it was afterwards: it is the engine's."""
        before = self._cudart.device
        self._cudart.use(index)
        try:
            yield
        finally:
            self._cudart.use(before)


class _Ready:
    """An event until it is ready."""

    def __init__(self, cudart: Cudart, event: int) -> None:
        self._cudart = cudart
        self._event = event

    def ask(self) -> bool:
        """Whether the stream has come so far; a device that is broken never says so."""
        if not self._event:
            return True
        try:
            if not self._cudart.query(self._event):
                return False
        except DriverError:
            return False
        self._cudart.destroy_event(self._event)
        self._event = 0
        return True


_lock = threading.Lock()
_opened: list[CudaFences] = []


def open_fences() -> Fences:
    """The fences of this process. Raises UnsupportedError where CUDA cannot be reached."""
    with _lock:
        if not _opened:
            _opened.append(CudaFences())
        return _opened[0]
