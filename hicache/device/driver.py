"""What a CUDA-shaped device must offer: memory by address, streams, events, copies, two kernels.

Everything with a ``stream`` is queued and returns at once; it runs in the stream's order and in no order with other
streams. Whoever queues keeps the memory, and the tables that a kernel reads, until an event recorded after it is
ready. Host memory must be pinned (``allocate_host``, ``register``): copies of other memory would block. Errors are
DriverError, at the call or from ``ready`` of a later event; what was queued between that event and the one before
has then happened in part or not at all, and will not happen later.
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True, slots=True)
class UnitMove:
    """One launch of the kernel of ``kernels/paged_triton.py``; addresses are device addresses of int64 tables.

    ``planes``: addresses of ``plane_count`` planes. ``places``: ``pages * units``. ``rows``: addresses of ``pages``
    rows, in device memory or in pinned host memory, each of which begins with the first of these planes: unit u of
    plane p lies ``(p * units + u) * unit_bytes`` behind it. ``strides``: of a plane, in elements.
    ``aligned_to``: what all addresses and the rows are multiples of, up to 16. ``host_rows``: rows are the host's, so
    that few programs fill the link.
    """

    planes: int
    plane_count: int
    places: int
    rows: int
    pages: int
    units: int
    unit_tokens: int
    block_tokens: int
    heads: int
    head_size: int
    element_bytes: int
    strides: tuple[int, int, int, int]
    aligned_to: int
    host_rows: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Strips:
    """``count`` strips of ``width_bytes``: from ``source + i * source_pitch`` to ``target + i * target_pitch``."""

    target: int
    target_pitch: int
    source: int
    source_pitch: int
    width_bytes: int
    count: int


class Memory(Protocol):
    """A device's memory, the host's that it reaches, and other processes'."""

    uuid: bytes  # 16 bytes

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

    # --- memory of other processes

    def share(self, address: int) -> bytes:
        """The IPC handle (64 bytes) of ``allocate``'s memory. Raises DriverError where it has none."""

    def open_shared(self, handle: bytes) -> int:
        """Map another process's allocation; its address. Raises DriverError, also for a handle of this process."""

    def close_shared(self, address: int) -> None:
        """Unmap it. May wait for the device: not for the owner thread's path."""

    def open_exported(self, fd: int, size_bytes: int) -> int:
        """Map memory that another process exported by descriptor, which stays open (cuMemImportFromShareableHandle)."""

    def close_exported(self, address: int) -> None:
        """Unmap it."""

    def extent(self, address: int) -> tuple[int, int]:
        """Where the allocation that holds an address begins, and its size; of ``allocate`` or another process's.

        Whoever opens memory by a handle compares: the size that came with the handle is only what somebody said.
        """


class Driver(Memory, Protocol):
    """One device. Calls are safe from several threads, each of which calls ``bind`` first."""

    name: str  # of the device, for people
    has_kernels: bool  # move_rows and hash_rows work
    has_batch: bool  # copy_batch works

    def bind(self) -> None:
        """Make the device the calling thread's, and run the thread near it where that can be told."""

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

    def move_units(self, stream: int, move: UnitMove, *, pack: bool) -> None:
        """Queue a kernel between an engine's planes and rows: ``pack`` reads planes, else it writes them."""

    def copy_strips(self, stream: int, strips: Strips) -> None:
        """Queue one copy of equally long, equally spaced strips, host to device or back (cudaMemcpy2DAsync)."""

    def fill(self, stream: int, address: int, value: int, size_bytes: int) -> None:
        """Queue cudaMemsetAsync of device memory."""

    def close(self) -> None:
        """Destroy streams and events. All memory was given back before."""
