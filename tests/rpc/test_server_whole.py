"""The server over the real service: pages go in and come out by every path, and nothing outlives its session."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from server_kit import PAGE_BYTES, Attached, House, failure, open_fds, run, serving, tokens
from xxhash import xxh3_64_intdigest

from hicache.rpc.common import fdproto
from hicache.rpc.pb import admin_pb2, cache_pb2, region_pb2
from hicache.runtime import Service, ServiceOptions

PAGES = 5


@contextlib.asynccontextmanager
async def whole(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[House, Attached, int]]:
    """A server over a real service with a host and a disk tier, a session, and its namespace."""
    options = ServiceOptions(
        host_bytes=8 << 20,
        host_segment_bytes=1 << 20,
        disk_path=str(tmp_path / "disk"),
        disk_bytes=64 << 20,
        prefault=False,
        **settings,
    )
    service = Service(options)
    await service.start()
    try:
        async with serving(tmp_path, service) as house:
            attached = await house.client.attach()
            yield house, attached, await house.client.namespace(attached)
    finally:
        await service.close()


def content(page: int) -> bytes:
    return bytes([page + 1]) * PAGE_BYTES


async def store(house: House, attached: Attached, namespace: int, *, durable: bool = False) -> Any:
    """Pages 0..PAGES through a registered region; the commit's answer."""
    client, sid = house.client, attached.id
    memory = os.memfd_create("client")
    os.pwrite(memory, b"".join(content(page) for page in range(PAGES)), 0)
    token = (await client.transact(fdproto.Put(sid), (memory,))).payload
    os.close(memory)
    region = await client.region.Register(region_pb2.RegisterRequest(session_id=sid, fd_token=token))
    reserved = await client.cache.Reserve(
        cache_pb2.ReserveRequest(
            session_id=sid, namespace_id=namespace, prompt=tokens(4 * PAGES), wait_ms=1000
        )
    )
    assert (reserved.present_pages, reserved.missing_pages) == (0, PAGES)
    return await client.cache.Commit(
        cache_pb2.CommitRequest(
            session_id=sid,
            reservation_id=reserved.reservation_id,
            first_page=[0],
            pages=[PAGES],
            region_id=[region.region_id],
            offset=[0],
            checksums=[xxh3_64_intdigest(content(page)) for page in range(PAGES)],
            durable=durable,
            last=True,
        )
    )


async def fetch(house: House, attached: Attached, namespace: int, **fields: Any) -> Any:
    request = cache_pb2.FetchRequest(
        session_id=attached.id, namespace_id=namespace, prompt=tokens(4 * PAGES), wait_ms=2000, **fields
    )
    return await house.client.cache.Fetch(request)


async def mapped_pages(house: House, attached: Attached, extents: cache_pb2.Extents) -> list[bytes]:
    """The pages of a lease, read out of the arena."""
    listed = await house.client.region.ListRegions(region_pb2.ListRegionsRequest(session_id=attached.id))
    arenas = {region.region_id: region for region in listed.regions if region.kind == region_pb2.Region.ARENA}
    found: list[bytes] = []
    generation = iter(extents.generations)
    for count, region_id, offset, slot in zip(
        extents.pages, extents.region_id, extents.offset, extents.first_slot, strict=True
    ):
        (fd,) = (await house.client.transact(fdproto.Get(attached.id, region_id))).fds
        arena = arenas[region_id]
        with mmap.mmap(fd, arena.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            for page in range(count):
                at = 8 * (slot + page)
                assert int.from_bytes(view[at : at + 8], "little") == next(generation)
                begin = offset + page * arena.slot_stride
                found.append(view[begin : begin + arena.page_bytes])
        os.close(fd)
    return found


def test_pages_go_in_by_region_and_out_by_mapping(tmp_path: Path) -> None:
    async def main() -> None:
        async with whole(tmp_path) as (house, attached, namespace):
            committed = await store(house, attached, namespace, durable=True)
            assert (committed.stored_pages, committed.durable_pages) == (PAGES, PAGES)
            lease = await fetch(house, attached, namespace, request_id=b"one")
            assert (lease.matched_pages, lease.granted_pages) == (PAGES, PAGES)
            assert 0 < lease.expires_in_ms <= 30_000
            pages = await mapped_pages(house, attached, lease.extents)
            assert pages == [content(page) for page in range(PAGES)]
            assert [*lease.extents.checksums] == [xxh3_64_intdigest(page) for page in pages]
            assert (await fetch(house, attached, namespace, request_id=b"one")).lease_id == lease.lease_id
            await house.client.cache.ReleaseLeases(
                cache_pb2.ReleaseLeasesRequest(session_id=attached.id, lease_ids=[lease.lease_id])
            )
            answer = await house.client.admin.Check(admin_pb2.CheckRequest(session_id=attached.id))
            assert answer.ok, answer.problem

    run(main())


def test_pages_go_in_and_out_as_streams(tmp_path: Path) -> None:
    async def main() -> None:
        async with whole(tmp_path) as (house, attached, namespace):
            cache, sid = house.client.cache, attached.id
            reserved = await cache.Reserve(
                cache_pb2.ReserveRequest(session_id=sid, namespace_id=namespace, prompt=tokens(4 * PAGES))
            )
            opening = cache_pb2.WritePagesRequest.Open(
                session_id=sid, request_id=b"w", reservation_id=reserved.reservation_id, last=True
            )
            messages = [cache_pb2.WritePagesRequest(open=opening)]
            for page in range(PAGES):
                data = content(page)
                chunk = cache_pb2.PageChunk(page=page, data=data, checksum=xxh3_64_intdigest(data))
                messages.append(cache_pb2.WritePagesRequest(chunk=chunk))
            for _ in range(2):
                assert (await cache.WritePages(iter(messages))).stored_pages == PAGES
            lease = await fetch(house, attached, namespace)
            request = cache_pb2.ReadPagesRequest(
                session_id=sid, lease_id=lease.lease_id, first_page=1, pages=3
            )
            chunks = [(chunk.page, chunk.data) async for chunk in cache.ReadPages(request)]
            assert chunks == [(page, content(page)) for page in (1, 2, 3)]
            beyond = cache_pb2.ReadPagesRequest(
                session_id=sid, lease_id=lease.lease_id, first_page=9, pages=1
            )
            error = await failure(cache.ReadPages(beyond).read())
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(main())


@pytest.mark.parametrize("how", ["checksum", "short region"])
def test_bytes_that_are_not_what_was_said_are_refused(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with whole(tmp_path) as (house, attached, namespace):
            client, sid = house.client, attached.id
            memory = os.memfd_create("client")
            os.ftruncate(memory, PAGE_BYTES if how == "checksum" else 10)
            token = (await client.transact(fdproto.Put(sid), (memory,))).payload
            os.close(memory)
            region = await client.region.Register(region_pb2.RegisterRequest(session_id=sid, fd_token=token))
            reserved = await client.cache.Reserve(
                cache_pb2.ReserveRequest(session_id=sid, namespace_id=namespace, prompt=tokens(4))
            )
            commit = cache_pb2.CommitRequest(
                session_id=sid,
                reservation_id=reserved.reservation_id,
                first_page=[0],
                pages=[1],
                region_id=[region.region_id],
                offset=[0],
                checksums=[12345] if how == "checksum" else [],
                last=True,
            )
            assert (await failure(client.cache.Commit(commit))).code() is grpc.StatusCode.DATA_LOSS
            request = cache_pb2.MatchRequest(session_id=sid, namespace_id=namespace, prompt=tokens(4))
            assert (await client.cache.Match(request)).matched_pages == 0

    run(main())


def test_a_sessions_regions_and_leases_end_with_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with whole(tmp_path) as (house, attached, namespace):
            keeper = await house.client.attach()
            before = open_fds()
            await store(house, attached, namespace)
            await fetch(house, attached, namespace)
            stats = await house.client.admin.GetStats(admin_pb2.GetStatsRequest(session_id=keeper.id))
            assert (stats.leases, stats.state, [tier.name for tier in stats.tiers]) == (
                1,
                "serving",
                ["host", "disk"],
            )
            house.server._sessions.end(house.server._sessions.find(attached.id), dead=True, why="test")
            stats = await house.client.admin.GetStats(admin_pb2.GetStatsRequest(session_id=keeper.id))
            assert stats.leases == 0
            assert open_fds() <= before + 1  # the segment that was opened
            tree = await house.client.admin.GetTree(admin_pb2.GetTreeRequest(session_id=keeper.id))
            assert sum(node.pages for node in tree.nodes) == PAGES

    run(main())


def test_a_lease_of_another_session_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with whole(tmp_path) as (house, attached, namespace):
            await store(house, attached, namespace)
            lease = await fetch(house, attached, namespace)
            other = await house.client.attach()
            request = cache_pb2.ReadPagesRequest(session_id=other.id, lease_id=lease.lease_id)
            error = await failure(house.client.cache.ReadPages(request).read())
            assert error.code() is grpc.StatusCode.NOT_FOUND
            renewed = await house.client.cache.RenewLeases(
                cache_pb2.RenewLeasesRequest(session_id=other.id, lease_ids=[lease.lease_id])
            )
            assert [*renewed.lost_lease_ids] == [lease.lease_id]

    run(main())


def test_evicted_pages_come_back_from_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with whole(tmp_path) as (house, attached, namespace):
            await store(house, attached, namespace, durable=True)
            evict = admin_pb2.EvictRequest(
                session_id=attached.id, namespace_id=namespace, prompt=tokens(4), tier=0
            )
            assert (await house.client.admin.Evict(evict)).pages == PAGES
            lease = await fetch(house, attached, namespace)
            if lease.operation_id:
                waited = await house.client.cache.WaitOperation(
                    cache_pb2.WaitOperationRequest(
                        session_id=attached.id, operation_id=lease.operation_id, wait_ms=5000
                    )
                )
                lease = waited.fetch
            assert lease.granted_pages == PAGES
            assert await mapped_pages(house, attached, lease.extents) == [
                content(page) for page in range(PAGES)
            ]

    run(main())


def test_drain_saves_pages_and_refuses_work(tmp_path: Path) -> None:
    async def main() -> None:
        async with whole(tmp_path) as (house, attached, namespace):
            await store(house, attached, namespace)
            await house.client.admin.Drain(admin_pb2.DrainRequest(session_id=attached.id, grace_ms=5_000))
            async with asyncio.timeout(10):
                await house.server.wait_drained()
            assert house.service.stats().tiers[1].pages == PAGES
            error = await failure(fetch(house, attached, namespace))
            assert error.code() is grpc.StatusCode.UNAVAILABLE

    run(main())
