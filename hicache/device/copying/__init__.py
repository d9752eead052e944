"""Engine-driven copies: pages of host memory to and from an engine's own paged KV, by the engine's process.

    kv       the engine's planes, what its pages look like, where they go
    jobs     one load or store: what is copied, how far it is, how it ended
    host     planes in host memory, by threads
    cuda     planes on a GPU, by streams; seam: what is asked of it; mapped: host memory that it reaches

No page is said to be good before all of it was copied, its checksum compared and its lease looked at again.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from hicache.device.copying.jobs import LoadJob, StoreJob
from hicache.device.copying.kv import EngineKv
from hicache.device.copying.mapped import Memory
from hicache.errors import ConfigError, UnsupportedError

WAYS = ("auto", "kernel", "staged")


@dataclasses.dataclass(frozen=True, slots=True)
class CopyOptions:
    """``threads``: of each direction, for planes in host memory.

    Of a GPU: ``stage_bytes`` of device memory for each direction, and as much pinned memory where pages cannot be
    registered; ``way``: ``kernel``, ``staged`` or ``auto`` (measured).
    """

    threads: int = 2
    stage_bytes: int = 64 << 20
    way: str = "auto"

    def __post_init__(self) -> None:
        if self.threads < 1 or self.stage_bytes < 1:
            raise ConfigError("copier: threads and stage_bytes must be at least 1")
        if self.way not in WAYS:
            raise ConfigError(f"copier: way is one of {', '.join(WAYS)}, not {self.way!r}")


class Copies(Protocol):
    """Copies of one engine. Any thread may call it."""

    kv: EngineKv

    def mark(self, stream: object) -> object:
        """What the engine's stream (None: its current one) was given until now."""

    def load(self, job: LoadJob) -> None:
        """Queue a load. Its handle says how it ends, whatever happens."""

    def store(self, job: StoreJob) -> None:
        """Queue a store. Its handle says how it ends, whatever happens."""

    def forget(self, memory: Memory) -> None:
        """Host memory is to be unmapped: let go of it once no copy is under way there."""

    def close(self) -> None:
        """End what has begun, fail what has not, let go of all memory. Idempotent."""


def open_copies(kv: EngineKv, options: CopyOptions) -> Copies:
    """Copies for an engine's planes. Raises UnsupportedError for a device that is neither cpu nor cuda."""
    if kv.device.type == "cpu":
        from hicache.device.copying.host import HostCopies

        return HostCopies(kv, threads=options.threads)
    if kv.device.type == "cuda":
        from hicache.device.copying.cuda import CudaCopies
        from hicache.device.copying.cuda_driver import CudaCopyDriver

        driver = CudaCopyDriver(kv.device.index or 0)
        return CudaCopies(kv, driver, stage_bytes=options.stage_bytes, way=options.way)
    raise UnsupportedError(f"KV tensors on {kv.device}: only cpu and cuda are supported")
