"""Workers beside a real sidecar: what the scheduler's process leases and stages, they read and fill."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_kit import Outcome, make_caches, make_facts, make_settings, part_of, step

from hicache.errors import CorruptError
from hicache.integrations.vllm.messages import LoadOrder, SaveOrder, StagedRun, StepOrders
from hicache.integrations.vllm.worker import Worker
from hicache.rpc.client import Client, Lease, NamespaceHandle

WORLD = 2
FACTS = make_facts(world=WORLD)
NAMES = [layer.name for layer in FACTS.layers]
PART = FACTS.part_block_bytes
PAGE = WORLD * PART
TOKENS = np.arange(32 * 12, dtype=np.int32)


class Sidecar:
    """A sidecar of its own process; it can be killed."""

    def __init__(self, home: str) -> None:
        self.home = home
        self.target = f"unix://{home}/hc.sock"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hicache", "serve", "--socket-path", f"{self.home}/hc.sock"]
        return subprocess.Popen(
            [*command, "--host-bytes", "32MiB", "--no-prefault", "--until-eof"],
            stdin=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)

    def restart(self) -> None:
        self.close()
        self.process = self._start()

    def close(self) -> None:
        self.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def flip(self, wanted: bytes) -> None:
        """A bit of some of its pages' memory changes."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text()
        found = re.findall(r"^(\w+)-(\w+) rw-s \S+ \S+ \S+ +/memfd:", maps, re.MULTILINE)
        with Path(f"/proc/{self.process.pid}/mem").open("r+b", buffering=0) as memory:
            for begin, end in ((int(begin, 16), int(end, 16)) for begin, end in found):
                memory.seek(begin)
                at = memory.read(end - begin).find(wanted)
                if at >= 0:
                    memory.seek(begin + at)
                    memory.write(bytes([wanted[0] ^ 1]))
                    return
        raise AssertionError("these bytes are in no arena")


@pytest.fixture
def sidecar() -> Iterator[Sidecar]:
    with tempfile.TemporaryDirectory(prefix="hc") as home:  # short: a socket's path has 107 bytes
        sidecar = Sidecar(home)
        yield sidecar
        sidecar.close()


class Engine:
    """The scheduler's client and both ranks' workers, in one process."""

    def __init__(self, sidecar: Sidecar, **settings: Any) -> None:
        self.client = Client(sidecar.target)
        self.client.connect()
        fields = {"model": "m", "page_bytes": PAGE, "page_tokens": 32, "world_size": WORLD}
        self.namespace: NamespaceHandle = self.client.namespace(**fields)  # type: ignore[arg-type]
        self.caches = [make_caches(FACTS, seed) for seed in (1, 2)]
        self.workers = []
        for rank in range(WORLD):
            chosen = make_settings(endpoint=sidecar.target, reconnect_ms=20, **settings)
            self.workers.append(Worker(FACTS, chosen, rank))
            self.workers[rank].register(self.caches[rank])
        self.jobs = 0

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.client.close()

    def page(self, block: int) -> bytes:
        return b"".join(part_of(caches, [block]) for caches in self.caches)

    def step(self, orders: StepOrders) -> list[Outcome]:
        return [step(worker, orders, NAMES) for worker in self.workers]

    def store(self, block_ids: list[int], ranks: int = WORLD) -> None:
        """Save the blocks as the first pages of the prompt; the scheduler commits once all ranks have reported."""
        staging = self.client.staging(PAGE, len(block_ids))
        runs = tuple(StagedRun(r.path, r.size_bytes, r.inode, r.offset, r.pages) for r in staging.runs)
        self.jobs += 1
        orders = StepOrders(1, saves=(SaveOrder(self.jobs, "r", runs, tuple(block_ids)),))
        report = self.step(orders)[0].report.merged(step(self.workers[1], StepOrders(1), NAMES).report)
        for worker in self.workers[1:ranks]:
            report = report.merged(worker.take_report())
        assert not report.void
        with self.namespace.reserve(TOKENS[: 32 * len(block_ids)]) as reservation:
            reservation.adopt({page: (staging, page) for page in range(len(block_ids))})
            reservation.commit()

    def lease(self, **how: Any) -> Lease:
        return self.namespace.fetch(TOKENS, **how)

    def load(self, lease: Lease, block_ids: list[int], **changes: Any) -> list[Outcome]:
        how = {"asynchronous": False, **changes}
        order = LoadOrder("r", lease.ticket(), 0, len(block_ids), 0, tuple(block_ids), **how)
        return self.step(StepOrders(1, loads=(order,)))


@pytest.fixture
def engine(sidecar: Sidecar) -> Iterator[Engine]:
    engine = Engine(sidecar)
    yield engine
    engine.close()


def test_what_both_ranks_stored_both_ranks_load(engine: Engine) -> None:
    """Their parts make one page, which is leased as one."""
    engine.store([0, 1, 2, 3, 4])
    wanted = [engine.page(block) for block in range(5)]
    with engine.lease() as lease:
        assert [bytes(view) for view in lease.views()] == wanted
        outcomes = engine.load(lease, [30, 31, 40, 50, 49])
    assert [outcome.failed_blocks for outcome in outcomes] == [set(), set()]
    assert [engine.page(block) for block in (30, 31, 40, 50, 49)] == wanted


def test_an_asynchronous_load_beside_a_client_that_does_other_things(engine: Engine) -> None:
    engine.store(list(range(8)))
    wanted = [engine.page(block) for block in range(8)]
    with engine.lease() as lease:
        finished = [
            set(outcome.finished) for outcome in engine.load(lease, list(range(20, 28)), asynchronous=True)
        ]
        until = time.monotonic() + 20
        while finished != [{"r"}, {"r"}] and time.monotonic() < until:
            engine.lease().release()
            for rank, worker in enumerate(engine.workers):
                finished[rank] |= step(worker, StepOrders(1), NAMES).finished
    assert finished == [{"r"}, {"r"}]
    assert [engine.page(block) for block in range(20, 28)] == wanted


def test_rot_between_the_lease_and_the_load(engine: Engine, sidecar: Sidecar) -> None:
    """One rank says which page it is; the sidecar looks for itself, and drops it."""
    engine.store([0, 1, 2, 3])
    lease = engine.lease()
    try:
        sidecar.flip(part_of(engine.caches[1], [3])[:64])
    except PermissionError:
        pytest.skip("this kernel does not let us write another process's memory")
    outcomes = engine.load(lease, [10, 11, 12, 13])
    report = outcomes[0].report.merged(outcomes[1].report)
    assert report.corrupt == (("r", 3),)
    assert report.failed == {"r"}
    assert [outcome.failed_blocks for outcome in outcomes] == [set(), {13}]
    with pytest.raises(CorruptError):
        lease.copy_into(bytearray(4 * PAGE))
    assert lease.report_corrupt([3]) == 1
    lease.release()
    with engine.lease() as again:
        assert len(again) == 3


def test_a_lease_that_has_expired(engine: Engine) -> None:
    engine.store([0, 1])
    before = [engine.page(block) for block in (10, 11)]
    lease = engine.lease(ttl_ms=1000)
    ticket = lease.ticket()
    time.sleep(max(0.0, (ticket.deadline_ns - time.monotonic_ns()) / 1e9) + 0.01)
    order = LoadOrder("r", ticket, 0, 2, 0, (10, 11), asynchronous=False)
    outcomes = engine.step(StepOrders(1, loads=(order,)))
    assert [outcome.failed_blocks for outcome in outcomes] == [{10, 11}] * WORLD
    assert all(outcome.report.corrupt == () for outcome in outcomes)
    assert [engine.page(block) for block in (10, 11)] == before, "nothing was copied"


def test_slots_that_were_given_to_others(engine: Engine) -> None:
    """A released lease's pages may be evicted and their slots reused before the deadline in the ticket."""
    engine.store([0, 1])
    lease = engine.lease()
    ticket = lease.ticket()
    lease.release()
    engine.client.admin.clear(engine.namespace)
    until = time.monotonic() + 30
    outcomes: list[Outcome] = []
    while time.monotonic() < until:  # slots rest for a grace first
        order = LoadOrder("r", ticket, 0, 2, 0, (10, 11), asynchronous=False)
        outcomes = engine.step(StepOrders(1, loads=(order,)))
        if all(outcome.failed_blocks for outcome in outcomes):
            break
        time.sleep(0.02)
    assert [outcome.failed_blocks for outcome in outcomes] == [{10, 11}] * WORLD
    assert all(outcome.report.corrupt == () for outcome in outcomes), "stale is not corrupt"


def test_a_sidecar_killed_between_the_lease_and_the_load(engine: Engine, sidecar: Sidecar) -> None:
    """The memory persists, so the step goes on either way: right, or told as failed, in time."""
    engine.store([0, 1, 2])
    wanted = [engine.page(block) for block in range(3)]
    assert not any(outcome.failed_blocks for outcome in engine.load(engine.lease(), [20, 21, 22]))
    ticket = engine.lease().ticket()
    sidecar.kill()
    order = LoadOrder("r", ticket, 0, 3, 0, (10, 11, 12), asynchronous=False)
    begun = time.monotonic()
    outcomes = engine.step(StepOrders(1, loads=(order,)))
    assert time.monotonic() - begun < 4, "a lost sidecar is not waited for"
    for rank, outcome in enumerate(outcomes):
        if not outcome.failed_blocks:
            got = [part_of(engine.caches[rank], [block]) for block in (10, 11, 12)]
            assert got == [page[rank * PART : (rank + 1) * PART] for page in wanted]
        else:
            assert outcome.failed_blocks == {10, 11, 12}


def test_a_sidecar_killed_in_the_middle_of_a_load(engine: Engine, sidecar: Sidecar) -> None:
    engine.store([0, 1, 2])
    wanted = [engine.page(block) for block in range(3)]
    lease = engine.lease()
    blocks = engine.workers[0]._desk.loading.blocks  # type: ignore[union-attr]
    real, killed = blocks.load, threading.Event()

    def killing(*args: Any) -> None:
        if not killed.is_set():
            killed.set()
            sidecar.kill()
        real(*args)

    blocks.load = killing  # type: ignore[method-assign]
    order = LoadOrder("r", lease.ticket(), 0, 3, 0, (10, 11, 12), asynchronous=False)
    outcome = step(engine.workers[0], StepOrders(1, loads=(order,)), NAMES)
    assert killed.is_set()
    if not outcome.failed_blocks:
        got = [part_of(engine.caches[0], [block]) for block in (10, 11, 12)]
        assert got == [page[:PART] for page in wanted]


def test_a_sidecar_that_comes_back(engine: Engine, sidecar: Sidecar) -> None:
    """Workers attach again by themselves; tickets of the former run are refused, those of the new one read."""
    engine.store([0, 1])
    old = engine.lease().ticket()
    sidecar.restart()
    order = LoadOrder("r", old, 0, 2, 0, (10, 11), asynchronous=False)
    until = time.monotonic() + 30
    while not engine.client.connect() and time.monotonic() < until:
        time.sleep(0.02)
    engine.store([5, 6])
    outcomes = engine.step(StepOrders(1, loads=(order,)))
    for outcome in outcomes:
        assert outcome.failed_blocks in (set(), {10, 11})
    wanted = [engine.page(block) for block in (5, 6)]
    while time.monotonic() < until:
        outcomes = engine.load(engine.lease(), [20, 21])
        if not any(outcome.failed_blocks for outcome in outcomes):
            break
        time.sleep(0.05)
    assert [engine.page(block) for block in (20, 21)] == wanted


def test_workers_start_before_their_sidecar() -> None:
    with tempfile.TemporaryDirectory(prefix="hc") as home:
        settings = make_settings(endpoint=f"unix://{home}/hc.sock", reconnect_ms=20, load_timeout_ms=500)
        worker = Worker(make_facts(), settings, 0)
        worker.register(make_caches(FACTS, 1))
        assert not step(worker, StepOrders(1), NAMES).failed_blocks
        worker.close()
