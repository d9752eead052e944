"""What a copier asks of a GPU beyond ``Driver``: the engine's streams, quantising kernels, read-only registration.

``CudaCopyDriver`` is the real one. Not one line of it has run on a GPU: what decides is in ``cuda`` and is tested on a
fake.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any, Protocol

from hicache.device.driver import Driver, DriverError, UnitMove


@dataclasses.dataclass(frozen=True, slots=True)
class Coding:
    """Of quantised pages: ``page_planes`` of a whole page, the first of those given, float16 or bfloat16."""

    codec: str
    page_planes: int
    first_plane: int
    half: bool


class CopyDriver(Driver, Protocol):
    """One device, and the streams of the engine that computes on it. ``Driver`` says how calls behave."""

    def register_read_only(self, address: int, size_bytes: int) -> None:
        """As ``register``, for memory that this process may only read. Raises DriverError where it cannot be."""

    def mark(self, stream: Any) -> Any:
        """A mark behind all that an engine's stream (None: the thread's current one) was given until now."""

    def follow(self, stream: int, mark: Any) -> None:
        """What our stream is given from now on comes behind a mark."""

    def fence(self, stream: int) -> Any:
        """A mark behind all that our stream was given until now."""

    def hold(self, stream: Any, fence: Any) -> None:
        """What an engine's stream (None: the current one) is given from now on comes behind our mark."""

    def encode_units(self, stream: int, move: UnitMove, coding: Coding, refused: int) -> None:
        """Queue a kernel: planes to quantised rows. ``rows``: where whole pages begin. ``refused``: int32 a page."""

    def decode_units(self, stream: int, move: UnitMove, coding: Coding) -> None:
        """Queue a kernel: quantised rows to planes."""


READ_ONLY_ADVICE = (
    "pages there are copied once more on the host; this needs a device that can register read-only memory"
    " (cudaDevAttrHostRegisterReadOnlySupported: see the driver's release notes) and a limit of locked memory that"
    " allows it (`ulimit -l unlimited`, docker --ulimit memlock=-1)"
)


class ReadOnly:
    """A driver as who registers memory that is mapped read-only."""

    def __init__(self, driver: CopyDriver) -> None:
        self._driver = driver
        self.bind = driver.bind
        self.unregister = driver.unregister

    def register(self, address: int, size_bytes: int) -> None:
        """See Driver."""
        self._driver.register_read_only(address, size_bytes)
