"""Paged KV over the wire: registered, committed from, loaded into, by a real service over real shared memory."""

from __future__ import annotations

from pathlib import Path

from kv_kit import LAYERS, Kv, checksum, engine
from server_kit import PAGE_BYTES, run

from hicache.rpc.pb import region_pb2


def test_pages_go_from_paged_kv_to_paged_kv(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (_, session):
            kv, other = Kv(), Kv()
            kv.fill(1)
            other.fill(2)
            region, second = await session.register(kv), await session.register(other)
            places = [[8], [0], [20]]
            sums = [checksum(kv.page(row)) for row in places]
            stored = await session.store(region, places, checksums=sums)
            assert stored.stored_pages == 3
            lease = await session.fetch(3)
            assert list(lease.extents.checksums) == sums
            rows = [[2, 6], [64, 30], [-8, 40]]  # two units a page; one is left out
            before = other.planes.copy()
            loaded = await session.load(lease.lease_id, second, rows)
            assert (loaded.loaded_pages, [*loaded.missing_pages], [*loaded.corrupt_pages]) == (3, [], [])
            assert loaded.moved_bytes == PAGE_BYTES * 5 // 2
            assert other.page(rows[0]) == kv.page(places[0])
            assert other.page(rows[1]) == kv.page(places[1])
            kept = other.planes.copy()
            for start in (2, 6, 64, 30, 40):
                kept[:, start : start + 2] = before[:, start : start + 2]
            assert (kept == before).all()  # nothing else was touched
            assert (other.planes[:, 40:42] == kv.planes[:, 22:24]).all()
            await session.unregister(region)
            await session.unregister(second)
            kv.close()
            other.close()

    run(main())


def test_capabilities_and_lists_tell_of_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (house, session):
            found = await house.client.session.GetCapabilities(region_pb2.ListRegionsRequest())
            assert [*found.kv_memory] == ["memfd"]
            assert not found.pool_shared
            kv = Kv()
            region = await session.register(kv, b"once")
            timeline, counters = await session.timeline(7)
            request = region_pb2.ListRegionsRequest(session_id=session.id)
            listed = (await house.client.region.ListRegions(request)).regions
            kinds = {each.region_id: (each.kind, each.size_bytes) for each in listed}
            assert kinds == {
                region: (region_pb2.Region.KV, kv.size_bytes),
                timeline: (region_pb2.Region.TIMELINE, 56),
            }
            stats = house.service.stats().counters
            assert (stats["kv_regions"], stats["timelines"]) == (1, 1)
            counters.close()
            kv.close()

    run(main())


def test_a_counter_tells_of_layers(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (_, session):
            kv = Kv()
            kv.fill(3)
            region = await session.register(kv)
            timeline, counters = await session.timeline()
            counters.set(2, LAYERS)
            stored = await session.store(region, [[0], [4]], timeline_id=timeline, counter=2)
            assert stored.stored_pages == 2
            lease = await session.fetch(2)
            loaded = await session.load(lease.lease_id, region, [[64], [96]], timeline_id=timeline, counter=1)
            assert loaded.loaded_pages == 2
            assert counters.get(1) == LAYERS
            assert kv.page([96]) == kv.page([4])
            # two layers of four, counted from the first of them
            kv.planes[:, 64:] = 0
            part = {"first_layer": 1, "layers": 2, "timeline_id": timeline, "counter": 3}
            loaded = await session.load(lease.lease_id, region, [[64], [96]], **part)
            assert counters.get(3) == 2
            assert loaded.moved_bytes == PAGE_BYTES
            assert (kv.planes[2:6, 96:100] == kv.planes[2:6, 4:8]).all()
            assert not kv.planes[:2, 64:].any()
            assert not kv.planes[6:, 64:].any()
            counters.close()
            kv.close()

    run(main())
