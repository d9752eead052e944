"""What a copier asks of a GPU beyond ``Driver``: the engine's streams, quantising kernels, read-only registration."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from hicache.device.driver import Driver, UnitMove


@dataclasses.dataclass(frozen=True, slots=True)
class Coding:
    """Of quantised pages: ``page_planes`` of a whole page, the first of those given, the dtype's name."""

    codec: str
    page_planes: int
    first_plane: int
    dtype: str


class CopyDriver(Driver, Protocol):
    """One device, and the streams of the engine that computes on it. ``Driver`` says how calls behave.

    A mark stands for all that a stream was given until now.
    """

    def register_read_only(self, address: int, size_bytes: int) -> None:
        """As ``register``, for memory that this process may only read. Raises DriverError where it cannot be."""

    def mark(self, stream: Any) -> Any:
        """Of an engine's stream (None: the calling thread's current one)."""

    def follow(self, stream: int, mark: Any) -> None:
        """What our stream is given from now on comes behind a mark."""

    def fence(self, stream: int) -> Any:
        """A mark of our stream."""

    def hold(self, stream: Any, fence: Any) -> None:
        """What an engine's stream (None: the calling thread's current one) is given from now on comes behind ours."""

    def encode_units(self, stream: int, move: UnitMove, coding: Coding, refused: int) -> None:
        """Queue a kernel: planes to quantised rows. ``rows``: where whole pages begin. ``refused``: int32 a page."""

    def decode_units(self, stream: int, move: UnitMove, coding: Coding) -> None:
        """Queue a kernel: quantised rows to planes."""


READ_ONLY_ADVICE = (
    "pages there are copied once more on the host; to change that use a driver and a device that can register"
    " read-only memory (cudaDevAttrHostRegisterReadOnlySupported), and raise the limit of locked memory"
    " (`ulimit -l unlimited`, LimitMEMLOCK=infinity, docker --ulimit memlock=-1)"
)


class ReadOnly:
    """A driver as who registers memory that is mapped read-only."""

    def __init__(self, driver: CopyDriver) -> None:
        self._driver = driver

    def bind(self) -> None:
        """See Driver."""
        self._driver.bind()

    def register(self, address: int, size_bytes: int) -> None:
        """See Driver."""
        self._driver.register_read_only(address, size_bytes)

    def unregister(self, address: int) -> None:
        """See Driver."""
        self._driver.unregister(address)
