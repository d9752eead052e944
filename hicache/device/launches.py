"""Triton's launches on a CUDA stream that torch did not make. The one place where the CUDA driver needs torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from hicache.device import kernels
from hicache.device.driver import DriverError, UnitMove

_cuda: Any = torch.cuda  # typed in part only


class TritonLaunches:
    """The kernels of one device."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._constants = kernels.hash_constants().to(self._device)
        self._errors = kernels.launch_errors()
        self._streams: dict[int, Any] = {}
        self._lock = threading.Lock()  # a first launch compiles, and the compiler has one user at a time

    @staticmethod
    def can_run(index: int) -> bool:
        """Whether Triton is there and torch sees the device."""
        return kernels.has_triton() and torch.cuda.is_available() and index < torch.cuda.device_count()

    def move_rows(self, stream: int, table: int, rows: int, row_bytes: int, aligned_to: int) -> None:
        """See Driver."""
        with self._on(stream, "move_rows"):
            kernels.move_rows_at(table, table + 8 * rows, rows, row_bytes, aligned_to)

    def hash_rows(self, stream: int, table: int, rows: int, row_bytes: int, scratch: int) -> None:
        """See Driver."""
        constants = self._constants.data_ptr()
        with self._on(stream, "hash_rows"):
            kernels.hash_rows_at(constants, table, rows, row_bytes, scratch=scratch, out=table + 8 * rows)

    def move_units(self, stream: int, move: UnitMove, *, pack: bool) -> None:
        """See Driver."""
        with self._on(stream, "move_units"):
            kernels.move_units_at(move, pack=pack)

    @contextlib.contextmanager
    def _on(self, stream: int, call: str) -> Iterator[None]:
        """Launches inside go to the stream, on its device; what CUDA, Triton or a compiler say is a DriverError."""
        try:
            with self._lock:
                known = self._streams.get(stream)
                if known is None:
                    known = self._streams[stream] = _cuda.ExternalStream(stream, device=self._device)
                with torch.cuda.stream(known):
                    yield
        except self._errors as error:
            raise DriverError(call, f"{type(error).__name__}: {error}") from error
