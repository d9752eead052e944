"""The driver on a real CUDA device: torch for streams, events and launches, ``cudart.py`` for the rest.

Not one line here has run without a GPU: everything that decides is above the seam and is tested on a fake.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hicache.device import kernels
from hicache.device.cudart import Cudart
from hicache.device.driver import Bytes, DriverError
from hicache.errors import UnsupportedError

_cuda: Any = torch.cuda  # typed in part only


class CudaDriver:
    """Device ``index``. Raises UnsupportedError where this machine, or this torch, has no such device."""

    def __init__(self, index: int) -> None:
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise UnsupportedError(
                f"device 'cuda:{index}': torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices",
                hint="use device 'cpu', or install a CUDA build of torch and see what nvidia-smi says",
            )
        self._device = torch.device("cuda", index)
        _cuda.init()
        torch.empty(1, device=self._device)  # the runtime is loaded, and the device has a context
        self.name = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
        self._cudart = Cudart()
        self.has_batch = self._cudart.has_batch
        self.has_kernels = kernels.has_triton()
        self._cpus = _cpus_near(torch.cuda.get_device_properties(index))
        self._constants = kernels.hash_constants().to(self._device)
        self._streams: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        self._hosts: dict[int, Bytes] = {}
        self._owner = threading.get_ident()

    def bind(self) -> None:
        """See Driver. The thread that opened the device is not moved: it is the application's."""
        torch.cuda.set_device(self._device)
        if self._cpus and threading.get_ident() != self._owner:
            try:
                os.sched_setaffinity(0, self._cpus)
            except OSError:  # not allowed those: it runs anywhere then
                return

    # --- memory

    def allocate(self, size_bytes: int) -> int:
        """See Driver."""
        with torch.cuda.device(self._device):
            return self._cudart.malloc(size_bytes)

    def release(self, address: int) -> None:
        """See Driver."""
        self._cudart.free(address)

    def allocate_host(self, size_bytes: int) -> Bytes:
        """See Driver."""
        with torch.cuda.device(self._device):
            address = self._cudart.host_alloc(size_bytes)
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
        self._hosts[address] = memory
        return memory

    def release_host(self, memory: Bytes) -> None:
        """See Driver."""
        address = memory.ctypes.data
        del self._hosts[address]
        self._cudart.free_host(address)

    def register(self, address: int, size_bytes: int) -> None:
        """See Driver."""
        self._cudart.host_register(address, size_bytes)

    def unregister(self, address: int) -> None:
        """See Driver."""
        self._cudart.host_unregister(address)

    # --- streams and events

    def stream(self, priority: int) -> int:
        """See Driver."""
        made = _cuda.Stream(self._device, priority=priority)
        self._streams[made.cuda_stream] = made
        return int(made.cuda_stream)

    def event(self) -> int:
        """See Driver."""
        handle = len(self._events) + 1
        self._events[handle] = _cuda.Event(enable_timing=True)
        return handle

    def record(self, event: int, stream: int) -> None:
        """See Driver."""
        try:
            self._events[event].record(self._streams[stream])
        except RuntimeError as error:
            raise DriverError("record", str(error), fatal=True) from error

    def ready(self, event: int) -> bool:
        """See Driver."""
        try:
            return bool(self._events[event].query())
        except RuntimeError as error:
            raise DriverError("ready", str(error), fatal=True) from error

    def elapsed_ns(self, first: int, second: int) -> int:
        """See Driver."""
        return int(self._events[first].elapsed_time(self._events[second]) * 1e6)

    # --- copies and kernels

    def copy(self, stream: int, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        """See Driver."""
        for target, source, size in zip(targets, sources, sizes, strict=True):
            self._cudart.copy(target, source, size, stream)

    def copy_batch(
        self, stream: int, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]
    ) -> None:
        """See Driver."""
        self._cudart.copy_batch(targets, sources, sizes, stream)

    def move_rows(self, stream: int, table: int, rows: int, row_bytes: int, aligned_to: int) -> None:
        """See Driver."""
        with torch.cuda.stream(self._streams[stream]):
            try:
                kernels.move_rows_at(table, table + 8 * rows, rows, row_bytes, aligned_to)
            except RuntimeError as error:
                raise DriverError("move_rows", str(error)) from error

    def hash_rows(self, stream: int, table: int, rows: int, row_bytes: int, scratch: int) -> None:
        """See Driver."""
        constants = self._constants.data_ptr()
        with torch.cuda.stream(self._streams[stream]):
            try:
                kernels.hash_rows_at(constants, table, rows, row_bytes, scratch=scratch, out=table + 8 * rows)
            except RuntimeError as error:
                raise DriverError("hash_rows", str(error)) from error

    def close(self) -> None:
        """See Driver."""
        self._events.clear()
        self._streams.clear()


def _cpus_near(properties: object) -> set[int]:
    """The processors of the device's NUMA node; empty where that cannot be read."""
    try:
        place = [int(getattr(properties, f"pci_{part}_id")) for part in ("domain", "bus", "device")]
        folder = Path("/sys/bus/pci/devices/{:04x}:{:02x}:{:02x}.0".format(*place))
        return cpu_list((folder / "local_cpulist").read_text()) & os.sched_getaffinity(0)
    except (AttributeError, OSError, ValueError):
        return set()


def cpu_list(text: str) -> set[int]:
    """The numbers of a kernel's list such as ``0-3,8``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found |= set(range(int(first), int(last or first) + 1))
    return found
