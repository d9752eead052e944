"""What a CUDA-shaped device must offer: memory by address, streams, events, copies, two kernels.

Everything with a ``stream`` is queued and returns at once; it runs in the stream's order and in no order with other
streams. Whoever queues keeps the memory, and the tables that a kernel reads, until an event recorded after it is
ready. Host memory must be pinned (``allocate_host``, ``register``): copies of other memory would block. Errors are
DriverError, at the call or from ``ready`` of a later event; what was queued between that event and the one before
has then happened in part or not at all, and will not happen later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Addresses = npt.NDArray[np.int64]


class DriverError(Exception):
    """A call of the CUDA runtime said no. ``fatal``: the device takes nothing any more."""

    def __init__(self, call: str, problem: str, *, fatal: bool = False) -> None:
        super().__init__(f"{call}: {problem}")
        self.call = call
        self.fatal = fatal


class Driver(Protocol):
    """One device. Calls are safe from several threads, each of which calls ``bind`` first."""

    name: str  # of the device, for people
    has_kernels: bool  # move_rows and hash_rows work
    has_batch: bool  # copy_batch works

    def bind(self) -> None:
        """Make the device the calling thread's, and run the thread near it where that can be told."""

    def allocate(self, size_bytes: int) -> int:
        """Device memory; its address, a multiple of 256."""

    def release(self, address: int) -> None:
        """Give ``allocate``'s memory back. May wait for the device: not for the owner thread's path."""

    def allocate_host(self, size_bytes: int) -> Bytes:
        """Pinned host memory, mapped for the device."""

    def release_host(self, memory: Bytes) -> None:
        """Give ``allocate_host``'s memory back."""

    def register(self, address: int, size_bytes: int) -> None:
        """Pin host memory and map it for the device. Slow: about a second for 10 GiB."""

    def unregister(self, address: int) -> None:
        """Undo ``register``."""

    def stream(self, priority: int) -> int:
        """A new stream that waits for no other; lower numbers go first. Its handle."""

    def event(self) -> int:
        """A new event, to be recorded any number of times. Its handle."""

    def record(self, event: int, stream: int) -> None:
        """The event becomes ready when all that was queued before it has run."""

    def ready(self, event: int) -> bool:
        """Whether all before the event has run; never blocks. Raises DriverError where some of it failed."""

    def elapsed_ns(self, first: int, second: int) -> int:
        """Device time between two ready events."""

    def copy(self, stream: int, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        """Queue copies, one after another, between device and pinned host memory in any direction."""

    def copy_batch(
        self, stream: int, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]
    ) -> None:
        """Queue copies in one call; they run in any order among each other."""

    def move_rows(self, stream: int, table: int, rows: int, row_bytes: int, aligned_to: int) -> None:
        """Queue a kernel that copies rows; table: device address of ``rows`` targets, then as many sources."""

    def hash_rows(self, stream: int, table: int, rows: int, row_bytes: int, scratch: int) -> None:
        """Queue xxh3-64 of rows. table: device address of ``rows`` int64 addresses; the hashes are written behind.

        That is, to ``table + 8 * rows``. scratch: ``hash_scratch_bytes`` of device memory.
        """

    def close(self) -> None:
        """Destroy streams and events. All memory was given back before."""
