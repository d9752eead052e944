"""Leases in the device tier through the service: where they are read, what is reported, what is refused."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from runtime_helpers import PAGE_BYTES, TestClient, namespace, prompt, running, settle

from hicache.engine.actions import FetchResult
from hicache.errors import CorruptError, HicacheError, NotFoundError, UnsupportedError
from hicache.runtime import Service, ServiceOptions
from hicache.runtime.extents import lease_slots
from hicache.runtime.many import Query
from hicache.runtime.pages import ReserveAlong
from hicache.types import SLOTS_PER_SEGMENT, Ack

ON_DEVICE, IN_HOST = 0, 1


def options(tmp_path: Path, **changes: object) -> ServiceOptions:
    fields: dict[str, object] = {
        "device": "cpu",
        "device_bytes": 1 << 20,
        "host_bytes": 4 << 20,
        "disk_path": str(tmp_path / "disk"),
        "disk_bytes": 32 << 20,
        "prefault": False,
        "scrub_bytes_per_s": 0,
    }
    return ServiceOptions(**(fields | changes))  # type: ignore[arg-type]


def run(options: ServiceOptions, test: Callable[[Service, TestClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(options) as service:
            await test(service, TestClient(service))

    asyncio.run(asyncio.wait_for(main(), 60))


async def evict(service: Service, client: TestClient, pages: int, tier: int, salt: int = 0) -> None:
    """Out of a tier, however often that takes (what hangs below goes first)."""
    for _ in range(50):
        result = await service.evict(client.namespace, prompt(pages, salt), tier)
        if not result.pages and not result.kept_pages:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("pages stay in the tier")


def rot(service: Service, slot: int) -> None:
    """Flip a bit of a page of the device tier where it lies."""
    house = service._house
    assert house is not None
    segment, index = divmod(slot, SLOTS_PER_SEGMENT)
    data = house.ports[ON_DEVICE].store._segments[segment].pool  # type: ignore[attr-defined]
    data[index, 100] ^= 4


@pytest.mark.parametrize("source", ["device", "host", "disk"])
def test_pages_are_read_from_the_device_wherever_they_were(tmp_path: Path, source: str) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(20, ack=Ack.DURABLE)
        if source == "device":
            await evict(service, client, 20, IN_HOST)
        else:
            usual = await client.fetch(20)
            client.release(usual)
            await evict(service, client, 20, ON_DEVICE)
            if source == "disk":
                await evict(service, client, 20, IN_HOST)
        result = await client.fetch(22, device=True)
        assert (result.tier, result.matched_pages, result.granted_pages, result.operation) == (0, 20, 20, 0)
        found = dict(zip(("device", "host", "disk"), result.tier_pages, strict=True))
        assert found == {"device": 0, "host": 0, "disk": 0} | {source: 20}
        assert await client.read(result) == 20
        columns = service.extents(result)
        assert not columns.pages, "nobody can map this pool"
        assert not len(columns.checksums) and not len(columns.generations)
        assert service.stats().tiers[ON_DEVICE].bytes_out >= 20 * PAGE_BYTES

    run(options(tmp_path), test)


def test_one_session_leases_the_same_pages_in_both_tiers(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(8)
        device, host = await client.fetch(8, device=True), await client.fetch(8)
        assert (device.tier, host.tier) == (ON_DEVICE, IN_HOST)
        assert sum(service.extents(host).pages) == 8 and not service.extents(device).pages
        assert await client.read(device) == await client.read(host) == 8
        client.release(device)
        assert await client.read(host) == 8
        view = service.lease_view(client.session, host.lease)
        assert lease_slots(view) == lease_slots(host)

    run(options(tmp_path), test)


def test_a_bad_page_of_the_device_is_reported_and_comes_back_from_the_host(tmp_path: Path) -> None:
    """Reported by lease: the tier of the lease is looked at first, then the others; a sound copy goes on to serve."""

    async def test(service: Service, client: TestClient) -> None:
        await client.store(6)
        host = await client.fetch(6)
        device = await client.fetch(6, device=True)
        for lease in (device, host):
            assert await service.report_corrupt(client.session, lease.lease, range(6)) == 0
        rot(service, lease_slots(device)[2])
        assert await service.report_corrupt(client.session, host.lease, [2]) == 0  # its own copy is sound
        assert await service.report_corrupt(client.session, device.lease, [1, 2, 3]) == 1
        assert list(service.stats().engine.counters.corrupt_pages) == [1, 0, 0]
        assert service.lease_view(client.session, device.lease).granted_pages == 2
        assert await client.read(host) == 6
        client.release(device)
        again = await client.fetch(6, device=True)
        assert again.granted_pages == 6 and list(again.tier_pages) == [5, 1, 0]
        assert await client.read(again) == 6

    run(options(tmp_path), test)


def test_a_page_that_is_bad_where_it_is_read_leaves_that_tier_only(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(4)
        host, device = await client.fetch(4), await client.fetch(4, device=True)
        rot(service, lease_slots(device)[1])
        with pytest.raises(CorruptError):
            await client.read(device)
        assert await client.read(host) == 4
        assert service.lease_view(client.session, device.lease).granted_pages == 1

    run(options(tmp_path), test)


def test_many_queries_each_with_its_tier(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(4, salt=1)
        await client.store(5, salt=2)
        queries = [
            Query(client.namespace, prompt(4, 1), device=True),
            Query(client.namespace, prompt(4, 1)),
            Query(client.namespace, prompt(5, 2), max_pages=3, device=True),
            Query(client.namespace, prompt(3, 9), device=True),
        ]
        result = await service.fetch_many(client.session, queries, wait_ms=5_000)
        found = [outcome for outcome in result.outcomes if isinstance(outcome, FetchResult)]
        assert [outcome.granted_pages for outcome in found] == [4, 4, 3, 0]
        assert [outcome.tier for outcome in found] == [ON_DEVICE, IN_HOST, ON_DEVICE, -1]
        assert [service.pending(outcome) for outcome in found] == [(0, 0)] * 4

    run(options(tmp_path), test)


def test_pending_goes_by_the_tiers_that_pages_come_from(tmp_path: Path) -> None:
    """Pages of the lease's own tier are not waited for, whichever that is."""

    async def test(service: Service, client: TestClient) -> None:
        house = service._house
        assert house is not None
        await client.store(8)
        usual = await client.fetch(8)
        await evict(service, client, 8, ON_DEVICE)
        for port in house.ports:
            port.pace.bytes_per_s = 0.0
        house.ports[IN_HOST].pace.bytes_per_s = PAGE_BYTES * 2.0
        result = await client.fetch(8, device=True, wait_ms=0)
        assert result.operation and service.pending(result) == (8, 4_000)
        await service.wait_operation(client.session, result.operation, 5_000)
        now = service.lease_view(client.session, result.lease)
        assert service.pending(now) == (0, 0) and now.granted_pages == 8
        client.release(usual)

    run(options(tmp_path), test)


def test_room_is_reserved_along_with_a_device_lease(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(3)
        result = await client.fetch(5, device=True, reserve=ReserveAlong(wanted=True))
        assert result.reserved is not None
        assert (result.reserved.present_pages, result.reserved.missing_pages) == (3, 2)
        service.abort(client.session, result.reserved.reservation)

    run(options(tmp_path), test)


@pytest.mark.parametrize("disk", [True, False])
def test_without_a_device_tier_it_says_what_to_do(tmp_path: Path, disk: bool) -> None:
    changes: dict[str, object] = {"device": "", "device_bytes": 0}
    if not disk:
        changes |= {"disk_path": "", "disk_bytes": 0}

    async def test(service: Service, client: TestClient) -> None:
        await client.store(2)
        with pytest.raises(UnsupportedError) as caught:
            await client.fetch(2, device=True)
        assert "--device" in caught.value.hint and "--device-bytes" in caught.value.hint
        queries = [Query(client.namespace, prompt(2), device=True), Query(client.namespace, prompt(2))]
        outcomes = (await service.fetch_many(client.session, queries)).outcomes
        assert isinstance(outcomes[0], UnsupportedError)
        assert isinstance(outcomes[1], FetchResult) and outcomes[1].granted_pages == 2
        assert service.stats().engine.leases == 1

    run(options(tmp_path, **changes), test)


def test_a_device_alone_leases_there_asked_or_not(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(4)
        for more in ({}, {"device": True}):
            result = await client.fetch(4, **more)
            assert result.tier == ON_DEVICE and await client.read(result) == 4

    run(options(tmp_path, host_bytes=0), test)


def test_a_lease_that_ends_while_it_is_read_serves_nothing_more(tmp_path: Path) -> None:
    """The bytes came from the device; the lease is looked at again after they did."""

    async def test(service: Service, client: TestClient) -> None:
        spec = namespace(page_bytes=64 << 10)
        large = TestClient(service, spec=spec)
        await large.store(40)
        result = await large.fetch(40, device=True)
        pages = service.read_pages(large.session, result.lease, 0, 0)
        await anext(pages)
        large.release(result)
        with pytest.raises(NotFoundError):
            async for _ in pages:
                await asyncio.sleep(0)

    run(options(tmp_path, device_bytes=8 << 20, host_bytes=8 << 20), test)


class Crowd:
    """Sessions that store, fetch, read and evict at random; what is read is compared with what was stored."""

    def __init__(self, service: Service, clients: list[TestClient], rng: random.Random) -> None:
        self.service = service
        self.clients = clients
        self.rng = rng
        self.held: list[tuple[TestClient, FetchResult, int]] = []
        self.reads = 0

    async def step(self) -> None:
        moves = (self.store, self.fetch, self.evict, self.rot, self.read)
        await self.rng.choices(moves, (30, 40, 5, 3, 22))[0]()
        if len(self.held) > 6:
            self.release(0)
        self.service.check()

    def release(self, index: int) -> None:
        who, result, _ = self.held.pop(index)
        who.release(result)

    def draw(self) -> tuple[TestClient, int, int]:
        return self.rng.choice(self.clients), self.rng.randint(1, 24), self.rng.randint(1, 9)

    async def store(self) -> None:
        who, pages, salt = self.draw()
        try:
            await who.store(pages, salt, wait_ms=50)
        except HicacheError as error:
            assert error.code.name in {"EXHAUSTED", "CONFLICT", "UNAVAILABLE"}, error

    async def fetch(self) -> None:
        who, pages, salt = self.draw()
        result = await who.fetch(
            pages, salt, wait_ms=self.rng.choice([0, 500]), device=self.rng.random() < 0.6
        )
        if result.lease:
            self.held.append((who, result, salt))

    async def evict(self) -> None:
        who, pages, salt = self.draw()
        await self.service.evict(who.namespace, prompt(pages, salt), self.rng.randint(-1, 1))

    async def rot(self) -> None:
        mine = [result for _, result, _ in self.held if result.tier == ON_DEVICE and result.granted_pages]
        if mine:
            rot(self.service, lease_slots(self.rng.choice(mine))[0])

    async def read(self) -> None:
        if not self.held:
            return
        index = self.rng.randrange(len(self.held))
        who, result, salt = self.held[index]
        try:
            self.reads += await who.read(result, salt)
        except CorruptError:
            assert result.tier == ON_DEVICE
        self.release(index)


def test_two_sessions_at_random_read_what_was_stored(tmp_path: Path) -> None:
    """Small tiers, leases in both of them, evictions and rot between: what is read is what was stored, or nothing."""

    async def test(service: Service, client: TestClient) -> None:
        crowd = Crowd(service, [client, TestClient(service)], random.Random(7))
        for _ in range(300):
            await crowd.step()
        assert crowd.reads > 100
        while crowd.held:
            crowd.release(0)
        await settle(lambda: not service.stats().engine.copies)
        assert service.stats().engine.leases == 0

    run(options(tmp_path, device_bytes=256 << 10, host_bytes=512 << 10, disk_bytes=16 << 20), test)
