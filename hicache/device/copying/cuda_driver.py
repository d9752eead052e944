"""The copier's driver on a real CUDA device. Not one line here has run on a GPU.

Engine's streams are torch's; ours are the handles that ``CudaDriver`` makes. Marks are torch events without timing.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from hicache.device import kernels
from hicache.device.copying.cuda_seam import Coding
from hicache.device.cuda_driver import CudaDriver
from hicache.device.cudart import HOST_MAPPED, HOST_PORTABLE
from hicache.device.driver import DriverError, UnitMove

_cuda: Any = torch.cuda  # typed in part only

#: cudaHostRegisterReadOnly, and cudaDevAttrHostRegisterReadOnlySupported.
HOST_READ_ONLY, ATTRIBUTE_READ_ONLY = 8, 113


class CudaCopyDriver(CudaDriver):
    """Device ``index``, for engine-driven copies. Raises as ``CudaDriver`` does."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._index = index
        found = ctypes.c_int()
        self._cudart.call(
            "cudaDeviceGetAttribute",
            ctypes.byref(found),
            ctypes.c_int(ATTRIBUTE_READ_ONLY),
            ctypes.c_int(index),
        )
        self._registers_read_only = bool(found.value)

    def register_read_only(self, address: int, size_bytes: int) -> None:
        """See CopyDriver."""
        if not self._registers_read_only:
            raise DriverError(
                "cudaHostRegister", "the device cannot register memory that is mapped read-only"
            )
        flags = ctypes.c_uint(HOST_PORTABLE | HOST_MAPPED | HOST_READ_ONLY)
        self._cudart.call("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), flags)

    def mark(self, stream: Any) -> Any:
        """See CopyDriver."""
        return self._recorded(stream if stream is not None else _cuda.current_stream(self._device))

    def follow(self, stream: int, mark: Any) -> None:
        """See CopyDriver."""
        self._guarded(lambda: self._ours(stream).wait_event(mark))

    def fence(self, stream: int) -> Any:
        """See CopyDriver."""
        return self._recorded(self._ours(stream))

    def hold(self, stream: Any, fence: Any) -> None:
        """See CopyDriver."""
        engine = stream if stream is not None else _cuda.current_stream(self._device)
        self._guarded(lambda: engine.wait_event(fence))

    def encode_units(self, stream: int, move: UnitMove, coding: Coding, refused: int) -> None:
        """See CopyDriver."""
        with torch.cuda.device(self._device), _cuda.stream(self._ours(stream)):
            self._guarded(lambda: kernels.encode_units_at(move, coding, refused))

    def decode_units(self, stream: int, move: UnitMove, coding: Coding) -> None:
        """See CopyDriver."""
        with torch.cuda.device(self._device), _cuda.stream(self._ours(stream)):
            self._guarded(lambda: kernels.decode_units_at(move, coding))

    def _ours(self, stream: int) -> Any:
        return _cuda.ExternalStream(stream, device=self._device)

    def _recorded(self, stream: Any) -> Any:
        event = _cuda.Event()
        self._guarded(lambda: event.record(stream))
        return event

    @staticmethod
    def _guarded(work: Any) -> None:
        try:
            work()
        except RuntimeError as error:
            raise DriverError("launch", str(error)) from error
