"""Sessions: how they begin, live through blips and deaths, and end; and what a retried call gets."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server_kit import Client, FakeService, House, failure, open_fds, run, serving, tokens, until

from hicache.errors import DeniedError, UnavailableError
from hicache.rpc.common import fdproto
from hicache.rpc.pb import admin_pb2, cache_pb2, session_pb2
from hicache.rpc.server import ServerOptions
from hicache.rpc.server.idempotency import AnswerBook, Claim, StreamAnswer
from hicache.rpc.server.identity import Peer
from hicache.rpc.server.sessions import Sessions


def test_a_sandbox_without_pidfds_has_sessions_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)

    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            assert len(attached.welcome.session_id) == 16

    run(main())


def test_hello_is_welcomed(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, keep_alive_ms=1234) as house:
            attached = await house.client.attach()
            welcome = attached.welcome
            assert (len(welcome.session_id), welcome.tenant, welcome.resumed) == (16, "default", False)
            assert (welcome.keep_alive_ms, welcome.server_epoch) == (1234, house.service.epoch)
            assert house.service.called("open_session") == [(("default", "test"), {})]
            await attached.send(keep_alive=session_pb2.KeepAlive())
            assert (await attached.read()).WhichOneof("event") == "keep_alive"

    run(main())


def test_uids_become_tenants(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, tenants={os.geteuid(): "blue"}) as house:
            assert (await house.client.attach()).welcome.tenant == "blue"

    run(main())


@pytest.mark.parametrize("token", [b"", b"x" * 16, b"x"])
def test_a_hello_without_a_good_token_is_refused(tmp_path: Path, token: bytes) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            error = await failure(house.client.attach(token=token))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    run(main())


def test_a_token_is_good_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            token = (await house.client.transact(fdproto.Hello())).payload
            await house.client.attach(token=token)
            error = await failure(house.client.attach(token=token))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    run(main())


@pytest.mark.parametrize("first", [{"keep_alive": session_pb2.KeepAlive()}, {}])
def test_the_first_message_is_hello(tmp_path: Path, first: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            stream = house.client.session.Attach()
            await stream.write(session_pb2.AttachRequest(**first))
            assert (await failure(stream.read())).code() is grpc.StatusCode.INVALID_ARGUMENT

    run(main())


def test_goodbye_ends_the_session_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            await attached.send(goodbye=session_pb2.Goodbye())
            assert await attached.read() is grpc.aio.EOF
            assert house.service.called("end_session") == [((1,), {"dead": False})]
            assert not house.service.called("suspend_session")
            error = await failure(house.client.namespace(attached))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "attach again" in error.details()

    run(main())


def test_a_lost_stream_suspends_and_the_session_can_be_resumed(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, resume_window_ms=5_000) as house:
            attached = await house.client.attach()
            namespace = await house.client.namespace(attached)
            attached.stream.cancel()
            await until(lambda: house.service.called("suspend_session"))
            again = await house.client.attach(resume=attached.id)
            assert again.welcome.resumed
            assert again.id == attached.id
            assert house.service.called("resume_session") == [((1,), {})]
            await house.client.cache.Match(
                cache_pb2.MatchRequest(session_id=again.id, namespace_id=namespace, prompt=tokens(4))
            )
            assert not house.service.called("end_session")

    run(main())


def test_after_the_window_the_session_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, resume_window_ms=50) as house:
            attached = await house.client.attach()
            attached.stream.cancel()
            await until(lambda: house.service.called("end_session"))
            again = await house.client.attach(resume=attached.id)
            assert not again.welcome.resumed
            assert again.id != attached.id

    run(main())


def test_a_second_stream_takes_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            first = await house.client.attach()
            second = await house.client.attach(resume=first.id)
            assert second.welcome.resumed
            assert await first.read() is grpc.aio.EOF
            await second.send(keep_alive=session_pb2.KeepAlive())
            assert (await second.read()).WhichOneof("event") == "keep_alive"
            assert not house.service.called("suspend_session")

    run(main())


def test_missed_keep_alives_suspend(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, keep_alive_ms=30) as house:
            attached = await house.client.attach()
            assert (await failure(attached.read())).code() is grpc.StatusCode.UNAVAILABLE
            assert house.service.called("suspend_session")

    run(main())


CHILD = """
import sys, time, grpc
from hicache.rpc.common import fdproto
from hicache.rpc.pb import session_pb2, session_pb2_grpc
path = sys.argv[1]
with fdproto.connect(path + ".fd", 5.0) as sock:
    token = fdproto.transact(sock, fdproto.Hello()).payload
stub = session_pb2_grpc.SessionServiceStub(grpc.insecure_channel("unix:" + path))
def requests():
    yield session_pb2.AttachRequest(hello=session_pb2.Hello(client_name="child", token=token))
    time.sleep(60)
for answer in stub.Attach(requests()):
    print(answer.welcome.session_id.hex(), flush=True)
"""


def start_child(path: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_ends_its_session_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, resume_window_ms=60_000) as house:
            child = start_child(house.options.socket_path)
            try:
                assert child.stdout is not None
                line = await asyncio.to_thread(child.stdout.readline)
                assert len(bytes.fromhex(line)) == 16
                os.kill(child.pid, signal.SIGKILL)
                await until(lambda: house.service.called("end_session"), seconds=5)
                assert house.service.called("end_session") == [((1,), {"dead": True})]
                error = await failure(house.client.attach(resume=bytes.fromhex(line), token=b""))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            finally:
                child.kill()
                child.wait()
                child.stdout.close()

    run(main())


def test_sessions_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, max_sessions=1) as house:
            await house.client.attach()
            error = await failure(house.client.attach())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(main())


def test_namespaces_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, max_namespaces_per_tenant=2) as house:
            attached = await house.client.attach()
            for _ in range(3):  # opening the same one again is free
                await house.client.namespace(attached)
            await house.client.namespace(attached, salt="1")
            error = await failure(house.client.namespace(attached, salt="2"))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await house.client.namespace(attached)

    run(main())


def test_regions_retire_where_they_were_mapped(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            house.service.regions.add_arena("default", 5, b"x")
            mapping, other = await house.client.attach(), await house.client.attach()
            answer = await house.client.transact(fdproto.Get(mapping.id, 5))
            os.close(answer.fds[0])
            assert house.service.regions.on_retired("default", 5) == {1}
            assert (await mapping.read()).region_retired.region_id == 5
            await other.send(region_released=session_pb2.RegionReleased(region_id=5))
            await mapping.send(region_released=session_pb2.RegionReleased(region_id=5))
            await until(lambda: house.service.regions.confirmed)
            assert house.service.regions.confirmed == [(1, 5)]

    run(main())


def test_a_resumed_session_is_told_again_what_retired(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            house.service.regions.add_arena("default", 5, b"x")
            attached = await house.client.attach()
            os.close((await house.client.transact(fdproto.Get(attached.id, 5))).fds[0])
            attached.stream.cancel()
            await until(lambda: house.service.called("suspend_session"))
            assert house.service.regions.on_retired("default", 5) == {1}
            again = await house.client.attach(resume=attached.id)
            assert (await again.read()).region_retired.region_id == 5

    run(main())


def test_drain_tells_sessions_and_refuses_new_ones(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            health = health_pb2_grpc.HealthStub(house.client.channel)
            serving_now = health_pb2.HealthCheckResponse.SERVING
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == serving_now
            attached = await house.client.attach()
            await house.client.admin.Drain(admin_pb2.DrainRequest(session_id=attached.id, grace_ms=700))
            assert (await attached.read()).draining.grace_ms == 700
            async with asyncio.timeout(5):
                await house.server.wait_drained()
            assert house.service.called("drain") == [((700,), {})]
            error = await failure(house.client.attach())
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert (await health.Check(health_pb2.HealthCheckRequest())).status != serving_now

    run(main())


def test_each_tier_has_a_health_of_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            health = health_pb2_grpc.HealthStub(house.client.channel)

            async def status(name: str) -> int:
                return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

            well, ill = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
            assert [await status(name) for name in ("", "hicache.tier.host", "hicache.tier.disk")] == [
                well,
                well,
                ill,
            ]
            for now, expected in ((True, well), (False, ill)):
                for tell in house.service.on_tier:
                    tell("disk", now)
                await asyncio.sleep(0)
                assert [await status(name) for name in ("", "hicache.tier.disk")] == [well, expected]

    run(main())


def test_stop_ends_streams_sessions_and_leaks_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:  # the first server starts gRPC's own threads and descriptors
            await house.client.attach()
        before = open_fds()
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            loop = asyncio.get_running_loop()
            began = loop.time()
            await house.server.stop(5_000)
            assert loop.time() - began < 4, "streams do not hold the stop up"
            assert house.service.called("end_session")
            assert (await attached.read()).WhichOneof("event") == "draining"
            assert sorted(path.name for path in tmp_path.iterdir()) == ["s.lock"]
        await until(lambda: open_fds() <= before)

    run(main())


def test_reflection_lists_the_services(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            stub = reflection_pb2_grpc.ServerReflectionStub(house.client.channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
            names = {service.name for service in answers[0].list_services_response.service}
            assert names >= {
                "hicache.v1.SessionService",
                "hicache.v1.RegionService",
                "hicache.v1.CacheService",
                "hicache.v1.AdminService",
                "grpc.health.v1.Health",
            }

    run(main())


# --- retried calls


async def ready(house: House) -> tuple[Client, bytes, int]:
    attached = await house.client.attach()
    return house.client, attached.id, await house.client.namespace(attached)


def test_a_retried_call_gets_the_same_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            client, sid, namespace = await ready(house)

            def fetch(rid: bytes, prompt: bytes) -> Any:
                return client.cache.Fetch(
                    cache_pb2.FetchRequest(
                        session_id=sid, namespace_id=namespace, prompt=prompt, request_id=rid, wait_ms=9
                    )
                )

            first = await fetch(b"r1", tokens(4))
            assert await fetch(b"r1", tokens(4)) == first
            assert len(house.service.called("fetch")) == 1
            assert (await fetch(b"r2", tokens(4))).lease_id != first.lease_id
            error = await failure(fetch(b"r1", tokens(8)))
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            _, sid, namespace = await ready(house)  # another session may use the same id
            assert (await fetch(b"r1", tokens(8))).lease_id != first.lease_id
            await fetch(b"", tokens(4))
            await fetch(b"", tokens(4))
            assert len(house.service.called("fetch")) == 5

    run(main())


def test_concurrent_duplicates_wait_for_the_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            client, sid, namespace = await ready(house)
            house.service.gate = asyncio.Event()
            request = cache_pb2.FetchRequest(
                session_id=sid, namespace_id=namespace, prompt=tokens(4), request_id=b"r1"
            )
            calls = [client.cache.Fetch(request) for _ in range(4)]
            await asyncio.sleep(0.1)
            calls[0].cancel()
            house.service.gate.set()
            answers = [await call for call in calls[1:]]
            assert answers[0] == answers[1] == answers[2]
            assert len(house.service.called("fetch")) == 1

    run(main())


def test_a_caller_that_hung_up_finds_its_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            client, sid, namespace = await ready(house)
            house.service.gate = asyncio.Event()
            request = cache_pb2.ReserveRequest(
                session_id=sid, namespace_id=namespace, prompt=tokens(4), request_id=b"r1"
            )
            error = await failure(client.cache.Reserve(request, timeout=0.1))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            house.service.gate.set()
            assert (await client.cache.Reserve(request)).reservation_id == 4
            assert len(house.service.called("reserve")) == 1

    run(main())


def test_work_ends_with_its_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            client, sid, namespace = await ready(house)
            house.service.gate = asyncio.Event()
            call = client.cache.Reserve(
                cache_pb2.ReserveRequest(
                    session_id=sid, namespace_id=namespace, prompt=tokens(4), request_id=b"r1"
                )
            )
            await asyncio.sleep(0.05)
            house.server._sessions.end_all("test")
            error = await failure(call)
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert not house.service.called("reserve")

    run(main())


def test_failures_are_not_remembered(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            client, sid, namespace = await ready(house)
            request = cache_pb2.ReserveRequest(
                session_id=sid, namespace_id=namespace, prompt=tokens(4), request_id=b"r1"
            )
            house.service.script["reserve"] = UnavailableError("starting")
            assert (await failure(client.cache.Reserve(request))).code() is grpc.StatusCode.UNAVAILABLE
            del house.service.script["reserve"]
            assert (await client.cache.Reserve(request)).reservation_id == 4

    run(main())


def test_answers_are_bounded_in_number_and_time() -> None:
    async def main() -> None:
        now = 0.0
        book = AnswerBook(entries=2, ttl_s=10.0, now=lambda: now)
        runs = 0

        async def work() -> int:
            nonlocal runs
            runs += 1
            return runs

        async def ask(name: bytes) -> int:
            answer: int = await book.answer(name, lambda: b"same", work)
            return answer

        assert [await ask(name) for name in (b"a", b"b", b"a", b"c", b"a", b"b")] == [1, 2, 1, 3, 1, 4]
        assert len(book) == 2
        now = 11.0
        assert await ask(b"a") == 5

    run(main())


def test_streams_claim_their_request_id() -> None:
    async def main() -> None:
        book = AnswerBook(entries=2, ttl_s=10.0, now=lambda: 0.0)
        assert book.claim(b"") is None
        first = book.claim(b"a")
        assert isinstance(first, Claim)
        waiting = book.claim(b"a")
        assert isinstance(waiting, asyncio.Future)
        first.fail()
        assert await waiting is None
        second = book.claim(b"a")
        assert isinstance(second, Claim)
        answer = StreamAnswer(b"digest", 1)
        second.finish(answer)
        second.fail()
        known = book.claim(b"a")
        assert isinstance(known, asyncio.Future)
        assert await known is answer

    run(main())


# --- the table of sessions by itself


def test_a_service_that_refuses_leaves_nothing_behind() -> None:
    async def main() -> None:
        service = FakeService()
        service.script["open_session"] = UnavailableError("failed")
        sessions = Sessions(service, ServerOptions(socket_path="/s"))
        before = open_fds()
        with pytest.raises(UnavailableError):
            sessions.open(Peer("default", admin=False, pid=os.getpid(), uid=0), "test")
        assert (len(sessions), open_fds()) == (0, before)

    run(main())


def test_a_dead_process_cannot_attach() -> None:
    async def main() -> None:
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        sessions = Sessions(FakeService(), ServerOptions(socket_path="/s"))
        with pytest.raises(UnavailableError, match="gone"):
            sessions.open(Peer("default", admin=False, pid=child.pid, uid=0), "test")

    run(main())


def test_a_session_follows_the_process_that_resumes_it() -> None:
    async def main() -> None:
        service = FakeService()
        sessions = Sessions(service, ServerOptions(socket_path="/s"))
        children = [
            subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)
        ]
        first, second = (Peer("default", admin=False, pid=child.pid, uid=7) for child in children)
        session = sessions.open(first, "test")
        with pytest.raises(DeniedError):
            sessions.resume(session.id, Peer("default", admin=False, pid=second.pid, uid=8))
        assert sessions.resume(session.id, second) is session
        for child, ended in zip(children, (False, True), strict=True):
            child.kill()
            child.communicate()
            await asyncio.sleep(0.05)
            assert bool(service.called("end_session")) is ended
        assert sessions.resume(session.id, second) is None

    run(main())


def test_a_client_that_never_reads_loses_its_stream() -> None:
    async def main() -> None:
        sessions = Sessions(FakeService(), ServerOptions(socket_path="/s"))
        outbox = sessions.connect(sessions.open(Peer("default", admin=False), "test"))
        for _ in range(5_000):
            outbox.put(session_pb2.AttachResponse())
        assert outbox.closed
        count = 0
        while await outbox.get() is not None:
            count += 1
        assert count < 5_000

    run(main())
