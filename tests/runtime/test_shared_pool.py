"""The device tier's pool as regions: extents name it, its memory holds the leased pages, it retires as arenas do."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable

import pytest
from runtime_helpers import PAGE_BYTES, TestClient, page, running, settle

from hicache.engine.actions import FetchResult
from hicache.errors import ConfigError, NotFoundError
from hicache.runtime import Service, ServiceOptions
from hicache.runtime.regions import ArenaInfo

DEVICE = 0


def run(test: Callable[[Service, TestClient], Awaitable[None]], **changes: object) -> None:
    fields: dict[str, object] = {
        "device": "cpu",
        "device_bytes": 1 << 20,
        "device_segment_bytes": 1 << 18,
        "share_device": True,
        "host_bytes": 4 << 20,
        "prefault": False,
    }

    async def main() -> None:
        async with running(ServiceOptions(**(fields | changes))) as service:  # type: ignore[arg-type]
            await test(service, TestClient(service))

    asyncio.run(asyncio.wait_for(main(), 60))


def pools(service: Service, tenant: str = "default") -> dict[int, ArenaInfo]:
    return {each.region_id: each for each in service.regions.arenas(tenant) if each.memory is not None}


def mapped(service: Service, region: int) -> mmap.mmap:
    fd = service.regions.arena_fd("default", region)
    return mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ)


def read(service: Service, result: FetchResult) -> list[bytes]:
    """The leased pages, where their extents say that they lie."""
    columns, listed = service.extents(result), pools(service)
    found = []
    rows = zip(columns.pages, columns.region_id, columns.offset, columns.first_slot, strict=True)
    for count, region, offset, first in rows:
        info = listed[region]
        assert info.first_slot_offset == 0
        assert offset == first * info.slot_stride
        with mapped(service, region) as memory:
            starts = range(offset, offset + count * info.slot_stride, info.slot_stride)
            found += [memory[start : start + PAGE_BYTES] for start in starts]
    return found


def test_leased_pages_lie_where_their_extents_say() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(12)
        result = await client.fetch(12, device=True)
        assert (result.tier, result.granted_pages) == (DEVICE, 12)
        assert read(service, result) == [page(number) for number in range(12)]
        columns = service.extents(result)
        assert len(columns.checksums) == len(columns.generations) == 12
        assert all(columns.checksums)
        assert service.pool_shared
        assert not pools(service, "another")
        with pytest.raises(NotFoundError):
            service.regions.arena_fd("another", columns.region_id[0])

    run(test)


def test_a_pool_that_is_not_shared_is_no_region() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(4)
        result = await client.fetch(4, device=True)
        assert result.granted_pages == 4
        assert not service.extents(result).pages
        assert not pools(service)
        assert not service.pool_shared

    run(test, share_device=False)


def test_a_pools_region_retires_and_its_room_waits_for_those_who_map_it() -> None:
    async def test(service: Service, client: TestClient) -> None:
        asked: set[int] = set()

        def retire(_tenant: str, region: int) -> set[int]:
            asked.add(region)
            return {client.session}

        service.regions.on_retired = retire
        await client.store((1 << 20) // PAGE_BYTES)  # the whole tier
        memories = {region: mapped(service, region) for region in pools(service)}
        before = {region: bytes(memory) for region, memory in memories.items()}
        other = TestClient(service, tenant="another")
        stored = asyncio.ensure_future(other.store(3, salt=1))
        await settle(lambda: bool(asked))
        await asyncio.sleep(0.02)
        assert not stored.done(), "room that a session maps was given to another tenant"
        [region] = asked
        assert region not in pools(service)
        assert bytes(memories[region]) == before[region], "it was wiped under its reader"
        service.regions.released(client.session, region)
        await stored
        assert len(pools(service, "another")) == 1
        assert bytes(memories[region]) == before[region]
        for memory in memories.values():
            memory.close()

    run(test, host_bytes=0)


def test_sharing_needs_a_device() -> None:
    with pytest.raises(ConfigError, match="--share-device: there is no device tier"):
        ServiceOptions(host_bytes=1 << 20, share_device=True)
