"""Transfers and who waits for them; timelines and gates, without a wire."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from runtime_helpers import open_fds, settle

from hicache.device.kv import FAILED, MemoryKind, PagedKv, SharedMemory
from hicache.device.transfers import HostPages, Transfer, TransferDone
from hicache.errors import (
    ExhaustedError,
    HicacheError,
    InvalidArgumentError,
    NotFoundError,
    StaleError,
    UnavailableError,
)
from hicache.runtime.desk import TransferDesk
from hicache.runtime.kv_regions import TRANSFERS_PER_SESSION, KvRegions
from hicache.runtime.regions import RegionKind
from hicache.runtime.timelines import Gate, Timeline
from hicache.runtime.workers import Workers
from hicache.types import Outcome


class Handle:
    def __init__(self, kv: PagedKv) -> None:
        self.kv = kv


class Scripted:
    """Transfers that end when a test says so. ``close`` forgets what has not ended."""

    memory_kinds: tuple[str, ...] = ("memfd",)
    device_uuids: tuple[bytes, ...] = ()

    def __init__(self) -> None:
        self.open: set[Handle] = set()
        self.closing: list[Callable[[], None]] = []
        self.begun: list[Transfer] = []
        self.ended: list[TransferDone] = []
        self.refuse: HicacheError | None = None
        self.closed = False
        self.opening = threading.Event()
        self.opening.set()

    def open_kv(self, kv: PagedKv) -> Handle:
        self.opening.wait(5)
        for memory in kv.memories:
            os.close(memory.fd)
        if self.refuse is not None:
            raise self.refuse
        handle = Handle(kv)
        self.open.add(handle)
        return handle

    def close_kv(self, handle: Any, then: Callable[[], None]) -> None:
        if self.closed:
            raise UnavailableError("the region is closed")
        self.open.remove(handle)
        self.closing.append(then)

    def check(self, handle: Any, device_pages: bool) -> None:
        pass

    def load(self, transfer: Transfer) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.begun.append(transfer)

    pack = load

    def poll(self) -> list[TransferDone]:
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> None:
        self.closed = True
        self.open.clear()


def paged_kv() -> PagedKv:
    memory = SharedMemory(MemoryKind.MEMFD, 4096, fd=os.memfd_create("kv"))
    return PagedKv((memory,), (0, 0), (0, 2048), 1, 4, 4, 1, 4, 2, (16, 4, 4, 1))


class Bench:
    def __init__(self) -> None:
        self.transfers = Scripted()
        self.workers = Workers(1, lambda: None)
        self.desk = TransferDesk(self.transfers, self.workers, lambda: None)
        self.sessions = {1, 2}
        numbers = iter(range(1, 10_000))
        self.regions = KvRegions(self.desk, lambda: next(numbers), self.alive)

    def alive(self, session: int) -> None:
        if session not in self.sessions:
            raise StaleError("gone")

    def poll(self) -> int:
        return self.workers.poll() + self.desk.poll()

    async def until(self, call: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.ensure_future(call)
        await settle(lambda: bool(self.poll()) or task.done())
        await settle(lambda: self.poll() == 0 and task.done())
        return task.result()

    def transfer(self, pages: int = 1) -> Transfer:
        handle = Handle(paged_kv())
        os.close(handle.kv.memories[0].fd)
        places = np.zeros((pages, 1), np.int64)
        return Transfer(self.desk.number(), handle, HostPages(()), places, 4, 64)

    def close(self) -> None:
        self.workers.close()
        self.poll()
        self.desk.finish()
        self.desk.close()
        self.regions.close()


def run(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        before = open_fds()
        bench = Bench()
        try:
            await test(bench)
        finally:
            bench.close()
        assert not bench.desk.in_flight
        assert open_fds() <= before

    asyncio.run(main())


def test_counters_are_little_endian_and_shared() -> None:
    timeline = Timeline(3)
    other = os.dup(timeline.fd)
    counter = timeline.counter(2)
    counter.set(FAILED)
    assert os.pread(other, 24, 0) == bytes(23) + b"\x80"
    os.pwrite(other, (77).to_bytes(8, "little"), 8)
    assert timeline.counter(1).get() == 77
    timeline.close()
    timeline.close()
    counter.set(1)
    assert counter.get() == FAILED  # nobody waits for a timeline that is gone
    assert os.pread(other, 8, 16) == FAILED.to_bytes(8, "little")
    os.close(other)
    for number in (0, 65_537, -1):
        with pytest.raises(InvalidArgumentError):
            Timeline(number)
    for number in (-1, 3):
        with pytest.raises(InvalidArgumentError):
            Timeline(3).counter(number)


def test_a_gate_lets_pass_what_was_counted_before_it_was_cut() -> None:
    timeline = Timeline(2)
    first, second = (Gate(timeline.counter(at), 4) for at in (0, 1))
    timeline.set(0, 3)
    assert (first.get(), first.sound) == (3, True)
    first.cut("one")
    first.cut("two")
    assert (first.get(), first.sound, first.reason) == (FAILED, False, "one")
    timeline.set(1, 4)
    assert second.get() == 4
    second.cut("late")
    assert second.sound
    timeline.set(0, FAILED)
    third = Gate(timeline.counter(0), 4)
    assert (third.get(), third.sound) == (FAILED, False)
    timeline.close()


def test_every_transfer_ends_once() -> None:
    async def test(bench: Bench) -> None:
        told: list[TransferDone] = []
        transfers = [bench.transfer(2) for _ in range(3)]
        bench.desk.load(transfers[0], told.append)
        bench.desk.pack(transfers[1], told.append)
        bench.transfers.refuse = UnavailableError("no more")
        bench.desk.load(transfers[2], told.append)
        assert not told  # never from within the call
        assert bench.poll() == 1
        assert (told[0].id, told[0].error) == (transfers[2].id, "no more")
        assert told[0].outcomes == (Outcome.FAULT,) * 2
        bench.transfers.ended = [TransferDone(transfers[1].id, (Outcome.OK,) * 2, (1, 2))]
        assert bench.poll() == 1
        bench.close()
        assert [done.id for done in told] == [transfers[2].id, transfers[1].id, transfers[0].id]
        assert told[2].outcomes == (Outcome.FAULT,) * 2

    run(test)


def test_a_region_is_closed_when_its_memory_is_unmapped() -> None:
    async def test(bench: Bench) -> None:
        info = await bench.until(bench.regions.register(1, paged_kv()))
        assert (info.kind, info.size_bytes) == (RegionKind.KV, 4096)
        for session, region in ((2, info.region_id), (1, info.region_id + 1)):
            with pytest.raises(NotFoundError):
                bench.regions.find(session, region)
        going = [asyncio.ensure_future(bench.regions.unregister(1, info.region_id)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert not any(each.done() for each in going)
        threading.Thread(target=bench.transfers.closing.pop()).start()
        await settle(lambda: bool(bench.poll()))
        await asyncio.gather(*going)
        await bench.regions.unregister(1, info.region_id)  # unknown by now: fine

    run(test)


def test_a_region_whose_session_or_caller_has_gone_is_closed_again() -> None:
    async def test(bench: Bench) -> None:
        bench.transfers.opening.clear()
        late = asyncio.ensure_future(bench.regions.register(1, paged_kv()))
        gone = asyncio.ensure_future(bench.regions.register(2, paged_kv()))
        await asyncio.sleep(0.01)
        gone.cancel()
        bench.sessions.discard(1)
        bench.transfers.opening.set()
        await settle(lambda: bool(bench.poll()) or len(bench.transfers.closing) == 2)
        await settle(lambda: (bench.poll(), len(bench.transfers.closing) == 2)[1])
        with pytest.raises(StaleError):
            await late
        assert not bench.transfers.open
        assert bench.regions.regions == 0

    run(test)


def test_descriptors_of_memory_that_nobody_opened_are_closed() -> None:
    async def test(bench: Bench) -> None:
        bench.transfers.refuse = InvalidArgumentError("it may shrink")
        with pytest.raises(InvalidArgumentError, match="may shrink"):
            await bench.until(bench.regions.register(1, paged_kv()))
        bench.workers.close()
        with pytest.raises(UnavailableError):
            await bench.until(bench.regions.register(1, paged_kv()))

    run(test)


def test_a_counter_belongs_to_one_transfer_at_a_time() -> None:
    async def test(bench: Bench) -> None:
        region = bench.regions.find(1, (await bench.until(bench.regions.register(1, paged_kv()))).region_id)
        timeline = bench.regions.make_timeline(1, 2).region_id
        use = bench.regions.use(region, timeline, 1)
        use.hold()
        for number in (1, 2, -1):
            with pytest.raises(InvalidArgumentError):
                bench.regions.use(region, timeline, number)
        with pytest.raises(InvalidArgumentError):
            bench.regions.use(region, 0, 1)
        use.release()
        going = asyncio.ensure_future(bench.regions.unregister(1, timeline))
        await asyncio.sleep(0.01)
        assert not going.done()
        use.release()
        await going
        with pytest.raises(NotFoundError):
            bench.regions.use(region, timeline, 1)
        assert bench.regions.timelines == 0

    run(test)


def test_transfers_of_a_session_are_bounded() -> None:
    async def test(bench: Bench) -> None:
        region = bench.regions.find(1, (await bench.until(bench.regions.register(1, paged_kv()))).region_id)
        uses = [bench.regions.use(region, 0, 0) for _ in range(TRANSFERS_PER_SESSION)]
        with pytest.raises(ExhaustedError):
            bench.regions.use(region, 0, 0)
        uses.pop().release()
        bench.regions.use(region, 0, 0).release()
        for use in uses:
            use.release()

    run(test)


def test_what_is_left_goes_with_the_service() -> None:
    async def test(bench: Bench) -> None:
        region = bench.regions.find(1, (await bench.until(bench.regions.register(1, paged_kv()))).region_id)
        timeline = bench.regions.make_timeline(1, 2).region_id
        use = bench.regions.use(region, timeline, 1, gated=True)
        bench.regions.cut("the service stopped")
        assert use.gate is not None
        assert use.gate.reason == "the service stopped"
        bench.close()
        assert (bench.regions.regions, bench.regions.timelines) == (0, 0)

    run(test)


def test_a_session_may_end_while_the_service_closes() -> None:
    """Its regions are unmapped with everything else: nobody waits for them for ever."""

    async def test(bench: Bench) -> None:
        info = await bench.until(bench.regions.register(1, paged_kv()))
        second = await bench.until(bench.regions.register(1, paged_kv()))
        bench.desk.finish()  # on its way, on another thread
        await bench.until(bench.regions.unregister(1, info.region_id))
        bench.desk.close()
        await bench.regions.unregister(1, second.region_id)
        assert bench.regions.regions == 0

    run(test)


def test_a_caller_that_goes_just_as_its_region_comes_leaves_nothing() -> None:
    async def test(bench: Bench) -> None:
        call = asyncio.ensure_future(bench.regions.register(1, paged_kv()))
        await settle(lambda: len(bench.transfers.open) == 1)
        bench.workers.close()
        bench.poll()  # the handle is there, its caller has not seen it
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not bench.transfers.open
        assert bench.regions.regions == 0

    run(test)
