"""Calls through a real socket to a scripted service: what reaches the service, what comes back, what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from server_kit import PAGE_BYTES, FakeService, failure, run, serving, tokens
from xxhash import xxh3_64_intdigest

from hicache.engine import actions
from hicache.errors import ErrorCode, ExhaustedError, HicacheError, NotFoundError, ViolationError
from hicache.rpc.common import status
from hicache.rpc.pb import admin_pb2, cache_pb2, session_pb2
from hicache.types import NO_USE, Ack, Pressure, Use


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_keeps_its_code_hint_and_advice(code: ErrorCode) -> None:
    error = HicacheError("no room in tier host", hint="raise --host-bytes", retry_after_ms=250)
    error.code = code
    wire = status.to_wire(error)
    assert wire.code.name == code.value
    assert wire.text == "no room in tier host (raise --host-bytes)"
    back = status.from_wire(wire.code, wire.text, wire.trailing)
    assert (back.code, back.message, back.hint, back.retry_after_ms) == (
        code,
        "no room in tier host",
        "raise --host-bytes",
        250,
    )


def test_every_status_becomes_an_error() -> None:
    for code in grpc.StatusCode:
        error = status.from_wire(code, None, None)
        assert isinstance(error, HicacheError)
    assert status.code_of(grpc.StatusCode.DEADLINE_EXCEEDED) is ErrorCode.UNAVAILABLE
    assert status.code_of(grpc.StatusCode.UNKNOWN) is ErrorCode.INTERNAL


def test_unreadable_details_are_left_out() -> None:
    error = status.from_wire(grpc.StatusCode.ABORTED, "x", [(status.DETAILS_KEY, b"\xff\xff\xff")])
    assert (error.code, error.message, error.hint) == (ErrorCode.CONFLICT, "x", "")


def test_long_texts_fit_the_metadata() -> None:
    wire = status.to_wire(HicacheError("é" * 100_000, hint="ü" * 100_000))
    assert len(wire.text.encode()) <= status.MAX_TEXT_BYTES
    assert sum(len(value) for _, value in wire.trailing) < 6_000


def test_capabilities_need_no_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            answer = await house.client.session.GetCapabilities(session_pb2.GetCapabilitiesRequest())
            assert answer.server_epoch == house.service.epoch
            assert [tier.name for tier in answer.tiers] == ["host", "disk"]
            assert answer.fd_socket == house.options.fd_socket_path
            assert answer.stream_chunk_bytes == 1 << 20

    run(main())


def test_match_and_fetch_translate(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            namespace = await house.client.namespace(attached)
            prompt = tokens(14)
            answer = await house.client.cache.Match(
                cache_pb2.MatchRequest(
                    session_id=attached.id,
                    namespace_id=namespace,
                    prompt=prompt,
                    touch=True,
                    prefetch=True,
                    request_class="chat",
                    turn=3,
                    cost_per_page=0.5,
                )
            )
            assert (answer.matched_pages, [*answer.run_pages], [*answer.run_tier]) == (3, [2, 1], [0, 1])
            whole = prompt[: 12 * 4]
            ((args, kwargs),) = house.service.called("match")
            assert (args, kwargs["touch"], kwargs["prefetch"]) == ((namespace, whole), True, True)
            assert kwargs["use"] == Use("chat", 3, 0.5)
            fetched = await house.client.cache.Fetch(
                cache_pb2.FetchRequest(
                    session_id=attached.id,
                    namespace_id=namespace,
                    prompt=prompt,
                    ttl_ms=1 << 63,
                    wait_ms=5_000,
                ),
                timeout=1.0,
            )
            assert fetched.expires_in_ms == 500
            assert [*fetched.extents.checksums] == [7, 1 << 63]
            assert (fetched.operation_id, [*fetched.tier_pages]) == (9, [2, 1])
            assert (fetched.pending_pages, fetched.pending_ms) == (1, 25)
            ((args, kwargs),) = house.service.called("fetch")
            assert args == (1, namespace, whole)
            assert kwargs["ttl_ms"] < 1 << 62
            assert kwargs["use"] is NO_USE
            assert 0 < kwargs["wait_ms"] < 1_000, "the call's deadline caps the wait"

    run(main())


def test_storing_translates(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            namespace = await house.client.namespace(attached)
            cache, sid = house.client.cache, attached.id
            reserved = await cache.Reserve(
                cache_pb2.ReserveRequest(
                    session_id=sid, namespace_id=namespace, prompt=tokens(12), drop_pressure=True
                )
            )
            assert (reserved.reservation_id, reserved.present_pages, reserved.missing_pages) == (4, 1, 2)
            assert house.service.called("reserve")[0][1]["pressure"] is Pressure.DROP
            committed = await cache.Commit(
                cache_pb2.CommitRequest(
                    session_id=sid,
                    reservation_id=4,
                    first_page=[1],
                    pages=[2],
                    region_id=[101],
                    offset=[0],
                    checksums=[5, 6],
                    durable=True,
                    last=True,
                )
            )
            assert (committed.stored_pages, committed.already_present_pages, committed.durable_pages) == (
                2,
                1,
                3,
            )
            ((args, kwargs),) = house.service.called("commit")
            assert args == (1, 4, [(1, 2)], [(101, 0)])
            assert kwargs == {"checksums": [5, 6], "ack": Ack.DURABLE, "last": True}
            await cache.Abort(cache_pb2.AbortRequest(session_id=sid, reservation_id=4))
            assert house.service.called("abort") == [((1, 4), {})]

    run(main())


def test_leases_and_operations_translate(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            namespace = await house.client.namespace(attached)
            cache, sid = house.client.cache, attached.id
            moving = await cache.Prefetch(
                cache_pb2.PrefetchRequest(session_id=sid, namespace_id=namespace, prompt=tokens(8), tier=1)
            )
            assert (moving.operation_id, moving.matched_pages, moving.moving_pages) == (8, 3, 1)
            waited = await cache.WaitOperation(cache_pb2.WaitOperationRequest(session_id=sid, operation_id=8))
            assert waited.done
            assert waited.fetch.lease_id == 6
            await cache.CancelOperation(cache_pb2.CancelOperationRequest(session_id=sid, operation_id=8))
            renewed = await cache.RenewLeases(cache_pb2.RenewLeasesRequest(session_id=sid, lease_ids=[1, 2]))
            assert ([*renewed.lost_lease_ids], renewed.expires_in_ms) == ([2], 500)
            await cache.ReleaseLeases(cache_pb2.ReleaseLeasesRequest(session_id=sid, lease_ids=[1, 2]))
            assert house.service.called("release") == [((1, [1, 2]), {})]

    run(main())


def test_administrators_calls_translate(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            namespace = await house.client.namespace(attached)
            admin, sid = house.client.admin, attached.id
            where: dict[str, Any] = {"session_id": sid, "namespace_id": namespace, "prompt": tokens(4)}
            assert (await admin.Pin(admin_pb2.PinRequest(**where))).pin_id == 3
            await admin.Unpin(admin_pb2.UnpinRequest(session_id=sid, pin_id=3))
            assert (await admin.Evict(admin_pb2.EvictRequest(**where, everywhere=True))).kept_pages == 1
            assert house.service.called("evict") == [((namespace, tokens(4), -1), {})]
            assert (await admin.Clear(admin_pb2.ClearRequest(session_id=sid, all_namespaces=True))).pages == 3
            both = await failure(
                admin.Clear(
                    admin_pb2.ClearRequest(session_id=sid, all_namespaces=True, namespace_id=namespace)
                )
            )
            assert both.code() is grpc.StatusCode.INVALID_ARGUMENT
            stats = await admin.GetStats(admin_pb2.GetStatsRequest(session_id=sid))
            assert (stats.state, stats.uptime_ms, stats.counters["fetches"]) == ("serving", 77, 5)
            assert [tier.state for tier in stats.tiers] == ["ok", "read-only"]
            assert [tier.reason for tier in stats.tiers] == ["", "disk full"]
            assert {"rpc/Pin", "rpc/OpenNamespace"} <= {latency.call for latency in stats.latencies}
            tree = await admin.GetTree(admin_pb2.GetTreeRequest(session_id=sid))
            assert (tree.nodes[0].first_symbol_digest, tree.omitted_nodes) == (b"12345678", 4)
            assert (await admin.Check(admin_pb2.CheckRequest(session_id=sid))).ok
            house.service.script["check"] = ViolationError("two owners", story=("Fetch", "Commit"))
            answer = await admin.Check(admin_pb2.CheckRequest(session_id=sid))
            assert not answer.ok
            assert "Commit" in answer.problem

    run(main())


def test_pages_travel_as_checksummed_chunks(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            house.service.script["page_size"] = (1 << 20) + 5
            request = cache_pb2.ReadPagesRequest(session_id=attached.id, lease_id=1, first_page=3, pages=2)
            chunks = [chunk async for chunk in house.client.cache.ReadPages(request)]
            places = [(chunk.page, chunk.offset, len(chunk.data), chunk.checksum) for chunk in chunks]
            assert places == [(3, 0, 1 << 20, 0), (3, 1 << 20, 5, 1), (4, 0, 1 << 20, 0), (4, 1 << 20, 5, 2)]

    run(main())


def stream_of(sid: bytes, pages: dict[int, bytes], *, rid: bytes = b"", piece: int = 1000) -> list[Any]:
    opening = cache_pb2.WritePagesRequest.Open(session_id=sid, request_id=rid, reservation_id=4)
    messages = [cache_pb2.WritePagesRequest(open=opening)]
    for page, data in pages.items():
        for offset in range(0, len(data), piece):
            part = data[offset : offset + piece]
            checksum = xxh3_64_intdigest(data) if offset + piece >= len(data) else 0
            chunk = cache_pb2.PageChunk(page=page, offset=offset, data=part, checksum=checksum)
            messages.append(cache_pb2.WritePagesRequest(chunk=chunk))
    return messages


def test_written_pages_are_put_together_and_repeated_streams_answered_alike(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            pages = {2: b"a" * PAGE_BYTES, 3: bytes(range(256)) * (PAGE_BYTES // 256)}
            for _ in range(2):
                answer = await house.client.cache.WritePages(iter(stream_of(attached.id, pages, rid=b"r1")))
                assert answer.stored_pages == 2
            assert house.service.written == [[*pages.items()]]
            other = pages | {3: b"b" * PAGE_BYTES}
            error = await failure(
                house.client.cache.WritePages(iter(stream_of(attached.id, other, rid=b"r1")))
            )
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            assert house.service.closed_writers == 1

    run(main())


def test_a_failed_stream_is_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            house.service.script["commit_written"] = NotFoundError("gone")
            messages = stream_of(attached.id, {0: b"a" * PAGE_BYTES}, rid=b"r1")
            error = await failure(house.client.cache.WritePages(iter(messages)))
            assert error.code() is grpc.StatusCode.NOT_FOUND
            del house.service.script["commit_written"]
            assert (await house.client.cache.WritePages(iter(messages))).stored_pages == 1

    run(main())


def broken_streams() -> dict[str, Any]:
    def change(position: int, **fields: Any) -> Any:
        def make(messages: list[Any]) -> list[Any]:
            for name, value in fields.items():
                setattr(messages[position].chunk, name, value)
            return messages

        return make

    return {
        "no open": lambda messages: messages[1:],
        "two opens": lambda messages: [messages[0], *messages],
        "ends within a page": lambda messages: messages[:-1],
        "a gap": lambda messages: messages[:2] + messages[3:],
        "an empty chunk": change(1, data=b""),
        "too long": change(-1, data=b"x" * PAGE_BYTES),
        "out of order": lambda messages: messages + messages[1:],
        "nothing": lambda messages: [],
    }


@pytest.mark.parametrize("how", broken_streams())
def test_broken_streams_are_refused(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            messages = broken_streams()[how](stream_of(attached.id, {0: b"a" * PAGE_BYTES}))
            error = await failure(house.client.cache.WritePages(iter(messages)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
            assert house.service.written == []

    run(main())


def test_a_wrong_checksum_is_data_loss(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            messages = stream_of(attached.id, {0: b"a" * PAGE_BYTES})
            messages[-1].chunk.checksum += 1
            error = await failure(house.client.cache.WritePages(iter(messages)))
            assert error.code() is grpc.StatusCode.DATA_LOSS

    run(main())


def test_what_the_service_raises_becomes_a_status(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            namespace = await house.client.namespace(attached)
            request = cache_pb2.ReserveRequest(
                session_id=attached.id, namespace_id=namespace, prompt=tokens(4), request_id=b"\xab\xcd"
            )
            house.service.script["reserve"] = ExhaustedError("full", hint="wait", retry_after_ms=40)
            error = await failure(house.client.cache.Reserve(request))
            back = status.from_wire(error.code(), error.details(), error.trailing_metadata())
            assert (back.code, back.message, back.hint, back.retry_after_ms) == (
                ErrorCode.EXHAUSTED,
                "full",
                "wait",
                40,
            )
            house.service.script["match"] = KeyError("secret")
            error = await failure(
                house.client.cache.Match(
                    cache_pb2.MatchRequest(session_id=attached.id, namespace_id=namespace, prompt=tokens(4))
                )
            )
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in error.details()
            assert "secret" in caplog.text

    run(main())


def refusals(sid: bytes, namespace: int) -> dict[str, tuple[str, Any, grpc.StatusCode]]:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    piece: dict[str, Any] = {"first_page": [0], "pages": [1], "region_id": [1], "offset": [0]}

    def match(**fields: Any) -> Any:
        return cache_pb2.MatchRequest(**({"session_id": sid, "namespace_id": namespace} | fields))

    def commit(**fields: Any) -> Any:
        return cache_pb2.CommitRequest(**({"session_id": sid} | piece | fields))

    return {
        "no session": ("Match", match(session_id=b""), grpc.StatusCode.UNAUTHENTICATED),
        "unknown session": ("Match", match(session_id=b"x" * 16), grpc.StatusCode.FAILED_PRECONDITION),
        "unknown namespace": ("Match", match(namespace_id=99), grpc.StatusCode.NOT_FOUND),
        "half a token": ("Match", match(prompt=b"abc"), invalid),
        "long prompt": ("Match", match(prompt=bytes(4096)), invalid),
        "many pages": ("Match", match(prompt=bytes(11 * 16)), invalid),
        "uneven columns": ("Commit", commit(pages=[1, 2]), invalid),
        "empty piece": ("Commit", commit(pages=[0]), invalid),
        "checksums": ("Commit", commit(checksums=[1, 2]), invalid),
        "overlap": (
            "Commit",
            commit(first_page=[0, 0], pages=[2, 1], region_id=[1, 1], offset=[0, 0]),
            invalid,
        ),
        "far page": ("Commit", commit(first_page=[(1 << 32) - 1], pages=[(1 << 32) - 1]), invalid),
        "far offset": ("Commit", commit(offset=[(1 << 64) - 1]), invalid),
        "long request id": ("Commit", commit(request_id=b"x" * 65), invalid),
        "tier": (
            "Prefetch",
            cache_pb2.PrefetchRequest(session_id=sid, namespace_id=namespace, tier=7),
            invalid,
        ),
    }


@pytest.mark.parametrize("what", refusals(b"", 0))
def test_bad_input_is_refused_before_the_service_sees_it(tmp_path: Path, what: str) -> None:
    async def main() -> None:
        async with serving(tmp_path, max_prompt_bytes=2048, max_prompt_pages=10) as house:
            attached = await house.client.attach()
            namespace = await house.client.namespace(attached)
            before = len(house.service.calls)
            method, request, code = refusals(attached.id, namespace)[what]
            error = await failure(getattr(house.client.cache, method)(request))
            assert error.code() is code, error.details()
            assert len(house.service.calls) == before

    run(main())


def test_inflight_calls_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, max_inflight_per_session=2) as house:
            attached = await house.client.attach()
            namespace = await house.client.namespace(attached)
            house.service.gate = asyncio.Event()

            def fetch(rid: bytes) -> Any:
                return house.client.cache.Fetch(
                    cache_pb2.FetchRequest(
                        session_id=attached.id, namespace_id=namespace, prompt=tokens(4), request_id=rid
                    )
                )

            held = [fetch(b"a"), fetch(b"b")]
            await asyncio.sleep(0.1)
            error = await failure(fetch(b"c"))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert status.from_wire(error.code(), "", error.trailing_metadata()).retry_after_ms > 0
            held[0].cancel()  # hanging up does not make room while the work goes on
            await asyncio.sleep(0.1)
            assert (await failure(fetch(b"c"))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            house.service.gate.set()
            await held[1]
            assert (await fetch(b"c")).lease_id

    run(main())


def test_a_fetch_without_mappable_pages_has_no_extents(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            namespace = await house.client.namespace(attached)
            house.service.script["extents"] = SimpleNamespace(pages=[])
            house.service.script["fetch"] = actions.FetchResult(0, 0, 0, 0, (), 0, [0, 0])
            answer = await house.client.cache.Fetch(
                cache_pb2.FetchRequest(session_id=attached.id, namespace_id=namespace, prompt=tokens(4))
            )
            assert not answer.HasField("extents")
            assert answer.expires_in_ms == 0

    run(main())


def test_failed_pages_of_a_commit_are_data_loss(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            house.service.script["commit"] = actions.CommitResult(1, 0, 0, failed_pages=1)
            error = await failure(
                house.client.cache.Commit(
                    cache_pb2.CommitRequest(
                        session_id=attached.id, first_page=[0], pages=[2], region_id=[1], offset=[0]
                    )
                )
            )
            assert error.code() is grpc.StatusCode.DATA_LOSS

    run(main())


def test_namespaces_of_another_tenant_stay_closed(tmp_path: Path) -> None:
    async def main() -> None:
        service = FakeService()
        async with serving(tmp_path, service) as house:
            attached = await house.client.attach()
            service.namespaces[b"other"] = 1  # opened by a session of another tenant
            error = await failure(
                house.client.cache.Match(cache_pb2.MatchRequest(session_id=attached.id, namespace_id=1))
            )
            assert error.code() is grpc.StatusCode.NOT_FOUND

    run(main())
