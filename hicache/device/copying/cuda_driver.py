"""The copier's driver on a real CUDA device. Not one line here has run on a GPU.

The engine's streams are torch's, or whatever torch takes for one; marks are torch's events.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hicache.device import kernels
from hicache.device.copying.cuda_seam import Coding
from hicache.device.cuda_driver import CudaDriver
from hicache.device.driver import DriverError, UnitMove

_cuda: Any = torch.cuda  # typed in part only


class CudaCopyDriver(CudaDriver):
    """Device ``index``. Raises UnsupportedError where this machine has no such device."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._torch_device = torch.device("cuda", index)

    def mark(self, stream: Any) -> Any:
        """See CopyDriver."""
        return self._recorded(self._engine(stream))

    def follow(self, stream: int, mark: Any) -> None:
        """See CopyDriver."""
        with _told("follow"):
            self._ours(stream).wait_event(mark)

    def fence(self, stream: int) -> Any:
        """See CopyDriver."""
        return self._recorded(self._ours(stream))

    def hold(self, stream: Any, fence: Any) -> None:
        """See CopyDriver."""
        with _told("hold"):
            self._engine(stream).wait_event(fence)

    def encode_units(self, stream: int, move: UnitMove, coding: Coding, refused: int) -> None:
        """See CopyDriver."""
        with _told("encode_units"), _cuda.stream(self._ours(stream)):
            kernels.encode_units_at(move, coding, refused)

    def decode_units(self, stream: int, move: UnitMove, coding: Coding) -> None:
        """See CopyDriver."""
        with _told("decode_units"), _cuda.stream(self._ours(stream)):
            kernels.decode_units_at(move, coding)

    def _engine(self, stream: Any) -> Any:
        return stream if stream is not None else _cuda.current_stream(self._torch_device)

    def _ours(self, stream: int) -> Any:
        return _cuda.ExternalStream(stream, device=self._torch_device)

    def _recorded(self, stream: Any) -> Any:
        with _told("mark"):
            event = _cuda.Event()
            event.record(stream)
        return event


@contextlib.contextmanager
def _told(call: str) -> Iterator[None]:
    """What torch or Triton say is a DriverError."""
    try:
        yield
    except RuntimeError as error:
        raise DriverError(call, str(error)) from error
