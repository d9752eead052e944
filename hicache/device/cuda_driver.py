"""The driver on a real CUDA device: the CUDA runtime and driver by ctypes; torch, for Triton's launches only.

Nothing here has run on a GPU. On the CPU it runs on a CUDA runtime in ordinary memory (tests/gpu/fake_cudart).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hicache.device import selftest
from hicache.device.cuda_memory import CudaMemory, Libraries
from hicache.device.driver import DriverError, Strips, UnitMove
from hicache.errors import UnsupportedError

_log = logging.getLogger(__name__)


class Launches(Protocol):
    """The kernels of ``kernels/``, queued on a stream. Arguments as in Driver. Raises DriverError."""

    def move_rows(self, stream: int, table: int, rows: int, row_bytes: int, aligned_to: int) -> None:
        """See Driver."""

    def hash_rows(self, stream: int, table: int, rows: int, row_bytes: int, scratch: int) -> None:
        """See Driver."""

    def move_units(self, stream: int, move: UnitMove, *, pack: bool) -> None:
        """See Driver."""


class CudaDriver(CudaMemory):
    """Device ``index``. Raises UnsupportedError where this machine has no such device.

    ``launches``: who launches kernels; None: Triton, where it and a torch that sees the device are installed.
    ``libraries``: None: those that are found.
    """

    def __init__(
        self, index: int, launches: Launches | None = None, libraries: Libraries | None = None
    ) -> None:
        super().__init__(index, libraries)
        self.name = f"cuda:{index} ({self._api.name(index)})"
        self.has_batch = self._cudart.has_batch
        self._launches = launches or _triton(index)
        self.has_kernels = self._launches is not None
        self._cpus = _cpus_near(lambda: self._cudart.pci_address(index))
        self._streams: list[int] = []
        self._events: list[int] = []
        self._owner = threading.get_ident()
        if self.has_kernels:
            self._check_kernels()

    def _check_kernels(self) -> None:
        """Do without kernels that do not work here. Raises UnsupportedError where the device is lost over them."""
        try:
            problem = selftest.problem(self)
        except DriverError as error:
            raise UnsupportedError(f"device {self.name!r} failed its test: {error}") from error
        if problem:
            _log.warning("%s: its kernels are not used, copies go by cudaMemcpy: %s", self.name, problem)
            self._launches, self.has_kernels = None, False

    def bind(self) -> None:
        """See Driver. The thread that opened the device is not moved: it is the application's."""
        self._cudart.use(self._index)
        if self._cpus and threading.get_ident() != self._owner:
            try:
                os.sched_setaffinity(0, self._cpus)
            except OSError:  # not allowed those: it runs anywhere then
                return

    # --- streams and events

    def stream(self, priority: int) -> int:
        """See Driver."""
        self._cudart.use(self._index)
        made = self._cudart.stream(priority)
        self._streams.append(made)
        return made

    def event(self) -> int:
        """See Driver."""
        self._cudart.use(self._index)
        made = self._cudart.event()
        self._events.append(made)
        return made

    def record(self, event: int, stream: int) -> None:
        """See Driver."""
        self._cudart.record(event, stream)

    def ready(self, event: int) -> bool:
        """See Driver."""
        return self._cudart.query(event)

    def elapsed_ns(self, first: int, second: int) -> int:
        """See Driver."""
        return int(self._cudart.elapsed_ms(first, second) * 1e6)

    def wait_value(self, stream: int, address: int, value: int) -> None:
        """The stream goes on when the u64 in registered memory (``mapped``) is ``value`` or more."""
        self._api.wait_value(stream, address, value)

    def write_value(self, stream: int, address: int, value: int) -> None:
        """The stream writes a u64 to registered memory (``mapped``)."""
        self._api.write_value(stream, address, value)

    # --- copies and kernels

    def copy(self, stream: int, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        """See Driver."""
        for target, source, size in zip(targets, sources, sizes, strict=True):
            self._cudart.copy(target, source, size, stream)

    def copy_batch(
        self, stream: int, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]
    ) -> None:
        """See Driver."""
        if targets:
            self._cudart.copy_batch(targets, sources, sizes, stream)

    def copy_strips(self, stream: int, strips: Strips) -> None:
        """See Driver."""
        self._cudart.copy_strips(strips, stream)

    def fill(self, stream: int, address: int, value: int, size_bytes: int) -> None:
        """See Driver."""
        self._cudart.fill(address, value, size_bytes, stream)

    def move_rows(self, stream: int, table: int, rows: int, row_bytes: int, aligned_to: int) -> None:
        """See Driver."""
        self._kernels("move_rows").move_rows(stream, table, rows, row_bytes, aligned_to)

    def hash_rows(self, stream: int, table: int, rows: int, row_bytes: int, scratch: int) -> None:
        """See Driver."""
        self._kernels("hash_rows").hash_rows(stream, table, rows, row_bytes, scratch)

    def move_units(self, stream: int, move: UnitMove, *, pack: bool) -> None:
        """See Driver."""
        self._kernels("move_units").move_units(stream, move, pack=pack)

    def _kernels(self, call: str) -> Launches:
        if self._launches is None:
            raise DriverError(call, "no kernels: they need triton and a torch that sees the device")
        return self._launches

    def close(self) -> None:
        """See Driver. A device that was lost has taken them with it."""
        with contextlib.suppress(DriverError):
            self._cudart.use(self._index)
            for event in self._events:
                self._cudart.destroy_event(event)
            for stream in self._streams:
                self._cudart.destroy_stream(stream)
        self._events.clear()
        self._streams.clear()


def _triton(index: int) -> Launches | None:
    from hicache.device.launches import TritonLaunches

    return TritonLaunches(index) if TritonLaunches.can_run(index) else None


def _cpus_near(pci_address: Callable[[], str]) -> set[int]:
    """The processors of the device's NUMA node; empty where that cannot be read."""
    try:
        near = cpu_list((Path("/sys/bus/pci/devices") / pci_address() / "local_cpulist").read_text())
        return near & os.sched_getaffinity(0)
    except (DriverError, OSError, ValueError):
        return set()


def cpu_list(text: str) -> set[int]:
    """The numbers of a kernel's list such as ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found |= set(range(int(first), int(last or first) + 1))
    return found
