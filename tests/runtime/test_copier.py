"""Copies between every pair of real tiers, from clients, and what becomes of faults on the way."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
from runtime_helpers import PAGE_BYTES, checksum, memfd, open_fds, page
from runtime_rig import DEVICE, DISK, HOST, Altered, Rig, rig

from hicache.runtime.ports import TierPort
from hicache.runtime.regions import ClientRegion
from hicache.runtime.sources import RegionSource, StreamSource
from hicache.types import Completion, Op, Outcome

NAMES = ("device", "host", "disk")
PAIRS = list(itertools.permutations((DEVICE, HOST, DISK), 2))


def altering(tier: int, change: Callable[[Op, Completion], Completion]) -> Callable[[TierPort], None]:
    def wrap(port: TierPort) -> None:
        if port.index == tier:
            port.store = Altered(port.store, change)  # type: ignore[assignment]

    return wrap


def turned(op: Op, position: int, outcome: Outcome) -> Callable[[Op, Completion], Completion]:
    """One page of every batch of this kind comes to something else."""

    def change(found: Op, completion: Completion) -> Completion:
        if found is not op or len(completion.outcomes) <= position:
            return completion
        outcomes = list(completion.outcomes)
        outcomes[position] = outcome
        return dataclasses.replace(completion, outcomes=tuple(outcomes), error="a test's doing")

    return change


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(test())


@pytest.mark.parametrize(("src", "dst"), PAIRS, ids=[f"{NAMES[a]}-{NAMES[b]}" for a, b in PAIRS])
def test_every_pair_of_tiers(tmp_path: Path, src: int, dst: int) -> None:
    async def test() -> None:
        async with rig(tmp_path) as bench:
            pages = [3, 4, 5, 9, 1, 0, 7, 12, 11, 10, 14]  # more than the bounce buffers take at a time
            await bench.put(src, pages)
            event = await bench.copy(src, dst, pages)
            assert event.outcomes is None
            assert not event.source_fault
            assert len(event.charges) == (len(pages) if dst == DISK else 0)
            assert all(charge >= 1 for charge in event.charges)
            assert await bench.get(dst, pages) == [page(number) for number in pages]
            if dst == HOST:
                bench.check(HOST, 3)

    run(test)


# not from host memory: there the engine's pins say what is held, and the checksum whether it is right
@pytest.mark.parametrize(("src", "dst"), [pair for pair in PAIRS if pair[0] != HOST])
def test_a_missing_source_page_is_the_sources_fault(tmp_path: Path, src: int, dst: int) -> None:
    async def test() -> None:
        async with rig(tmp_path) as bench:
            await bench.put(src, [0, 1, 3])
            event = await bench.copy(src, dst, [0, 1, 2, 3])
            assert event.outcomes == (Outcome.OK, Outcome.OK, Outcome.MISS, Outcome.OK)
            assert event.source_fault
            assert await bench.get(dst, [0, 1, 2, 3]) == [page(0), page(1), None, page(3)]

    run(test)


@pytest.mark.parametrize("dst", [DEVICE, DISK])
def test_host_memory_that_rotted_is_the_sources_fault(tmp_path: Path, dst: int) -> None:
    async def test() -> None:
        async with rig(tmp_path) as bench:
            await bench.put(HOST, [0, 1, 2])
            bench.corrupt(HOST, 1)
            event = await bench.copy(HOST, dst, [0, 1, 2])
            assert event.outcomes == (Outcome.OK, Outcome.CORRUPT, Outcome.OK)
            assert event.source_fault
            assert await bench.get(dst, [0, 1, 2]) == [page(0), None, page(2)]

    run(test)


@pytest.mark.parametrize("src", [DEVICE, HOST])
@pytest.mark.parametrize("outcome", [Outcome.FULL, Outcome.FAULT])
def test_a_full_or_faulty_destination_is_not_the_sources_fault(
    tmp_path: Path, src: int, outcome: Outcome
) -> None:
    async def test() -> None:
        async with rig(tmp_path, wrap=altering(DISK, turned(Op.PUT, 1, outcome))) as bench:
            await bench.put(src, [0, 1, 2])
            event = await bench.copy(src, DISK, [0, 1, 2])
            assert event.outcomes == (Outcome.OK, outcome, Outcome.OK)
            assert not event.source_fault

    run(test)


def test_where_both_ends_failed_the_source_keeps_its_pages(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig(tmp_path, wrap=altering(DISK, turned(Op.PUT, 0, Outcome.FULL))) as bench:
            await bench.put(DEVICE, [0, 1])
            event = await bench.copy(DEVICE, DISK, [0, 1, 2])
            assert event.outcomes == (Outcome.FULL, Outcome.OK, Outcome.MISS)
            assert not event.source_fault

    run(test)


def test_puts_to_one_tier_keep_the_order_of_the_copies(tmp_path: Path) -> None:
    """Parents reach the disk before children, though a worker may finish the later chunk first."""

    async def test() -> None:
        stores: list[Altered] = []

        def wrap(port: TierPort) -> None:
            if port.index == DISK:
                stores.append(Altered(port.store, lambda _op, completion: completion))
                port.store = stores[0]  # type: ignore[assignment]

        class Slow(StreamSource):
            def read(self, pages, buffers):  # type: ignore[no-untyped-def]
                if 0 in pages:
                    time.sleep(0.1)
                return super().read(pages, buffers)

        async with rig(tmp_path, wrap=wrap) as bench:
            pages = list(range(8))
            source = Slow({number: memoryview(page(number)) for number in pages}, {})
            event = await bench.copy_in(DISK, pages, source)
            assert event.outcomes is None
            puts = [batch for batch in stores[0].batches if batch.op is Op.PUT]
            assert [batch.records[0].symbol[0] for batch in puts] == [0, 4]

    run(test)


def test_many_copies_through_few_buffers(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig(tmp_path, chunk_bytes=2 * PAGE_BYTES, bounce_bytes=2 * PAGE_BYTES) as bench:
            await bench.put(DEVICE, list(range(16)))
            events = await asyncio.gather(
                *(bench.copy(DEVICE, DISK, list(range(start, start + 4))) for start in (0, 4, 8, 12))
            )
            assert all(event.outcomes is None for event in events)
            assert await bench.get(DISK, list(range(16))) == [page(number) for number in range(16)]

    run(test)


# --- from clients


def region_of(data: bytes, session: int = 1) -> ClientRegion:
    return ClientRegion(1, session, memfd(data), len(data))


@pytest.mark.parametrize("tier", [DEVICE, HOST, DISK])
def test_a_clients_region_is_copied_in(tmp_path: Path, tier: int) -> None:
    async def test() -> None:
        async with rig(tmp_path) as bench:
            numbers = [2, 3, 4, 8, 9, 10, 11, 12, 13]
            left = region_of(b"".join(map(page, numbers[:3])))
            right = region_of(b"x" + b"".join(map(page, numbers[3:])))
            source = RegionSource(
                [(2, 3), (8, 6)], [(left, 0), (right, 1)], [checksum(page(n)) for n in numbers]
            )
            event = await bench.copy_in(tier, numbers, source)
            assert event.outcomes is None
            assert len(event.charges) == (len(numbers) if tier == DISK else 0)
            assert await bench.get(tier, numbers) == [page(number) for number in numbers]
            left.release()
            right.release()
            assert left.fd == right.fd == -1

    run(test)


@pytest.mark.parametrize("tier", [DEVICE, HOST, DISK])
def test_a_short_region_is_a_fault_of_its_pages(tmp_path: Path, tier: int) -> None:
    async def test() -> None:
        async with rig(tmp_path) as bench:
            region = region_of(page(0) + page(1) + page(2)[:-1])
            event = await bench.copy_in(tier, range(6), RegionSource([(0, 6)], [(region, 0)]))
            assert event.outcomes == (Outcome.OK, Outcome.OK) + (Outcome.FAULT,) * 4
            assert event.source_fault
            assert await bench.get(tier, [0, 1, 2]) == [page(0), page(1), None]
            region.release()

    run(test)


@pytest.mark.parametrize("tier", [DEVICE, HOST, DISK])
def test_a_wrong_checksum_is_corrupt(tmp_path: Path, tier: int) -> None:
    async def test() -> None:
        async with rig(tmp_path) as bench:
            region = region_of(b"".join(map(page, range(5))))
            sums = [checksum(page(number)) for number in range(5)]
            sums[3] ^= 1
            event = await bench.copy_in(tier, range(5), RegionSource([(0, 5)], [(region, 0)], sums))
            assert event.outcomes == (Outcome.OK,) * 3 + (Outcome.CORRUPT, Outcome.OK)
            assert await bench.get(tier, [3, 4]) == [None, page(4)]
            region.release()

    run(test)


def test_a_region_outlives_its_session_while_it_is_read(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig(tmp_path) as bench:
            before = open_fds()
            region = region_of(b"".join(map(page, range(16))))
            copy = bench.start_copy_in(HOST, range(16), RegionSource([(0, 16)], [(region, 0)]))
            region.release()  # unregistered, or the session ended
            assert region.fd >= 0
            assert (await bench.finished(copy)).outcomes is None
            assert region.fd == -1
            assert open_fds() <= before

    run(test)


def test_a_source_that_raises_is_a_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with rig(tmp_path) as bench:
            for tier in (HOST, DISK):
                event = await bench.copy_in(tier, [0, 1], StreamSource({}, {}))
                assert event.outcomes == (Outcome.FAULT, Outcome.FAULT)

    run(test)
    assert "a copy failed" in caplog.text


def test_slots_without_a_segment_are_a_fault(tmp_path: Path) -> None:
    async def test() -> None:
        async with rig(tmp_path) as bench:
            beyond = 5 << 24
            source = StreamSource({0: memoryview(page(0))}, {})
            for tier in (DEVICE, HOST):
                event = await bench.finished(bench.start_copy_in(tier, [0], source, [beyond]))
                assert event.outcomes == (Outcome.FAULT,)
                assert not event.source_fault

    run(test)


def test_counts_bytes_in_and_out(tmp_path: Path) -> None:
    async def test(bench: Rig) -> None:
        await bench.put(HOST, [0, 1])
        await bench.copy(HOST, DISK, [0, 1])
        await bench.copy(DISK, DEVICE, [0, 1])
        assert [port.bytes_in // PAGE_BYTES for port in bench.ports] == [2, 2, 2]
        assert [port.bytes_out // PAGE_BYTES for port in bench.ports] == [0, 2, 2]

    async def main() -> None:
        async with rig(tmp_path) as bench:
            await test(bench)

    run(main)
