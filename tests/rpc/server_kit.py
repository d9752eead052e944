"""A scripted service behind the real server, and a raw client in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
from xxhash import xxh3_64_intdigest

from hicache.engine import EngineStats, MatchView, NodeView, OperationView, TierView, actions
from hicache.engine.counters import Counters
from hicache.errors import CorruptError, NotFoundError
from hicache.keys import fingerprint, validate
from hicache.rpc.common import fdproto
from hicache.rpc.pb import (
    admin_pb2_grpc,
    cache_pb2_grpc,
    region_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from hicache.rpc.server import Server, ServerOptions, serve
from hicache.runtime.counters import Latencies
from hicache.runtime.regions import RegionInfo
from hicache.runtime.stats import ServiceStats, TierStats
from hicache.types import TierKind, TierSpec

_RUNNER = asyncio.Runner()  # one loop for all tests: grpc.aio does not like to change its loop
PAGE_TOKENS = 4
PAGE_BYTES = 4096
TIERS = (
    TierSpec("host", TierKind.HOST, 1 << 30, segment_bytes=1 << 20, client_readable=True),
    TierSpec("disk", TierKind.DISK, 1 << 32, keyed=True, durable=True),
)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return _RUNNER.run(work)


class FakeRegions:
    def __init__(self) -> None:
        self.on_retired: Callable[[str, int], set[int]] = lambda tenant, region: set()
        self.arena: dict[tuple[str, int], int] = {}
        self.registered: dict[int, tuple[int, int]] = {}
        self.confirmed: list[tuple[int, int]] = []
        self.next_id = 100
        self.unsure: set[int] = set()

    def register(self, session: int, fd: int) -> Any:
        self.next_id += 1
        self.registered[self.next_id] = (session, fd)
        return RegionInfo(self.next_id, os.fstat(fd).st_size)

    def unregister(self, session: int, region: int) -> None:
        _, fd = self.registered.pop(region)
        os.close(fd)

    def may_stay_mapped(self, regions: Any) -> None:
        self.unsure.update(regions)

    def add_arena(self, tenant: str, region: int, content: bytes) -> None:
        fd = os.memfd_create("arena")
        os.write(fd, content)
        self.arena[tenant, region] = fd

    def arenas(self, tenant: str) -> list[Any]:
        return [
            SimpleNamespace(
                region_id=region,
                size_bytes=os.fstat(fd).st_size,
                page_bytes=PAGE_BYTES,
                first_slot_offset=4096,
                slot_stride=PAGE_BYTES,
                slots=7,
                memory=None,
            )
            for (owner, region), fd in self.arena.items()
            if owner == tenant
        ]

    def arena_fd(self, tenant: str, region: int) -> int:
        if (tenant, region) not in self.arena:
            raise NotFoundError(f"region {region} is not there")
        return self.arena[tenant, region]

    def released(self, session: int, region: int) -> None:
        self.confirmed.append((session, region))

    def close(self) -> None:
        for fd in self.arena.values():
            os.close(fd)
        for _, fd in self.registered.values():
            os.close(fd)


class FakeWriter:
    page_bytes = PAGE_BYTES

    def __init__(self, service: FakeService) -> None:
        self.service = service
        self.pages: list[tuple[int, bytes]] = []

    async def put(self, page: int, data: bytes, checksum: int) -> None:
        if xxh3_64_intdigest(data) != checksum:
            raise CorruptError(f"page {page}")
        self.pages.append((page, bytes(data)))

    async def commit(self, ack: Any, *, last: bool) -> actions.CommitResult:
        await self.service.step("commit_written", ack=ack, last=last)
        self.service.written.append(self.pages)
        return actions.CommitResult(len(self.pages), 0, 0)

    def close(self) -> None:
        self.service.closed_writers += 1


class FakeService:
    """Records what it is asked; ``script[name]`` is an exception to raise or a result; ``gate`` holds calls back."""

    def __init__(self) -> None:
        self.epoch = secrets.token_bytes(16)
        self.kv_memory, self.device_uuids, self.pool_shared = ("memfd",), (b"u" * 16,), False
        self.specs = TIERS
        self.state = "serving"
        self.options = SimpleNamespace(max_ttl_ms=600_000)
        self.regions = FakeRegions()
        self.latencies = Latencies()
        self.on_draining: list[Callable[[int], None]] = []
        self.on_tier: list[Callable[[str, bool], None]] = []
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.script: dict[str, Any] = {}
        self.gate: asyncio.Event | None = None
        self.sessions: dict[int, str] = {}
        self.namespaces: dict[bytes, int] = {}
        self.written: list[list[tuple[int, bytes]]] = []
        self.closed_writers = 0
        self.count = 0

    def called(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for call, args, kwargs in self.calls if call == name]

    def note(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((name, args, kwargs))
        result = self.script.get(name)
        if isinstance(result, BaseException):
            raise result
        return result

    async def step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.gate is not None:
            await self.gate.wait()
        return self.note(name, *args, **kwargs)

    def now_ms(self) -> int:
        return 1_000

    # sessions

    def open_session(self, tenant: str, name: str) -> int:
        self.note("open_session", tenant, name)
        self.count += 1
        self.sessions[self.count] = tenant
        return self.count

    def suspend_session(self, session: int, window_ms: int) -> None:
        self.note("suspend_session", session, window_ms)

    def resume_session(self, session: int) -> None:
        self.note("resume_session", session)

    def end_session(self, session: int, *, dead: bool) -> None:
        self.note("end_session", session, dead=dead)
        del self.sessions[session]

    def open_namespace(self, spec: Any) -> tuple[int, bytes]:
        self.note("open_namespace", spec)
        validate(spec)
        print_ = fingerprint(spec)
        return self.namespaces.setdefault(print_, len(self.namespaces) + 1), print_

    # calls

    def match(self, namespace: int, prompt: bytes, **kwargs: Any) -> MatchView:
        return self.note("match", namespace, prompt, **kwargs) or MatchView(3, [2, 1], [0, 1])

    async def fetch(self, *args: Any, **kwargs: Any) -> actions.FetchResult:
        self.count += 1
        lease = self.count
        return await self.step("fetch", *args, **kwargs) or actions.FetchResult(
            lease, 3, 2, 1500, (), 9, [2, 1]
        )

    def extents(self, result: Any) -> Any:
        return self.script.get("extents") or SimpleNamespace(
            pages=[2],
            region_id=[5],
            offset=[4096],
            first_slot=[0],
            checksums=np.array([7, 1 << 63], np.uint64),
            generations=np.array([2, 4], np.uint64),
        )

    def pending(self, result: actions.FetchResult) -> tuple[int, int]:
        return self.note("pending", result) or (1, 25)

    def lease_view(self, session: int, lease: int) -> actions.FetchResult:
        return self.note("lease_view", session, lease) or actions.FetchResult(
            lease, 3, 3, 1500, (), 0, [2, 1]
        )

    async def reserve(self, *args: Any, **kwargs: Any) -> actions.ReserveResult:
        return await self.step("reserve", *args, **kwargs) or actions.ReserveResult(4, 1, 2, 1500)

    async def commit(self, *args: Any, **kwargs: Any) -> actions.CommitResult:
        return await self.step("commit", *args, **kwargs) or actions.CommitResult(2, 1, 3)

    def abort(self, *args: Any) -> None:
        self.note("abort", *args)

    async def prefetch(self, *args: Any) -> actions.OperationResult:
        return await self.step("prefetch", *args) or actions.OperationResult(8, 3, 1)

    async def wait_operation(self, *args: Any) -> OperationView:
        return await self.step("wait_operation", *args) or OperationView(True, 1, 0, 6)

    def cancel_operation(self, *args: Any) -> None:
        self.note("cancel_operation", *args)

    async def renew(self, *args: Any) -> actions.RenewResult:
        return await self.step("renew", *args) or actions.RenewResult([2], 1500)

    def release(self, *args: Any) -> None:
        self.note("release", *args)

    async def pin(self, *args: Any, **kwargs: Any) -> actions.PinResult:
        return await self.step("pin", *args, **kwargs) or actions.PinResult(3, 2)

    async def unpin(self, *args: Any) -> None:
        await self.step("unpin", *args)

    async def evict(self, *args: Any) -> actions.EvictResult:
        return await self.step("evict", *args) or actions.EvictResult(3, 1)

    async def clear(self, *args: Any) -> actions.EvictResult:
        return await self.step("clear", *args) or actions.EvictResult(3, 1)

    async def read_pages(
        self, session: int, lease: int, first: int, count: int
    ) -> AsyncIterator[tuple[bytes, int]]:
        await self.step("read_pages", session, lease, first, count)
        for number in range(count):
            yield bytes([number]) * self.script.get("page_size", PAGE_BYTES), number + 1

    def begin_write(self, session: int, reservation: int) -> FakeWriter:
        self.note("begin_write", session, reservation)
        return FakeWriter(self)

    # paged KV

    def timeline_fd(self, session: int, region: int) -> int:
        raise NotFoundError(f"region {region} is no timeline of session {session}")

    async def unregister_kv(self, session: int, region: int) -> None:
        await self.step("unregister_kv", session, region)

    # operators

    def stats(self) -> ServiceStats:
        views = [TierView("host", "host", True, 100, 10, 3), TierView("disk", "disk", False, 200, 20, 4)]
        engine = EngineStats(views, Counters(2), len(self.sessions), 1, 2, 3, 4, 5, 6, 7, 8, 9)
        tiers = tuple(
            TierStats(
                view.name, view.kind, state, 100, 10, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, reason=reason
            )
            for view, state, reason in zip(views, ("ok", "read-only"), ("", "disk full"), strict=True)
        )
        return ServiceStats(
            self.state,
            77,
            engine,
            tiers,
            {"fetches": 5},
            frozenset({"fetches"}),
            tuple(self.latencies.snapshot()),
        )

    def tree_view(self, namespace: int, max_nodes: int) -> tuple[list[NodeView], int]:
        self.note("tree_view", namespace, max_nodes)
        return [NodeView(1, 0, "x", 0, 3, b"12345678", [3, 0], 1, 2, 50, 0)], 4

    def check(self) -> None:
        self.note("check")

    def action_digest(self) -> str:
        return "abc"

    async def drain(self, grace_ms: int) -> Any:
        self.state = "draining"
        for tell in self.on_draining:
            tell(grace_ms)
        return self.note("drain", grace_ms)


@dataclasses.dataclass
class Attached:
    """One Attach stream after its Welcome."""

    stream: Any
    welcome: session_pb2.Welcome

    @property
    def id(self) -> bytes:
        return self.welcome.session_id

    async def send(self, **event: Any) -> None:
        await self.stream.write(session_pb2.AttachRequest(**event))

    async def read(self) -> Any:
        async with asyncio.timeout(5):
            return await self.stream.read()


class Client:
    """Stubs of every service on one channel."""

    def __init__(self, channel: grpc.aio.Channel, fd_path: str = "") -> None:
        self.channel = channel
        self.fd_path = fd_path
        self.session = session_pb2_grpc.SessionServiceStub(channel)
        self.region = region_pb2_grpc.RegionServiceStub(channel)
        self.cache = cache_pb2_grpc.CacheServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)

    async def transact(self, request: fdproto.Request, fds: tuple[int, ...] = ()) -> fdproto.Answer:
        def exchange() -> fdproto.Answer:
            with fdproto.connect(self.fd_path, 5.0) as sock:
                return fdproto.transact(sock, request, fds)

        return await asyncio.to_thread(exchange)

    async def attach(
        self, *, resume: bytes = b"", token: bytes | None = None, metadata: Any = None
    ) -> Attached:
        if token is None and self.fd_path:
            token = (await self.transact(fdproto.Hello())).payload
        stream = self.session.Attach(metadata=metadata)
        hello = session_pb2.Hello(client_name="test", token=token or b"", resume_session_id=resume)
        await stream.write(session_pb2.AttachRequest(hello=hello))
        async with asyncio.timeout(5):
            first = await stream.read()
        assert first is not grpc.aio.EOF
        return Attached(stream, first.welcome)

    async def namespace(self, attached: Attached, **fields: Any) -> int:
        spec = session_pb2.NamespaceSpec(
            **({"model": "m", "page_tokens": PAGE_TOKENS, "page_bytes": PAGE_BYTES} | fields)
        )
        request = session_pb2.OpenNamespaceRequest(session_id=attached.id, namespace=spec)
        return (await self.session.OpenNamespace(request)).namespace_id


@dataclasses.dataclass
class House:
    """A server, its service and a client."""

    server: Server
    service: Any
    client: Client
    options: ServerOptions


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, service: Any = None, **settings: Any) -> AsyncIterator[House]:
    """A started server on a unix socket in ``tmp_path``, with a connected client."""
    service = service or FakeService()
    options = ServerOptions(socket_path=str(tmp_path / "s"), **settings)
    server = await serve(service, options)
    channel = grpc.aio.insecure_channel(f"unix:{options.socket_path}")
    try:
        yield House(server, service, Client(channel, options.fd_socket_path), options)
    finally:
        await channel.close()
        await server.stop(200)
        if isinstance(service, FakeService):
            service.regions.close()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call succeeded")


async def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def tokens(count: int) -> bytes:
    """A prompt of ``count`` tokens."""
    return b"".join(number.to_bytes(4, "little") for number in range(count))


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
