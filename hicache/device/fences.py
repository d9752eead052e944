"""CUDA streams that wait for a counter in shared memory, or show a value in it, without a thread of ours.

The counters' memory is pinned and mapped for the device once (``admit``), and stays so: it is a page or two a session.
A failed load shows 2^63, which lets go of whoever waits for one layer or more: the comparison is signed and cyclic.
Has not run on a GPU yet, only on the CUDA of the tests.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hicache.device.cuda_api import CudaApi
from hicache.device.cudart import Cudart
from hicache.device.driver import DriverError
from hicache.errors import UnsupportedError

MARK_BYTES = 8

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
    """Streams of any device of this process; a stream is torch's, or what looks like it. Any thread may call it.

    That a stream has come so far it says itself, in a *mark*: whoever asks makes no call of CUDA, which on a thread of
    another device would begin to use that device, too.
    """

    def __init__(self) -> None:
        """Raises UnsupportedError where CUDA cannot be reached."""
        try:
            self._cudart, self._api = Cudart(), CudaApi()
        except (OSError, DriverError) as error:
            raise UnsupportedError(f"CUDA cannot be reached: {error}") from error
        self._lock = threading.Lock()
        self._admitted: dict[int, tuple[int, object]] = {}  # by address here: the device's
        self._marks = _Marks()

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
        import torch

        mark, room = self._marks.take()
        self.admit(*room, self._marks)
        with torch.cuda.device(stream.device):
            try:
                queue(stream.cuda_stream, self._seen(address), value)
            except DriverError as error:
                self._marks.give(mark)
                raise UnsupportedError(f"the stream cannot use counters: {error}") from error
            with contextlib.suppress(DriverError):  # then it is never said, and the counter not used again
                self._api.write_value(stream.cuda_stream, self._seen(mark), 1)
        return lambda: self._marks.shown(mark)

    def _seen(self, address: int) -> int:
        """An address in admitted memory as the device has it."""
        with self._lock:
            base = max(start for start in self._admitted if start <= address)
            return self._admitted[base][0] + address - base


class _Marks:
    """Words that streams set to 1, in pages of their own. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: dict[int, npt.NDArray[np.uint64]] = {}  # by address
        self._free: list[int] = []

    def take(self) -> tuple[int, tuple[int, int]]:
        """The address of a mark that shows 0; and the page that it is in: address and size."""
        with self._lock:
            if not self._free:
                page = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=np.uint64)
                base = page.ctypes.data
                self._pages[base] = page
                self._free += range(base, base + mmap.PAGESIZE, MARK_BYTES)
            mark = self._free.pop()
            base = mark - mark % mmap.PAGESIZE
            self._pages[base][(mark - base) // MARK_BYTES] = 0
            return mark, (base, mmap.PAGESIZE)

    def shown(self, mark: int) -> bool:
        """Whether the stream has come so far. To be asked until it says so, and not afterwards."""
        with self._lock:
            base = mark - mark % mmap.PAGESIZE
            if not self._pages[base][(mark - base) // MARK_BYTES]:
                return False
            self._free.append(mark)
            return True

    def give(self, mark: int) -> None:
        """No stream was told of it."""
        with self._lock:
            self._free.append(mark)


_lock = threading.Lock()
_opened: list[CudaFences] = []


def open_fences() -> Fences:
    """The fences of this process. Raises UnsupportedError where CUDA cannot be reached."""
    with _lock:
        if not _opened:
            _opened.append(CudaFences())
        return _opened[0]
