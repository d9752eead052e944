"""What the scheduler side tells the workers, and what they report: plain data that pickles.

An order names bytes and blocks and nothing else. Leased pages are read where a ticket says they lie; pages to be
stored are written into places of the scheduler process's own shared memory. No worker ever waits for a call.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hicache.rpc.client import LeaseTicket


@dataclasses.dataclass(frozen=True, slots=True)
class LoadOrder:
    """Copy ``pages`` leased pages, from page ``first_page`` of the ticket on, into vLLM's blocks.

    The first ``skip_blocks`` blocks of the first page are vLLM's own already: ``block_ids`` starts after them.
    """

    request_id: str
    ticket: LeaseTicket
    first_page: int
    pages: int
    skip_blocks: int
    block_ids: tuple[int, ...]
    asynchronous: bool


@dataclasses.dataclass(frozen=True, slots=True)
class StagedRun:
    """Consecutive places in staging memory, of one whole page (all ranks' parts) each.

    ``path`` is how another process of the same user opens the memory; ``inode`` tells whether it is still the same.
    """

    path: str
    size_bytes: int
    inode: int
    offset: int
    pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class SaveOrder:
    """Copy whole pages out of vLLM's blocks (each rank its own part) into staging memory."""

    job: int
    request_id: str
    runs: tuple[StagedRun, ...]
    block_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StepOrders:
    """One engine step's orders.

    ``cancelled``: requests whose loads nobody waits for any more; their blocks may belong to others by the time
    these orders arrive, so what has not begun must not begin. ``flush``: save jobs whose blocks are given to others
    in this very step; what they still have to read must be read before the step computes.
    """

    page_blocks: int
    loads: tuple[LoadOrder, ...] = ()
    saves: tuple[SaveOrder, ...] = ()
    cancelled: tuple[str, ...] = ()
    flush: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.loads or self.saves or self.cancelled or self.flush)


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerCounts:
    """What workers have done since their last report; adds up over ranks and steps."""

    loaded_pages: int = 0
    loaded_bytes: int = 0
    load_ns: int = 0
    saved_pages: int = 0
    saved_bytes: int = 0
    save_ns: int = 0
    failed_loads: int = 0
    corrupt_pages: int = 0
    void_saves: int = 0

    def __add__(self, other: WorkerCounts) -> WorkerCounts:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return WorkerCounts(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, slots=True)
class StepReport:
    """What one worker, or all of them together, did since the last report.

    ``saved``: job -> ranks that are done with it, copied or not: once all are, nobody writes to its places any more.
    ``void``: jobs that some rank did not copy, which must not be committed. ``loaded``: request -> ranks that are
    done with its lease, well or not; ``failed``: requests whose load failed on some rank; ``corrupt``: (request,
    page of its ticket) whose checksum said no.
    """

    saved: Mapping[int, int] = dataclasses.field(default_factory=dict)
    void: frozenset[int] = frozenset()
    loaded: Mapping[str, int] = dataclasses.field(default_factory=dict)
    corrupt: tuple[tuple[str, int], ...] = ()
    failed: frozenset[str] = frozenset()
    stats: WorkerCounts = WorkerCounts()

    def merged(self, other: StepReport) -> StepReport:
        """Both reports as one."""
        return StepReport(
            saved=dict(Counter(self.saved) + Counter(other.saved)),
            void=self.void | other.void,
            loaded=dict(Counter(self.loaded) + Counter(other.loaded)),
            corrupt=self.corrupt + other.corrupt,
            failed=self.failed | other.failed,
            stats=self.stats + other.stats,
        )

    def __bool__(self) -> bool:
        return bool(self.saved or self.void or self.loaded or self.corrupt or self.failed or self.stats)
