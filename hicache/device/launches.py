"""Triton's launches on a CUDA stream that torch did not make. The one place where the CUDA driver needs torch.

Triton compiles a kernel when it is first launched, for a second or so where its own cache has none; what nearly every
page needs is compiled in the background from the start.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch

from hicache.device import kernels
from hicache.device.driver import DriverError, UnitMove

_log = logging.getLogger(__name__)
_END = object()
_cuda: Any = torch.cuda  # typed in part only


class TritonLaunches:
    """The kernels of one device."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._constants = kernels.hash_constants().to(self._device)
        self._streams: dict[int, Any] = {}
        self._lock = threading.Lock()  # Triton's compiler has one user at a time
        threading.Thread(target=self._warm, name="hicache-kernels", daemon=True).start()

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
        """Launches inside go to the stream, on its device; what CUDA or Triton say is a DriverError."""
        known = self._streams.get(stream)
        if known is None:
            known = self._streams[stream] = _cuda.ExternalStream(stream, device=self._device)
        try:
            with self._lock, torch.cuda.stream(known):
                yield
        except RuntimeError as error:
            raise DriverError(call, str(error)) from error

    def _warm(self) -> None:
        """Compile, kernel by kernel; a lane that must launch waits for one at most."""
        steps = kernels.warm()
        more = True
        while more:
            try:
                with self._lock, torch.cuda.device(self._device):
                    more = next(steps, _END) is not _END
            except RuntimeError as error:
                _log.warning("kernels were not compiled ahead: %s", error)
                return
