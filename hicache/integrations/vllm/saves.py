"""A step's saves: blocks into staging memory, layer by layer behind the computation.

In host memory they are done when the step ends: large ones are copied by a thread while the next layer computes, small
ones at the end of the step, where handing them over would take longer than copying them. Out of a device's memory
they go on beside the next steps, which wait for them only where they give the blocks to others. A save that cannot
be made is void: a miss later, nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from hicache.errors import HicacheError
from hicache.integrations.vllm.copying import Blocks
from hicache.integrations.vllm.layout import Bytes, Move, plan
from hicache.integrations.vllm.loads import Seat
from hicache.integrations.vllm.messages import SaveOrder
from hicache.integrations.vllm.staging import StagingMaps

log = logging.getLogger(__name__)

#: From this many bytes a layer on, a thread copies it while the next one computes.
THREAD_BYTES = 256 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class SaveTools:
    """What all saves of a worker share."""

    blocks: Blocks
    seat: Seat
    maps: StagingMaps
    thread: Executor  # of one thread: layers are copied in order
    now_ns: Callable[[], int]


@dataclasses.dataclass(frozen=True, slots=True)
class SaveResult:
    """What became of a step's jobs."""

    copied: tuple[int, ...] = ()
    void: tuple[int, ...] = ()
    pages: int = 0
    bytes: int = 0
    duration_ns: int = 0


class _Job:
    """One order's places and moves; none where it is void from the beginning."""

    def __init__(self, order: SaveOrder) -> None:
        self.order = order
        self.pages = sum(run.pages for run in order.runs)
        self.rows: list[Bytes] = []
        self.moves: list[Move] = []


class StepSaves:
    """The save orders of one step. It is sealed when the step has been computed, and done some time after."""

    def __init__(self, orders: Sequence[SaveOrder], tools: SaveTools) -> None:
        self._tools = tools
        self._jobs = [_Job(order) for order in orders]
        self._pending: list[Future[None]] = []
        self._begun: set[int] = set()  # layers
        self._duration_ns = 0
        self._void = False
        for job in self._jobs:
            self._open(job)
        layers = len(tools.blocks.layout.layers)
        step_bytes = tools.seat.part_bytes * sum(job.pages for job in self._jobs)
        self._threaded = tools.blocks.deferred or step_bytes >= THREAD_BYTES * layers

    def _open(self, job: _Job) -> None:
        """Find a job's places."""
        tools, page_bytes = self._tools, self._tools.seat.part_bytes * self._tools.seat.world
        try:
            rows = [tools.seat.parts(tools.maps.rows(run, page_bytes)) for run in job.order.runs]
        except HicacheError as error:
            log.warning("hicache: pages of %s are not saved: %s", job.order.request_id, error)
            return
        job.moves = plan(job.order.block_ids, [len(part) for part in rows], tools.blocks.layout.page_blocks)
        job.rows = rows

    def layer(self, number: int) -> None:
        """A layer's KV of this step has been computed: begin to copy it, if that is worth a thread."""
        if self._threaded and number not in self._begun:
            self._begun.add(number)
            self._pending.append(self._tools.thread.submit(self._copy, number, self._tools.blocks.mark()))

    def seal(self, *, void: bool) -> None:
        """The step has been computed: begin what is left. ``void``: it must not be stored."""
        self._void = void
        for number in range(len(self._tools.blocks.layout.layers)) if not void else ():
            self.layer(number)
            if number not in self._begun:
                self._begun.add(number)
                self._copy(number, None)

    def has(self, jobs: Sequence[int]) -> bool:
        """Whether any of these jobs is among its own."""
        return any(job.order.job in jobs for job in self._jobs)

    @property
    def done(self) -> bool:
        """Whether no block is read and no place is written any more."""
        return all(pending.done() for pending in self._pending)

    def result(self) -> SaveResult:
        """Wait until it is done; what became of it."""
        failed = False
        for pending in self._pending:
            error = pending.exception()
            if error is not None:
                log.error("hicache: saving pages failed", exc_info=error)
                failed = True
        good = [] if self._void or failed else [job for job in self._jobs if job.rows]
        copied = {job.order.job for job in good}
        pages = sum(job.pages for job in good)
        return SaveResult(
            copied=tuple(sorted(copied)),
            void=tuple(job.order.job for job in self._jobs if job.order.job not in copied),
            pages=pages,
            bytes=pages * self._tools.seat.part_bytes,
            duration_ns=self._duration_ns,
        )

    def _copy(self, layer: int, after: Any) -> None:
        """Copy one layer of all jobs."""
        begun_ns = self._tools.now_ns()
        for job in self._jobs:
            for move in job.moves if not self._void else ():
                self._tools.blocks.save(job.rows, move, layer, after)
        self._duration_ns += self._tools.now_ns() - begun_ns
