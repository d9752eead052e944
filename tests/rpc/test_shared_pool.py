"""The shared pool over the wire: listed as POOL, its descriptor over the fd socket, leased pages where extents say."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
from kv_kit import Kv, engine
from server_kit import PAGE_BYTES, run, until

from hicache.errors import NotFoundError
from hicache.rpc.common import fdproto
from hicache.rpc.pb import region_pb2, session_pb2

SHARED = {"device": "cpu", "device_bytes": 1 << 20, "device_segment_bytes": 1 << 18, "share_device": True}


def test_another_process_reads_leased_pages_out_of_the_pool(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path, **SHARED) as (house, session):
            found = await house.client.session.GetCapabilities(session_pb2.GetCapabilitiesRequest())
            assert found.pool_shared
            kv = Kv()
            kv.fill(1)
            region = await session.register(kv)
            places = [[8], [0], [20]]
            assert (await session.store(region, places)).stored_pages == 3
            lease = await session.fetch(3, device=True)
            extents = lease.extents
            assert sum(extents.pages) == 3
            listed = await house.client.region.ListRegions(
                region_pb2.ListRegionsRequest(session_id=session.id)
            )
            pools = {each.region_id: each for each in listed.regions if each.kind == region_pb2.Region.POOL}
            assert set(extents.region_id) <= pools.keys()
            got = []
            for count, pool, offset in zip(extents.pages, extents.region_id, extents.offset, strict=True):
                info = pools[pool]
                assert (info.first_slot_offset, info.page_bytes) == (0, PAGE_BYTES)
                assert info.memory.size_bytes == info.size_bytes == 1 << 18
                assert not info.memory.device_uuid
                (fd,) = (await session.client.transact(fdproto.Get(session.id, pool))).fds
                with mmap.mmap(fd, info.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
                    starts = range(offset, offset + count * info.slot_stride, info.slot_stride)
                    got += [memory[start : start + PAGE_BYTES] for start in starts]
                with pytest.raises(PermissionError):
                    mmap.mmap(fd, info.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            assert got == [kv.page(row) for row in places]
            await session.release(lease.lease_id)
            await session.unregister(region)
            kv.close()

    run(main())


def test_an_unshared_pool_is_not_listed(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path, **(SHARED | {"share_device": False})) as (house, session):
            kv = Kv()
            region = await session.register(kv)
            await session.store(region, [[8]])
            lease = await session.fetch(1, device=True)
            assert not lease.extents.pages
            listed = await house.client.region.ListRegions(
                region_pb2.ListRegionsRequest(session_id=session.id)
            )
            assert region_pb2.Region.POOL not in {each.kind for each in listed.regions}
            await session.unregister(region)
            kv.close()

    run(main())


def test_a_session_that_ends_and_lives_on_may_keep_what_it_mapped(tmp_path: Path) -> None:
    """Its process lives: a device's memory is then not used for another segment."""

    async def main() -> None:
        async with engine(tmp_path, **SHARED) as (house, session):
            kv = Kv()
            region = await session.register(kv)
            await session.store(region, [[8]])
            lease = await session.fetch(1, device=True)
            [pool] = set(lease.extents.region_id)
            await house.client.region.ListRegions(region_pb2.ListRegionsRequest(session_id=session.id))
            regions = house.service.regions
            assert pool not in regions._unsure
            await session.attached.send(goodbye=session_pb2.Goodbye())
            await until(lambda: pool in regions._unsure)
            with pytest.raises(NotFoundError):
                regions.arena_fd("another", pool)
            kv.close()

    run(main())
