"""What travels through a lane, and what its lanes know of a device."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hicache.device.chores import Chore
from hicache.device.engines import Stage
from hicache.device.plan import Extent
from hicache.device.result import Result
from hicache.device.segment import DeviceSegment, Sums
from hicache.types import Op

Array = npt.NDArray[np.uint8]
Done = Callable[[], None]


@dataclasses.dataclass(slots=True)
class Job:
    """A batch on its way, or a chore. ``finish`` is called in its turn, when all its pages are settled."""

    op: Op
    extents: list[Extent[DeviceSegment]]
    result: Result
    finish: Done
    left: collections.deque[Extent[DeviceSegment]] = dataclasses.field(default_factory=collections.deque)
    flying: int = 0
    chore: Chore | None = None


@dataclasses.dataclass(slots=True)
class Chunk:
    """Some pages of a job in flight."""

    job: Job
    extent: Extent[DeviceSegment]
    stage: Stage
    hashed: bool  # on the device
    writes: npt.NDArray[np.uint32]
    recorded: Sums
    pages: list[Array] = dataclasses.field(
        default_factory=list
    )  # the buffers, kept until the copies are over
    direct: bool = False  # the copies read or write the buffers themselves
    problem: str = ""
    since_ns: int = 0  # in flight


@dataclasses.dataclass
class Counts:
    """What a lane has done; bytes by the way they took."""

    direct_bytes: int = 0
    bounced_bytes: int = 0
    faults: int = 0


@dataclasses.dataclass
class Fate:
    """What the lanes of a device share: why it was given up, and whether what it was given may still happen."""

    reason: str = ""
    silent: bool = False
