"""FetchMany and ReportCorrupt through a real socket to the real service: bounds, retries, callers that hang up."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from server_kit import PAGE_BYTES, PAGE_TOKENS, Attached, House, failure, run, serving, until

from hicache.rpc.common import fdproto
from hicache.rpc.pb import cache_pb2, region_pb2
from hicache.runtime import Service, ServiceOptions
from hicache.types import Namespace

Query = cache_pb2.FetchQuery


@asynccontextmanager
async def house(tmp_path: Path, disk: bool = False, **settings: Any) -> AsyncIterator[House]:
    more = {"disk_path": str(tmp_path / "disk"), "disk_bytes": 32 << 20} if disk else {}
    service = Service(ServiceOptions(host_bytes=4 << 20, prefault=False, **more))
    await service.start()
    try:
        async with serving(tmp_path, service, **settings) as found:
            yield found
        service.check()
    finally:
        await service.close()


def prompt(pages: int, salt: int = 0) -> bytes:
    return b"".join((salt * 1000 + number).to_bytes(4, "little") for number in range(pages * PAGE_TOKENS))


async def store(home: House, attached: Attached, namespace: int, pages: int, salt: int = 0) -> None:
    client = home.client
    fd = os.memfd_create("pages")
    os.write(fd, bytes([salt]) * pages * PAGE_BYTES)
    token = (await client.transact(fdproto.Put(attached.id), (fd,))).payload
    os.close(fd)
    region = await client.region.Register(region_pb2.RegisterRequest(session_id=attached.id, fd_token=token))
    room = await client.cache.Reserve(
        cache_pb2.ReserveRequest(session_id=attached.id, namespace_id=namespace, prompt=prompt(pages, salt))
    )
    await client.cache.Commit(
        cache_pb2.CommitRequest(
            session_id=attached.id,
            reservation_id=room.reservation_id,
            first_page=[0],
            pages=[pages],
            region_id=[region.region_id],
            offset=[0],
            durable=True,
            last=True,
        )
    )


def test_a_retry_gets_the_same_leases_and_another_payload_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            attached = await home.client.attach()
            namespace = await home.client.namespace(attached)
            await store(home, attached, namespace, 4)

            def request(pages: int = 4) -> cache_pb2.FetchManyRequest:
                queries = [Query(namespace_id=namespace, prompt=prompt(pages)), Query(namespace_id=9)]
                return cache_pb2.FetchManyRequest(session_id=attached.id, request_id=b"once", queries=queries)

            first = await home.client.cache.FetchMany(request())
            again = await home.client.cache.FetchMany(request())
            assert first.SerializeToString() == again.SerializeToString()
            assert first.outcomes[0].fetch.granted_pages == 4
            assert len(first.outcomes[0].fetch.extents.checksums) == 4
            assert first.outcomes[1].refusal.reason == "NOT_FOUND"
            assert first.outcomes[1].refusal.hint
            assert home.service.stats().engine.leases == 1
            error = await failure(home.client.cache.FetchMany(request(3)))
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            longer = request()
            longer.queries[1].prompt = b"1234"
            error = await failure(home.client.cache.FetchMany(longer))
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS

    run(main())


def test_prompts_that_trade_bytes_are_another_payload(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            attached = await home.client.attach()
            namespace = await home.client.namespace(attached)
            whole = prompt(4)

            def request(cut: int) -> cache_pb2.FetchManyRequest:
                parts = [whole[: cut * 16], whole[cut * 16 :]]
                queries = [Query(namespace_id=namespace, prompt=part) for part in parts]
                return cache_pb2.FetchManyRequest(session_id=attached.id, request_id=b"once", queries=queries)

            await home.client.cache.FetchMany(request(1))
            error = await failure(home.client.cache.FetchMany(request(2)))
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS

    run(main())


def test_calls_that_ask_too_much_are_refused_whole(tmp_path: Path) -> None:
    async def main() -> None:
        bounds = {"max_queries_per_call": 4, "max_prompt_bytes": 1600, "max_prompt_pages": 64}
        async with house(tmp_path, **bounds) as home:
            attached = await home.client.attach()
            namespace = await home.client.namespace(attached)
            await store(home, attached, namespace, 4)

            async def asking(*pages: int, **more: Any) -> Any:
                queries = [Query(namespace_id=namespace, prompt=prompt(count)) for count in pages]
                return await home.client.cache.FetchMany(
                    cache_pb2.FetchManyRequest(session_id=attached.id, queries=queries, **more)
                )

            assert len((await asking(4, 4, 4, 40)).outcomes) == 4
            for bad in ((1,) * 5, (40, 40, 1), (101,)):
                error = await failure(asking(*bad))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, bad
            for name in ("release_lease_ids", "renew_lease_ids"):
                error = await failure(asking(1, **{name: [1] * 65_537}))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            error = await failure(home.client.cache.FetchMany(cache_pb2.FetchManyRequest(session_id=b"?")))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert home.service.stats().engine.leases == 4, "those of the call that was let in"

    run(main())


def test_namespaces_of_other_tenants_are_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            attached = await home.client.attach()
            namespace = await home.client.namespace(attached)
            home.service.open_namespace(
                Namespace(tenant="b", model="m", page_tokens=PAGE_TOKENS, page_bytes=PAGE_BYTES)
            )
            answer = await home.client.cache.FetchMany(
                cache_pb2.FetchManyRequest(
                    session_id=attached.id,
                    queries=[
                        Query(namespace_id=namespace + 1, prompt=prompt(1)),
                        Query(namespace_id=namespace, prompt=prompt(1), request_class="x" * 100),
                        Query(namespace_id=namespace, prompt=prompt(1)),
                    ],
                )
            )
            kinds = [outcome.WhichOneof("outcome") for outcome in answer.outcomes]
            assert kinds == ["refusal", "refusal", "fetch"]
            assert [each.refusal.reason for each in answer.outcomes[:2]] == ["NOT_FOUND", "INVALID"]

    run(main())


def test_a_caller_that_hangs_up_holds_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, disk=True) as home:
            attached = await home.client.attach()
            namespace = await home.client.namespace(attached)
            await store(home, attached, namespace, 4)
            await home.service.evict(namespace, prompt(4), 0)
            port = home.service._house.ports[1]
            held, gate = port.submit, []
            port.submit = lambda *args, **kw: gate.append((args, kw))
            call = home.client.cache.FetchMany(
                cache_pb2.FetchManyRequest(
                    session_id=attached.id,
                    queries=[Query(namespace_id=namespace, prompt=prompt(4))] * 3,
                    wait_ms=60_000,
                )
            )
            await until(lambda: gate)
            assert home.service.stats().engine.leases == 3
            call.cancel()
            await until(lambda: home.service.stats().engine.leases == 0)
            port.submit = held
            for args, kw in gate:
                held(*args, **kw)
            await until(lambda: home.service.stats().engine.copies == 0)

    run(main())


def test_the_wait_ends_before_the_calls_deadline(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path, disk=True) as home:
            attached = await home.client.attach()
            namespace = await home.client.namespace(attached)
            for salt in range(3):
                await store(home, attached, namespace, 4, salt)
                await home.service.evict(namespace, prompt(4, salt), 0)
            port = home.service._house.ports[1]
            held, gate = port.submit, []
            port.submit = lambda *args, **kw: gate.append((args, kw))
            answer = await home.client.cache.FetchMany(
                cache_pb2.FetchManyRequest(
                    session_id=attached.id,
                    queries=[Query(namespace_id=namespace, prompt=prompt(4, salt)) for salt in range(3)],
                    wait_ms=60_000,
                ),
                timeout=2.0,  # a busy machine answers some tenths of a second late
            )
            assert [each.fetch.granted_pages for each in answer.outcomes] == [0, 0, 0]
            assert all(each.fetch.operation_id and each.fetch.pending_pages == 4 for each in answer.outcomes)
            port.submit = held
            for args, kw in gate:
                held(*args, **kw)
            await until(lambda: home.service.stats().engine.copies == 0)

    run(main())


def test_a_retried_report_answers_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with house(tmp_path) as home:
            attached = await home.client.attach()
            namespace = await home.client.namespace(attached)
            await store(home, attached, namespace, 4, 7)
            fetched = await home.client.cache.Fetch(
                cache_pb2.FetchRequest(session_id=attached.id, namespace_id=namespace, prompt=prompt(4, 7))
            )
            slot = fetched.extents.first_slot[0] + 2
            (view,) = home.service._house.ports[0].addressable.views([slot])
            view[0] ^= 1

            def report() -> cache_pb2.ReportCorruptRequest:
                return cache_pb2.ReportCorruptRequest(
                    session_id=attached.id, request_id=b"r", lease_id=fetched.lease_id, pages=[1, 2]
                )

            assert (await home.client.cache.ReportCorrupt(report())).corrupt_pages == 1
            assert (await home.client.cache.ReportCorrupt(report())).corrupt_pages == 1
            other = report()
            other.request_id = b"s"
            assert (await home.client.cache.ReportCorrupt(other)).corrupt_pages == 0
            other.request_id, other.pages[0] = b"t", 4
            error = await failure(home.client.cache.ReportCorrupt(other))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(main())
