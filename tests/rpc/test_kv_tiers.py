"""Paged KV with other tiers than host memory: a device's slots, a disk alone, and commits that go through buffers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from kv_kit import LAYERS, Kv, checksum, engine
from server_kit import failure, run, until

from hicache.device.kv import FAILED

ROWS = [[0], [4], [8]]
TARGETS = [[64], [68], [72]]
DEVICE = {"device": "cpu", "device_bytes": 4 << 20, "device_segment_bytes": 1 << 20}


def tiers(tmp_path: Path, which: str) -> dict[str, Any]:
    found: dict[str, Any] = dict(DEVICE) if "device" in which else {}
    if "disk" in which:
        found |= {"disk_path": str(tmp_path / "disk"), "disk_bytes": 64 << 20}
    if "host" not in which:
        found |= {"host_bytes": 0, "host_segment_bytes": 0}
    return found


@pytest.mark.parametrize("which", ["device", "device host", "device host disk"])
def test_pages_of_a_device_are_loaded(tmp_path: Path, which: str) -> None:
    async def main() -> None:
        async with engine(tmp_path, **tiers(tmp_path, which)) as (_house, session):
            kv = Kv()
            kv.fill(3)
            region = await session.register(kv)
            sums = [checksum(kv.page(row)) for row in ROWS]
            assert (await session.store(region, ROWS, checksums=sums)).stored_pages == 3
            timeline, counters = await session.timeline()
            for at, device in enumerate([True, False] if "host" in which else [True]):
                lease = await session.fetch(3, device=device)
                assert lease.granted_pages == 3
                kv.planes[:, 64:] = 0
                fields = {"timeline_id": timeline, "counter": at}
                loaded = await session.load(lease.lease_id, region, TARGETS, **fields)
                assert loaded.loaded_pages == 3, loaded.reason
                assert [kv.page(row) for row in TARGETS] == [kv.page(row) for row in ROWS]
                assert counters.get(at) == LAYERS
            counters.close()
            kv.close()

    run(main())


@pytest.mark.parametrize("which", ["device", "disk"])
def test_layers_are_waited_for_before_buffers_are_taken(tmp_path: Path, which: str) -> None:
    """Where the first tier is no host memory: other commits go on meanwhile, and those of one reservation in order."""

    async def main() -> None:
        settings = tiers(tmp_path, which) | {"copy_chunk_bytes": 4096, "bounce_bytes": 4096, "workers": 1}
        async with engine(tmp_path, **settings) as (house, session):
            kv = Kv()
            kv.fill(8)
            region = await session.register(kv)
            timeline, counters = await session.timeline()
            reserved = await session.reserve(4)
            fields = {"timeline_id": timeline, "last": False}
            first = session.commit_request(region, reserved.reservation_id, ROWS[:2], counter=0, **fields)
            second = session.commit_request(
                region, reserved.reservation_id, [*ROWS[2:], [12]], counter=1, first_page=[2], **fields
            )
            calls = [asyncio.ensure_future(_call(session, each)) for each in (first, second)]
            await asyncio.sleep(0.03)
            assert house.service.stats().counters["transfers_in_flight"] == 0
            other = await session.client.namespace(session.attached, revision="other")
            session.namespace = other
            assert (await session.store(region, ROWS)).stored_pages == 3  # one buffer, and it was free
            counters.set(1, LAYERS)
            await asyncio.sleep(0.03)
            assert not any(call.done() for call in calls)
            counters.set(0, LAYERS)
            assert [(await call).stored_pages for call in calls] == [2, 2]
            counters.close()
            kv.close()

    run(main())


async def _call(session: Any, request: Any) -> Any:
    return await session.client.cache.Commit(request)


@pytest.mark.parametrize("how", ["late", "given up", "unregistered"])
def test_layers_that_never_come_to_a_disk(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with engine(tmp_path, **tiers(tmp_path, "disk")) as (house, session):
            kv = Kv()
            region = await session.register(kv)
            timeline, counters = await session.timeline()
            reserved = await session.reserve(3)
            fields = {"timeline_id": timeline, "layers_wait_ms": 60 if how == "late" else 0}
            call = asyncio.ensure_future(session.commit(region, reserved.reservation_id, ROWS, **fields))
            await asyncio.sleep(0.02)
            counters.set(0, 3)
            if how == "given up":
                counters.set(0, FAILED)
            elif how == "unregistered":
                await session.unregister(region)
            error = await failure(call)
            assert error.code() is grpc.StatusCode.DATA_LOSS
            words = {"late": "layer 3 of 4", "given up": "gave it up", "unregistered": "was unregistered"}
            assert words[how] in str(error.details())
            assert house.service.stats().engine.pages == 0
            counters.close()
            kv.close()

    run(main())


def test_wrong_checksums_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (_house, session):
            kv = Kv()
            kv.fill(1)
            region = await session.register(kv)
            sums = [checksum(kv.page(row)) for row in ROWS]
            reserved = await session.reserve(3)
            sums[1] ^= 1
            error = await failure(session.commit(region, reserved.reservation_id, ROWS, checksums=sums))
            assert error.code() is grpc.StatusCode.DATA_LOSS
            assert "do not have the checksums" in str(error.details())
            sums[1] ^= 1
            rest = {"first_page": [1], "checksums": sums[1:]}
            again = await session.commit(region, reserved.reservation_id, ROWS[1:], **rest)
            assert again.stored_pages == 2
            kv.close()

    run(main())


def test_pages_of_a_disk_alone_cannot_be_loaded(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path, **tiers(tmp_path, "disk")) as (_, session):
            kv = Kv()
            region = await session.register(kv)
            assert (await session.store(region, ROWS)).stored_pages == 3
            lease = await session.fetch(3)
            error = await failure(session.load(lease.lease_id, region, TARGETS))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            assert "host or a device tier" in str(error.details())
            kv.close()

    run(main())


def test_a_commit_that_waits_blocks_no_other(tmp_path: Path) -> None:
    """More commits than there are lanes wait for their layers in host slots; another one passes them."""

    async def main() -> None:
        async with engine(tmp_path, workers=1) as (house, session):
            kv = Kv()
            kv.fill(2)
            region = await session.register(kv)
            timeline, counters = await session.timeline(8)
            waiting = []
            for number in range(8):
                session.namespace = await session.client.namespace(session.attached, revision=str(number))
                reserved = await session.reserve(3)
                fields = {"timeline_id": timeline, "counter": number}
                call = session.commit(region, reserved.reservation_id, ROWS, **fields)
                waiting.append(asyncio.ensure_future(call))
            await until(lambda: house.service.stats().counters["transfers_in_flight"] == 8)
            session.namespace = await session.client.namespace(session.attached, revision="last")
            async with asyncio.timeout(5):
                assert (await session.store(region, ROWS)).stored_pages == 3
            assert not any(call.done() for call in waiting)
            for number in range(8):
                counters.set(number, LAYERS)
            assert [(await call).stored_pages for call in waiting] == [3] * 8
            counters.close()
            kv.close()

    run(main())
