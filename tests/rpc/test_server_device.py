"""Fetch, FetchMany and page streams from the device tier, through a real socket to the real service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from server_kit import PAGE_BYTES, Attached, House, failure, run, serving
from test_server_many import prompt, store

from hicache.rpc.pb import admin_pb2, cache_pb2
from hicache.runtime import Service, ServiceOptions
from hicache.sim.traces import open_trace

PAGES = 6


@asynccontextmanager
async def house(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[House, Attached, int]]:
    fields: dict[str, Any] = {"device": "cpu", "device_bytes": 1 << 20, "host_bytes": 4 << 20}
    service = Service(ServiceOptions(prefault=False, **fields | settings))
    await service.start()
    try:
        async with serving(tmp_path, service) as home:
            attached = await home.client.attach()
            number = await home.client.namespace(attached)
            await store(home, attached, number, PAGES, salt=7)
            yield home, attached, number
        service.check()
    finally:
        await service.close()


def ask(attached: Attached, number: int, **more: Any) -> cache_pb2.FetchRequest:
    return cache_pb2.FetchRequest(
        session_id=attached.id, namespace_id=number, prompt=prompt(PAGES, 7), wait_ms=5_000, **more
    )


async def read(home: House, attached: Attached, lease: int) -> list[bytes]:
    pages: dict[int, bytes] = {}
    stream = home.client.cache.ReadPages(cache_pb2.ReadPagesRequest(session_id=attached.id, lease_id=lease))
    async for chunk in stream:
        pages[chunk.page] = pages.get(chunk.page, b"") + chunk.data
    return [pages[number] for number in sorted(pages)]


def test_a_lease_in_the_device_is_read_as_a_stream_and_one_in_the_host_is_mapped(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as (home, attached, number):
            device = await home.client.cache.Fetch(ask(attached, number, device=True))
            host = await home.client.cache.Fetch(ask(attached, number))
            assert device.granted_pages == host.granted_pages == PAGES
            assert list(device.tier_pages) == [PAGES, 0] and not device.extents.pages
            assert list(host.extents.pages) == [PAGES] and len(host.extents.checksums) == PAGES
            for lease in (device.lease_id, host.lease_id):
                assert await read(home, attached, lease) == [bytes([7]) * PAGE_BYTES] * PAGES
            report = cache_pb2.ReportCorruptRequest(
                session_id=attached.id, lease_id=device.lease_id, pages=range(PAGES)
            )
            assert (await home.client.cache.ReportCorrupt(report)).corrupt_pages == 0

    run(main())


def test_a_promotion_to_the_device_is_waited_for(tmp_path: Path) -> None:
    """With WaitOperation, which tells of the lease: in the device, without extents."""

    async def main() -> None:
        async with house(tmp_path) as (home, attached, number):
            await home.client.cache.Fetch(ask(attached, number))
            await home.client.admin.Evict(
                admin_pb2.EvictRequest(
                    session_id=attached.id, namespace_id=number, prompt=prompt(PAGES, 7), tier=0
                )
            )
            request = ask(attached, number, device=True)
            request.wait_ms = 0
            fetched = await home.client.cache.Fetch(request)
            assert list(fetched.tier_pages) == [0, PAGES] and fetched.operation_id
            assert fetched.pending_pages == PAGES
            waited = await home.client.cache.WaitOperation(
                cache_pb2.WaitOperationRequest(
                    session_id=attached.id, operation_id=fetched.operation_id, wait_ms=5_000
                )
            )
            assert waited.done and waited.fetch.lease_id == fetched.lease_id
            assert waited.fetch.granted_pages == PAGES and not waited.fetch.extents.pages
            assert await read(home, attached, fetched.lease_id) == [bytes([7]) * PAGE_BYTES] * PAGES

    run(main())


def test_a_retry_for_another_tier_is_another_call(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as (home, attached, number):
            first = await home.client.cache.Fetch(ask(attached, number, device=True, request_id=b"x"))
            again = await home.client.cache.Fetch(ask(attached, number, device=True, request_id=b"x"))
            assert first.lease_id == again.lease_id
            error = await failure(home.client.cache.Fetch(ask(attached, number, request_id=b"x")))
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS

    run(main())


def test_queries_of_one_call_in_both_tiers(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as (home, attached, number):
            queries = [
                cache_pb2.FetchQuery(namespace_id=number, prompt=prompt(PAGES, 7), device=device)
                for device in (True, False)
            ]
            answer = await home.client.cache.FetchMany(
                cache_pb2.FetchManyRequest(session_id=attached.id, queries=queries, wait_ms=5_000)
            )
            device, host = (outcome.fetch for outcome in answer.outcomes)
            assert device.granted_pages == host.granted_pages == PAGES
            assert not device.extents.pages and list(host.extents.pages) == [PAGES]

    run(main())


def test_without_a_device_tier_it_is_unsupported(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, device="", device_bytes=0) as (home, attached, number):
            error = await failure(home.client.cache.Fetch(ask(attached, number, device=True)))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            query = cache_pb2.FetchQuery(namespace_id=number, prompt=prompt(PAGES, 7), device=True)
            answer = await home.client.cache.FetchMany(
                cache_pb2.FetchManyRequest(session_id=attached.id, queries=[query])
            )
            refusal = answer.outcomes[0].refusal
            assert refusal.reason == "UNSUPPORTED" and "--device-bytes" in refusal.hint
            assert home.service.stats().engine.leases == 0

    run(main())


def test_look_ups_in_the_device_are_recorded_as_any_other(tmp_path: Path) -> None:
    """A recording does not say in which tier a look-up leased: it is the same request in both tiers."""
    path = tmp_path / "trace"

    async def main() -> None:
        async with house(tmp_path, record=str(path)) as (home, attached, number):
            await home.client.cache.Fetch(ask(attached, number, device=True))
            await home.client.cache.Fetch(ask(attached, number))

    run(main())
    found = list(open_trace(path, strict=True))
    assert [len(request.blocks) for request in found] == [PAGES] * len(found)
    assert len({tuple(request.blocks) for request in found}) == 1
