"""Pages as bytes: reading leases, writing reservations, and what faults of the tiers come to."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from runtime_helpers import PAGE_BYTES, FakeClock, TestClient, checksum, page, prompt, running, settle

from hicache.engine.actions import CommitResult
from hicache.errors import ConflictError, CorruptError, InvalidArgumentError, NotFoundError, UnavailableError
from hicache.runtime import Service, ServiceOptions
from hicache.runtime.writer import Writer
from hicache.types import Ack, Completion, Op, Outcome

HOST_ONLY = ServiceOptions(host_bytes=8 << 20, prefault=False)


def with_disk(tmp_path: Path) -> ServiceOptions:
    return ServiceOptions(
        host_bytes=8 << 20, disk_path=str(tmp_path / "disk"), disk_bytes=64 << 20, prefault=False
    )


def run(options: ServiceOptions, test: Callable[[Service, TestClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(options) as service:
            await test(service, TestClient(service))

    asyncio.run(main())


async def all_pages(
    service: Service, client: TestClient, lease: int, first: int = 0, count: int = 0
) -> list[bytes]:
    return [bytes(data) async for data, _ in service.read_pages(client.session, lease, first, count)]


# --- reading


def test_a_part_of_a_lease_is_read() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(600)
        result = await client.fetch(600)
        assert await all_pages(service, client, result.lease, 250, 300) == [page(n) for n in range(250, 550)]
        assert await all_pages(service, client, result.lease, 600) == []
        for first, count in ((-1, 2), (599, 2), (601, 0)):
            with pytest.raises(InvalidArgumentError):
                await all_pages(service, client, result.lease, first, count)

    run(HOST_ONLY, test)


def test_a_lease_that_ends_under_a_reader_ends_the_reading() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(600)  # more than is read ahead
        result = await client.fetch(600)
        pages = service.read_pages(client.session, result.lease, 0, 0)
        assert bytes((await anext(pages))[0]) == page(0)
        client.release(result)
        with pytest.raises(NotFoundError):
            async for _ in pages:
                pass
        with pytest.raises(NotFoundError):
            await all_pages(service, client, result.lease)

    run(HOST_ONLY, test)


def test_an_expired_lease_is_not_read() -> None:
    async def main() -> None:
        clock = FakeClock()
        async with running(HOST_ONLY, clock) as service:
            client = TestClient(service)
            await client.store(3)
            result = await client.fetch(3, ttl_ms=100)
            clock.advance(100)
            with pytest.raises(NotFoundError):
                await all_pages(service, client, result.lease)

    asyncio.run(main())


def test_a_page_that_rotted_in_memory_is_never_served_again() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(10)
        result = await client.fetch(10)
        memory = service._running.ports[0].addressable
        assert memory is not None
        memory.views([result.pieces[0].slots[4]])[0][5] ^= 1
        with pytest.raises(CorruptError, match="page 4"):
            await all_pages(service, client, result.lease)
        client.release(result)
        assert client.match(10) == 4
        stats = service.stats().tiers[0]
        assert stats.corrupt_pages == 1
        stored = await client.store(10)
        assert stored.stored_pages >= 1
        assert await client.read(await client.fetch(10)) == 10

    run(HOST_ONLY, test)


def test_a_page_that_rotted_on_disk_is_a_miss(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(10, ack=Ack.DURABLE)
        await service.evict(client.namespace, prompt(10), 0)
        _spoil(service, 1, Op.GET, 6, Outcome.CORRUPT)
        result = await client.fetch(10)
        assert result.granted_pages == 6
        assert await client.read(result) == 6
        client.release(result)
        await settle(lambda: service.stats().counters["copies_in_flight"] == 0)
        assert client.match(10) == 6
        assert service.stats().tiers[1].corrupt_pages == 1

    run(with_disk(tmp_path), test)


def _spoil(service: Service, tier: int, op: Op, position: int, outcome: Outcome) -> None:
    """One page of the next batch of this kind comes to something else."""
    port = service._running.ports[tier]
    store, ops = port.store, {}
    submit, poll = store.submit, store.poll
    left = [True]

    def spoiled_submit(batch):  # type: ignore[no-untyped-def]
        ops[batch.id] = batch.op
        submit(batch)

    def spoiled(completion: Completion) -> Completion:
        if not left[0] or ops.get(completion.id) is not op or len(completion.outcomes) <= position:
            return completion
        left[0] = False
        outcomes = list(completion.outcomes)
        outcomes[position] = outcome
        return dataclasses.replace(completion, outcomes=tuple(outcomes), error="a test's doing")

    def spoiled_poll() -> list[Completion]:
        return [spoiled(completion) for completion in poll()]

    store.submit, store.poll = spoiled_submit, spoiled_poll  # type: ignore[method-assign]


def test_a_write_fault_latches_the_disk_and_serving_goes_on(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(10, ack=Ack.DURABLE)
        _spoil(service, 1, Op.PUT, 9, Outcome.FAULT)
        result = await client.store(10, 1, ack=Ack.DURABLE)
        assert (result.stored_pages, result.durable_pages < 10) == (10, True)
        assert service.stats().tiers[1].state == "read-only"
        assert (await client.store(10, 2, ack=Ack.DURABLE)).durable_pages == 0
        await service.evict(client.namespace, prompt(10), 0)
        assert await client.read(await client.fetch(10)) == 10  # still readable

    run(with_disk(tmp_path), test)


# --- writing


async def reserve(service: Service, client: TestClient, pages: int) -> int:
    result = await service.reserve(client.session, client.namespace, prompt(pages))
    assert result.missing_pages == pages
    return result.reservation


@pytest.mark.parametrize("ack", list(Ack))
def test_pages_are_written_one_by_one(tmp_path: Path, ack: Ack) -> None:
    async def test(service: Service, client: TestClient) -> None:
        pages = 1300  # more than a chunk
        writer = service.begin_write(client.session, await reserve(service, client, pages))
        assert writer.page_bytes == PAGE_BYTES
        for number in range(pages):
            await writer.put(number, bytearray(page(number)), checksum(page(number)))
        result = await writer.commit(ack, last=True)
        durable = pages if ack is Ack.DURABLE else 0
        assert result == CommitResult(pages, 0, durable, 0)
        assert await client.read(await client.fetch(pages)) == pages
        with pytest.raises(ConflictError):
            await writer.put(pages, page(0))

    run(with_disk(tmp_path), test)


def test_pages_that_do_not_fit_are_refused() -> None:
    async def test(service: Service, client: TestClient) -> None:
        reservation = await reserve(service, client, 4)
        writer = service.begin_write(client.session, reservation)
        with pytest.raises(InvalidArgumentError, match="4095 bytes"):
            await writer.put(0, page(0)[:-1])
        await writer.put(0, page(0))
        with pytest.raises(InvalidArgumentError, match="in order"):
            await writer.put(2, page(2))
        assert (await writer.commit()).stored_pages == 1
        for session, found in ((client.session, reservation + 50), (client.session + 1, reservation)):
            with pytest.raises(NotFoundError):
                service.begin_write(session, found)
        rest = service.begin_write(client.session, reservation)
        await rest.put(1, page(1))
        assert (await rest.commit(last=True)).stored_pages == 1
        assert client.match(4) == 2

    run(HOST_ONLY, test)


def test_an_abandoned_write_leaves_the_reservation() -> None:
    async def test(service: Service, client: TestClient) -> None:
        reservation = await reserve(service, client, 4)
        writer = service.begin_write(client.session, reservation)
        await writer.put(0, page(0))
        writer.close()
        writer.close()
        with pytest.raises(ConflictError):
            await writer.commit()
        assert service.stats().engine.reservations == 1
        service.abort(client.session, reservation)
        assert service.stats().engine.reservations == 0
        assert client.match(4) == 0

    run(HOST_ONLY, test)


def test_an_empty_write_only_ends_the_reservation() -> None:
    async def test(service: Service, client: TestClient) -> None:
        reservation = await reserve(service, client, 4)
        result = await service.begin_write(client.session, reservation).commit(Ack.VISIBLE, last=True)
        assert result == CommitResult(0, 0, 0, 0)
        assert service.stats().engine.reservations == 0

    run(HOST_ONLY, test)


def test_a_writer_holds_two_chunks_at_most_and_stops_at_a_page_that_fails() -> None:
    async def main() -> None:
        sent: list[tuple[int, int]] = []
        go_on = asyncio.Event()
        failing = 0

        async def send(pieces, source, ack, last):  # type: ignore[no-untyped-def]
            sent.extend(pieces)
            await go_on.wait()
            return CommitResult(pieces[0][1] - failing, 0, 0, failing)

        writer = Writer(10, send, chunk_bytes=20)
        for number in range(5, 9):
            await writer.put(number, bytes(10))
        blocked = asyncio.ensure_future(writer.put(9, bytes(10)))
        await asyncio.sleep(0.01)
        assert sent == [(5, 2)]
        assert not blocked.done()
        go_on.set()
        await blocked
        failing = 1
        for number in (10, 11, 12):
            await writer.put(number, bytes(10))
        with pytest.raises(CorruptError, match="before page 11"):
            await writer.put(13, bytes(10))
        writer.close()

    asyncio.run(main())


def test_without_its_tier_a_page_is_unavailable() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(2)
        result = await client.fetch(2)
        _spoil(service, 0, Op.GET, 1, Outcome.FAULT)
        with pytest.raises(UnavailableError, match="page 1"):
            await all_pages(service, client, result.lease)
        assert await client.read(result) == 2

    run(HOST_ONLY, test)
