"""Pages on their way from staging memory into the sidecar: Reserve and Commit, one after the other for each request.

A page can only be committed after the one before it, so a request's jobs stand in line; those that follow each other
go in one pair of calls. Whatever becomes of a job, its staging memory is given back here and nowhere else.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import enum
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

from hicache.errors import ErrorCode, HicacheError
from hicache.integrations.vllm.messages import StagedRun
from hicache.integrations.vllm.namespaces import Namespaces
from hicache.integrations.vllm.requests import Identity
from hicache.rpc.client.aio_held import Reservation

if TYPE_CHECKING:
    from hicache.rpc.client import Staging

log = logging.getLogger(__name__)

#: Requests whose pages are committed at the same time.
LINES_MOST = 4
#: How long the sidecar may take to make room.
ROOM_WAIT_MS = 1_000


class Outcome(enum.Enum):
    """What became of a job."""

    STORED = "stored"  # all its pages are in the sidecar
    BEHIND = "behind"  # a page before them is not: they were dropped
    REFUSED = "refused"  # no room, or not allowed: they were dropped
    LOST = "lost"  # the sidecar is not there, or did not answer in time


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """One page's place in staging memory."""

    staging: Staging
    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class CommitTask:
    """Pages ``first_page`` and following of a prompt, complete in their places; ``tokens`` end with the last."""

    job: int
    line: Hashable
    identity: Identity
    tokens: bytes
    extra_keys: Sequence[bytes] | None
    first_page: int
    places: tuple[Place, ...]

    @property
    def end(self) -> int:
        """The page after the last."""
        return self.first_page + len(self.places)


@dataclasses.dataclass(frozen=True, slots=True)
class Settled:
    """``present_pages``: how many pages, from the first, the sidecar holds as far as is known."""

    job: int
    outcome: Outcome
    present_pages: int
    stored_pages: int = 0


class Commits:
    """The lines of all requests. Belongs to the agent's event loop; ``told`` hears of every job once."""

    def __init__(
        self, namespaces: Namespaces, told: Callable[[Settled], None], *, durable: bool, timeout_s: float
    ) -> None:
        self._namespaces = namespaces
        self._told = told
        self._durable = durable
        self._timeout_s = timeout_s
        self._lines: dict[Hashable, collections.deque[CommitTask]] = {}
        self._turns = asyncio.Semaphore(LINES_MOST)
        self._holders = 0
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, task: CommitTask) -> None:
        """Put a job in its request's line."""
        line = self._lines.get(task.line)
        if line is not None:
            line.append(task)
            return
        self._lines[task.line] = collections.deque([task])
        running = asyncio.create_task(self._work_off(task.line))
        self._tasks.add(running)
        running.add_done_callback(self._tasks.discard)

    @contextlib.contextmanager
    def held_up(self) -> Iterator[None]:
        """Nothing is reserved while this is open."""
        self._holders += 1
        self._open.clear()
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._open.set()

    def drop(self, task: CommitTask) -> None:
        """Give a job up before its turn."""
        self._end(task, Outcome.LOST, 0)

    def drop_all(self) -> None:
        """Give up what no call names yet."""
        for line in self._lines.values():
            while line:
                self.drop(line.popleft())

    async def stop(self) -> None:
        """Give everything up; calls that are under way are broken off."""
        self.drop_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def idle(self) -> None:
        """Wait until nothing is on its way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _work_off(self, name: Hashable) -> None:
        line = self._lines[name]
        try:
            while line:
                async with self._turns:
                    await self._open.wait()
                    run = _next_run(line)
                    if run:
                        await self._store(run)
        finally:  # however it ends: nobody would work off what is still put in this line
            del self._lines[name]
            while line:
                self.drop(line.popleft())

    async def _store(self, run: Sequence[CommitTask]) -> None:
        """Commit a run of jobs that follow each other."""
        first, end = run[0].first_page, run[-1].end
        outcome, present, stored = Outcome.LOST, 0, 0
        try:
            outcome, present, stored = await self._commit(run)
        except HicacheError as error:
            lost = error.code in {ErrorCode.UNAVAILABLE, ErrorCode.STALE, ErrorCode.NOT_FOUND}
            outcome, present = (Outcome.LOST, 0) if lost else (Outcome.REFUSED, first)
            log.debug("pages %s..%s were not stored: %s", first, end, error)
        finally:
            for task in run:
                self._end(task, outcome, present, stored)
                stored = 0  # told once

    async def _commit(self, run: Sequence[CommitTask]) -> tuple[Outcome, int, int]:
        last = run[-1]
        handle = await self._namespaces.get(last.identity)
        reservation = await handle.reserve(
            last.tokens, extra_keys=last.extra_keys, wait_ms=ROOM_WAIT_MS, timeout_s=self._timeout_s
        )
        async with reservation:
            if reservation.present_pages < run[0].first_page:
                return Outcome.BEHIND, reservation.present_pages, 0
            stored = await self._fill(reservation, run)
        return Outcome.STORED, last.end, stored

    async def _fill(self, reservation: Reservation, run: Sequence[CommitTask]) -> int:
        if not reservation.missing_pages:
            return 0
        places = {task.first_page + i: place for task in run for i, place in enumerate(task.places)}
        missing = {page: places[page] for page in reservation.missing}
        reservation.adopt({page: (place.staging, place.index) for page, place in missing.items()})
        result = await reservation.commit(durable=self._durable, verify=False, timeout_s=self._timeout_s)
        return result.stored_pages

    def _end(self, task: CommitTask, outcome: Outcome, present: int, stored: int = 0) -> None:
        free_places(task.places)
        self._told(Settled(task.job, outcome, present, stored))


def stagings(places: Sequence[Place]) -> list[Staging]:
    """What the places lie in, in order, each once."""
    return list({id(place.staging): place.staging for place in places}.values())


def free_places(places: Sequence[Place]) -> None:
    """Give staging memory back."""
    for staging in stagings(places):
        staging.free()


def staged_runs(places: Sequence[Place]) -> tuple[StagedRun, ...]:
    """Where workers find the places, which are all of their stagings'."""
    return tuple(
        StagedRun(run.path, run.size_bytes, run.inode, run.offset, run.pages)
        for staging in stagings(places)
        for run in staging.runs
    )


def _next_run(line: collections.deque[CommitTask]) -> list[CommitTask]:
    """The jobs at the head of a line that follow each other."""
    run: list[CommitTask] = []
    while line and (not run or line[0].first_page == run[-1].end):
        run.append(line.popleft())
    return run
