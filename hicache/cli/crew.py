"""Several client processes at work on one sidecar; each is a fresh interpreter (spawn: grpc does not like forks)."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from hicache.cli.drive import Driver, Tally
from hicache.cli.workload import Tokens, WorkloadSpec, turns
from hicache.errors import HicacheError, UnavailableError

if TYPE_CHECKING:
    from hicache.rpc.client import Client

SILENCE_S = 60.0
END_S = 15.0


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What one process does: every turn of its workload, then every conversation again, from whatever tier."""

    target: str
    workload: WorkloadSpec
    page_tokens: int
    page_bytes: int
    salt: str
    wait_ms: int


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """One step done."""

    phase: str
    tally: Tally | None = None  # at the end
    problem: str = ""


def run(jobs: Sequence[Job], on_step: Callable[[str], None]) -> Tally:
    """Run a process for each job, call ``on_step(phase)`` for each of their steps, and add their tallies up.

    Raises HicacheError for a process that failed, UnavailableError for one that fell silent; none is left
    behind.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in jobs]
    workers = [
        context.Process(
            target=_work, args=(job, mine), name=f"hicache-client-{job.workload.worker}", daemon=True
        )
        for job, (_, mine) in zip(jobs, pipes, strict=True)
    ]
    patience_s = 0.0
    try:
        with _interrupts_ignored():  # inherited: Ctrl-C is for this process, which ends the others in order
            for worker, (_, mine) in zip(workers, pipes, strict=True):
                worker.start()
                mine.close()
        total = _collect([theirs for theirs, _ in pipes], on_step)
        patience_s = END_S  # they are done, and leave by themselves
        return total
    finally:
        for worker in workers:
            _end(worker, patience_s)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _collect(pipes: list[Connection], on_step: Callable[[str], None]) -> Tally:
    total = Tally()
    open_pipes = list(pipes)
    while open_pipes:
        ready = multiprocessing.connection.wait(open_pipes, SILENCE_S)
        if not ready:
            raise UnavailableError(f"a client process said nothing for {SILENCE_S:.0f} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                progress: Progress = pipe.recv()
            except EOFError:
                raise HicacheError("a client process died") from None
            if progress.problem:
                raise HicacheError(f"a client process failed: {progress.problem}")
            if progress.tally is None:
                on_step(progress.phase)
                continue
            total.add(progress.tally)
            open_pipes.remove(pipe)
    return total


def _end(worker: multiprocessing.process.BaseProcess, patience_s: float) -> None:
    if worker.pid is None:
        return
    worker.join(patience_s)
    if worker.exitcode is None:
        worker.terminate()
        worker.join(END_S)
    if worker.exitcode is None:
        worker.kill()
        worker.join()
    worker.close()


def _work(job: Job, pipe: Connection) -> None:
    """The child process."""
    from hicache.cli import link

    try:
        with link.open_client(job.target, f"client {job.workload.worker}") as client:
            tally = _drive(client, job, pipe)
        pipe.send(Progress("done", tally))
    except HicacheError as error:
        pipe.send(Progress("failed", problem=str(error)))
    except BrokenPipeError:
        return  # the parent is gone


def _drive(client: Client, job: Job, pipe: Connection) -> Tally:
    from hicache.cli.payload import PageMaker
    from hicache.runtime.clock import Clock

    namespace = client.namespace(
        model="hicache-demo", salt=job.salt, page_tokens=job.page_tokens, page_bytes=job.page_bytes
    )
    driver = Driver(namespace, PageMaker(job.page_bytes), Clock(), salt=job.salt, wait_ms=job.wait_ms)
    width = namespace.spec.symbol_bytes
    said: dict[int, Tokens] = {}
    for turn in turns(job.workload):
        driver.match(_pages(turn.prompt, width))
        driver.request(_pages(turn.prompt, width), _pages(turn.full, width))
        said[turn.talk] = turn.full
        pipe.send(Progress("turns"))
    for full in said.values():
        driver.look_up(_pages(full, width))
        pipe.send(Progress("again"))
    return driver.tally


def _pages(tokens: Tokens, width: int) -> bytes:
    """The prompt's whole pages as bytes."""
    raw = tokens.astype("<i4", copy=False).tobytes()
    return raw[: len(raw) // width * width]
