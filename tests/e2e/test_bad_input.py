"""Bad input over the wire: a clear, typed error, nothing lost, and the server stays up."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import xxhash
from e2e_actor import PAGE_BYTES, PAGE_TOKENS, SHARED_PAGES, SYMBOL_BYTES, Actor, prompt
from e2e_kit import assert_idle, assert_sound, serving, tiers
from sidecars import Sidecar

from hicache.errors import HicacheError
from hicache.rpc.client.lifeline import exchange
from hicache.rpc.common import fdproto
from hicache.rpc.pb import (
    admin_pb2,
    cache_pb2,
    cache_pb2_grpc,
    region_pb2,
    region_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)

PAGES = 8
MIB = 1 << 20
Code = grpc.StatusCode


class Wire:
    """Raw stubs beside a client whose session they use."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor
        link = actor.client.core.session.current()
        assert link is not None
        self.link, self.session_id = link, link.session_id
        options = [("grpc.max_send_message_length", 64 * MIB), ("grpc.max_receive_message_length", 64 * MIB)]
        self.channel = grpc.insecure_channel(
            "unix:" + actor.client.core.target.removeprefix("unix://"), options
        )
        self.cache: Any = cache_pb2_grpc.CacheServiceStub(self.channel)
        self.sessions: Any = session_pb2_grpc.SessionServiceStub(self.channel)
        self.regions: Any = region_pb2_grpc.RegionServiceStub(self.channel)
        actor.store(0, PAGES)
        self.namespace_id = actor.ns._state.number

    def refused(self, call: Callable[..., Any], request: Any, *codes: grpc.StatusCode) -> str:
        """The call fails with one of these codes and says why; answers what it said."""
        with pytest.raises(grpc.RpcError) as failure:
            answer = call(request, timeout=10)
            if hasattr(answer, "__next__"):
                list(answer)
        error: Any = failure.value
        assert error.code() in codes, f"{error.code()}: {error.details()}"
        assert len(error.details()) > 10, "it says what is wrong"
        assert "Traceback" not in error.details()
        return str(error.details())

    def name(self, message: Any, **more: Any) -> Any:
        return message(session_id=self.session_id, namespace_id=self.namespace_id, **more)

    def region(self, size_bytes: int) -> tuple[int, int]:
        """A registered region of our own, which may shrink: (descriptor, region id)."""
        fd = os.memfd_create("e2e", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        token = exchange(self.link.fd_path, fdproto.Put(self.session_id), (fd,)).payload
        answer = self.regions.Register(
            region_pb2.RegisterRequest(session_id=self.session_id, fd_token=token), timeout=5
        )
        return fd, answer.region_id

    def reserve(self, talk: int, ttl_ms: int = 30_000) -> Any:
        return self.cache.Reserve(
            self.name(cache_pb2.ReserveRequest, prompt=prompt(talk, PAGES), ttl_ms=ttl_ms)
        )


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    folder = tmp_path_factory.mktemp("bad")
    with serving(folder, *tiers(folder, "16MiB", "64MiB")) as running:
        yield running
        assert running.pid, "the server stayed up"
        log = running.log_path.read_text()
        assert "Traceback" not in log
        assert running.stop() == 0


@pytest.fixture
def wire(sidecar: Sidecar) -> Iterator[Wire]:
    """Whatever a test does, afterwards the server is sound, idle, and serves the right bytes."""
    with Actor(sidecar.target) as actor:
        made = Wire(actor)
        with made.channel:
            yield made
        seen = actor.read(0, PAGES)
        assert (seen.granted, seen.wrong_bytes) == (PAGES, 0)
        assert_sound(actor.client)
    with Actor(sidecar.target) as after:
        assert_idle(after.client)


def test_malformed_look_ups(wire: Wire) -> None:
    refused, name = wire.refused, wire.name
    for call, message in (
        (wire.cache.Match, cache_pb2.MatchRequest),
        (wire.cache.Fetch, cache_pb2.FetchRequest),
        (wire.cache.Reserve, cache_pb2.ReserveRequest),
    ):
        said = refused(call, name(message, prompt=b"abc"), Code.INVALID_ARGUMENT)
        assert "3 bytes" in said or "multiple" in said, said
        huge = b"\0" * (SYMBOL_BYTES * ((8 * MIB) // SYMBOL_BYTES + 1))
        assert "at most" in refused(call, name(message, prompt=huge), Code.INVALID_ARGUMENT)
        unknown = message(session_id=wire.session_id, namespace_id=99_999, prompt=prompt(0, 1))
        assert "99999" in refused(call, unknown, Code.NOT_FOUND)
        nobody = message(session_id=secrets.token_bytes(16), namespace_id=1, prompt=prompt(0, 1))
        refused(call, nobody, Code.FAILED_PRECONDITION)
        refused(call, message(namespace_id=1, prompt=prompt(0, 1)), Code.UNAUTHENTICATED)
    assert wire.cache.Match(name(cache_pb2.MatchRequest, prompt=b"")).matched_pages == 0
    partial = prompt(0, 2) + b"\1\0\0\0"
    assert wire.cache.Match(name(cache_pb2.MatchRequest, prompt=partial)).matched_pages == 2


def test_a_message_that_is_too_large_is_refused_and_the_next_is_served(wire: Wire) -> None:
    request = wire.name(cache_pb2.MatchRequest, prompt=b"\0" * (17 * MIB))
    wire.refused(wire.cache.Match, request, Code.RESOURCE_EXHAUSTED)
    assert wire.cache.Match(wire.name(cache_pb2.MatchRequest, prompt=prompt(0, 2))).matched_pages == 2


def test_bytes_that_are_no_message(wire: Wire) -> None:
    raw = wire.channel.unary_unary("/hicache.v1.CacheService/Match")
    for junk in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", os.urandom(1000)):
        with pytest.raises(grpc.RpcError) as failure:
            raw(junk, timeout=10)
        # gRPC's own answer to what does not parse; what happens to parse names no session of ours
        assert failure.value.code() in {Code.UNKNOWN, Code.UNAUTHENTICATED, Code.FAILED_PRECONDITION}
    with pytest.raises(grpc.RpcError) as failure:
        wire.channel.unary_unary("/hicache.v1.CacheService/Nothing")(b"", timeout=10)
    assert failure.value.code() is Code.UNIMPLEMENTED


def test_namespaces_that_cannot_be(wire: Wire) -> None:
    good = {"model": "e2e", "page_tokens": PAGE_TOKENS, "page_bytes": PAGE_BYTES}
    for bad in (
        {"model": ""},
        {"page_bytes": 0},
        {"page_bytes": 1 << 40},
        {"page_tokens": 0},
        {"symbol_kind": "words"},
        {"symbol_kind": "hashes", "symbol_hash_bytes": 3},
        {"codec": "magic"},
        {"model": "x" * 100_000},
    ):
        spec = session_pb2.NamespaceSpec(**(good | bad))
        request = session_pb2.OpenNamespaceRequest(session_id=wire.session_id, namespace=spec)
        wire.refused(
            wire.sessions.OpenNamespace,
            request,
            *(Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.RESOURCE_EXHAUSTED),
        )


def commit_of(wire: Wire, reservation: int, *, last: bool = True, **columns: Any) -> Any:
    return cache_pb2.CommitRequest(
        session_id=wire.session_id, reservation_id=reservation, last=last, **columns
    )


def test_commits_that_make_no_sense(wire: Wire) -> None:
    fd, region = wire.region(PAGES * PAGE_BYTES)
    room = wire.reserve(10)
    first, missing = room.present_pages, room.missing_pages
    assert missing == PAGES - SHARED_PAGES
    good = {"first_page": [first], "pages": [missing], "region_id": [region], "offset": [0]}
    twice = {"first_page": [first] * 2, "pages": [1, 1], "region_id": [region] * 2, "offset": [0, 0]}
    bad: tuple[tuple[dict[str, Any], grpc.StatusCode], ...] = (
        ({"first_page": [0], "pages": [PAGES]}, Code.INVALID_ARGUMENT),  # present pages
        ({"first_page": [first + 1]}, Code.INVALID_ARGUMENT),  # a gap, and one too many
        ({"pages": [missing + 1]}, Code.INVALID_ARGUMENT),
        ({"pages": [0]}, Code.INVALID_ARGUMENT),
        ({"pages": [1 << 31]}, Code.INVALID_ARGUMENT),
        ({"pages": [missing, missing]}, Code.INVALID_ARGUMENT),  # columns of unequal length
        (twice, Code.INVALID_ARGUMENT),
        ({"checksums": [1]}, Code.INVALID_ARGUMENT),
        ({"offset": [(1 << 64) - PAGE_BYTES]}, Code.INVALID_ARGUMENT),
        ({"region_id": [region + 1000]}, Code.NOT_FOUND),
        # the end of a region is seen when it is read: told page by page, as for a wrong checksum
        ({"offset": [PAGES * PAGE_BYTES]}, Code.DATA_LOSS),
    )
    for columns, code in bad:
        request = commit_of(wire, room.reservation_id, last=False, **(good | columns))
        wire.refused(wire.cache.Commit, request, code)
    for reservation in (0, room.reservation_id + 1000, (1 << 64) - 1):
        wire.refused(wire.cache.Commit, commit_of(wire, reservation, **good), Code.NOT_FOUND)
    assert wire.actor.matched(10, PAGES) == SHARED_PAGES, "nothing changed"
    made = wire.actor.maker.make(wire.actor.seeds(prompt(10, PAGES)))[first:]
    os.pwrite(fd, made.tobytes(), 0)
    lies = [xxhash.xxh3_64_intdigest(page.data) ^ 1 for page in made]
    with contextlib.suppress(grpc.RpcError):  # refused whole, or page by page: but never matchable
        wire.cache.Commit(commit_of(wire, room.reservation_id, checksums=lies, **good))
    assert wire.actor.matched(10, PAGES) == SHARED_PAGES
    again = wire.reserve(10)
    answer = wire.cache.Commit(commit_of(wire, again.reservation_id, **good))
    assert answer.stored_pages == missing
    assert wire.actor.read(10, PAGES).wrong_bytes == 0
    os.close(fd)


def test_a_region_that_shrinks_under_the_server(wire: Wire) -> None:
    """The server reads it with pread: no SIGBUS, a typed error, and nothing of it becomes matchable."""
    fd, region = wire.region(PAGES * PAGE_BYTES)
    made = wire.actor.maker.make(wire.actor.seeds(prompt(15, PAGES)))
    os.pwrite(fd, made[SHARED_PAGES:].tobytes(), 0)
    room = wire.reserve(15)
    assert room.missing_pages == PAGES - SHARED_PAGES
    columns = {
        "first_page": [SHARED_PAGES],
        "pages": [room.missing_pages],
        "region_id": [region],
        "offset": [0],
    }
    os.ftruncate(fd, 2 * PAGE_BYTES + 100)
    sums = [xxhash.xxh3_64_intdigest(page.data) for page in made[SHARED_PAGES:]]
    with contextlib.suppress(grpc.RpcError):
        answer = wire.cache.Commit(commit_of(wire, room.reservation_id, checksums=sums, **columns))
        assert answer.stored_pages <= 2
    assert wire.actor.matched(15, PAGES) <= SHARED_PAGES + 2
    seen = wire.actor.read(15, PAGES)
    assert (seen.wrong_bytes, seen.corrupt) == (0, False)
    os.close(fd)


def test_a_region_that_shrinks_while_it_is_read(wire: Wire) -> None:
    """Truncated at any moment of a commit: right, or refused. Its memory is zero where it grew again."""
    for turn in range(12):
        talk = 1000 + 5 * turn
        fd, region = wire.region(PAGES * PAGE_BYTES)
        made = wire.actor.maker.make(wire.actor.seeds(prompt(talk, PAGES)))
        room = wire.reserve(talk)
        first, count = room.present_pages, room.missing_pages
        os.pwrite(fd, made[first:].tobytes(), 0)
        sums = [xxhash.xxh3_64_intdigest(page.data) for page in made[first:]]
        columns = {"first_page": [first], "pages": [count], "region_id": [region], "offset": [0]}
        future = wire.cache.Commit.future(commit_of(wire, room.reservation_id, checksums=sums, **columns))
        os.ftruncate(fd, PAGE_BYTES * (turn % 5))
        os.ftruncate(fd, PAGES * PAGE_BYTES)
        with contextlib.suppress(grpc.RpcError):
            future.result(10)
        seen = wire.actor.read(talk, PAGES)
        assert (seen.wrong_bytes, seen.corrupt) == (0, False)
        assert (
            wire.regions.Unregister(
                region_pb2.UnregisterRequest(session_id=wire.session_id, region_id=region), timeout=5
            )
            is not None
        )
        os.close(fd)


def test_streams_that_make_no_sense(wire: Wire) -> None:
    room = wire.reserve(20)
    opening = cache_pb2.WritePagesRequest(
        open=cache_pb2.WritePagesRequest.Open(
            session_id=wire.session_id, reservation_id=room.reservation_id, last=True
        )
    )
    first = room.present_pages

    def chunk(page: int, offset: int, size: int, checksum: int = 0) -> Any:
        return cache_pb2.WritePagesRequest(
            chunk=cache_pb2.PageChunk(page=page, offset=offset, data=b"x" * size, checksum=checksum)
        )

    for messages in (
        [],
        [chunk(first, 0, 10)],
        [opening, opening],
        [opening, chunk(first, 0, PAGE_BYTES - 1)],
        [opening, chunk(first, 0, PAGE_BYTES + 1)],
        [opening, chunk(first, 10, 10)],
        [opening, chunk(first, 0, 10), chunk(first + 1, 0, 10)],
        [opening, chunk(first + 1, 0, PAGE_BYTES, 1), chunk(first, 0, PAGE_BYTES, 1)],
        [opening, chunk(first, 0, 0)],
        [opening, chunk(first, 0, PAGE_BYTES, 12345)],  # not its checksum
        [opening, chunk(0, 0, PAGE_BYTES, 12345)],  # a page that is present
        [cache_pb2.WritePagesRequest()],
    ):
        with contextlib.suppress(grpc.RpcError):
            answer = wire.cache.WritePages(iter(messages), timeout=10)
            assert answer.stored_pages == 0, messages
        assert wire.actor.matched(20, PAGES) == SHARED_PAGES
    for lease in (0, 12345, (1 << 64) - 1):
        request = cache_pb2.ReadPagesRequest(session_id=wire.session_id, lease_id=lease, pages=1)
        wire.refused(wire.cache.ReadPages, request, Code.NOT_FOUND)
    with wire.actor.ns.fetch(prompt(0, PAGES)) as lease:
        for first, pages in ((PAGES, 1), (0, PAGES + 1), (1 << 31, 1), (0, (1 << 32) - 1)):
            request = cache_pb2.ReadPagesRequest(
                session_id=wire.session_id, lease_id=lease.lease_id, first_page=first, pages=pages
            )
            wire.refused(wire.cache.ReadPages, request, Code.INVALID_ARGUMENT, Code.NOT_FOUND)


def test_the_same_request_id_with_another_payload(wire: Wire) -> None:
    request = wire.name(cache_pb2.FetchRequest, request_id=b"once", prompt=prompt(0, PAGES), ttl_ms=20_000)
    first, second = wire.cache.Fetch(request), wire.cache.Fetch(request)
    assert first.lease_id == second.lease_id != 0
    request.prompt = prompt(0, 2)
    wire.refused(wire.cache.Fetch, request, Code.ALREADY_EXISTS)
    long = wire.name(cache_pb2.FetchRequest, request_id=b"x" * 65, prompt=prompt(0, 2))
    wire.refused(wire.cache.Fetch, long, Code.INVALID_ARGUMENT)
    release = cache_pb2.ReleaseLeasesRequest(session_id=wire.session_id, lease_ids=[first.lease_id])
    wire.cache.ReleaseLeases(release)
    wire.cache.ReleaseLeases(release)


def test_numbers_at_their_limits(wire: Wire) -> None:
    most = (1 << 64) - 1
    answer = wire.cache.Fetch(
        wire.name(cache_pb2.FetchRequest, prompt=prompt(0, PAGES), ttl_ms=most, wait_ms=most), timeout=10
    )
    assert 0 < answer.expires_in_ms <= 600_000, "no longer than the longest that may be asked for"
    room = wire.cache.Reserve(
        wire.name(cache_pb2.ReserveRequest, prompt=prompt(25, PAGES), ttl_ms=most, wait_ms=most), timeout=10
    )
    assert 0 < room.expires_in_ms <= 600_000
    for tier in (5, (1 << 32) - 1):
        request = wire.name(cache_pb2.PrefetchRequest, prompt=prompt(0, PAGES), tier=tier)
        wire.refused(wire.cache.Prefetch, request, Code.INVALID_ARGUMENT)
    wait = cache_pb2.WaitOperationRequest(session_id=wire.session_id, operation_id=most, wait_ms=most)
    wire.refused(wire.cache.WaitOperation, wait, Code.NOT_FOUND)
    renew = cache_pb2.RenewLeasesRequest(session_id=wire.session_id, lease_ids=[most, 0], ttl_ms=most)
    assert set(wire.cache.RenewLeases(renew).lost_lease_ids) == {most, 0}
    admin = admin_pb2.UnpinRequest(session_id=wire.session_id, pin_id=most)
    wire.channel.unary_unary(
        "/hicache.v1.AdminService/Unpin",
        request_serializer=admin_pb2.UnpinRequest.SerializeToString,
        response_deserializer=admin_pb2.UnpinResponse.FromString,
    )(admin, timeout=5)


def test_packets_that_make_no_sense_on_the_descriptor_socket(wire: Wire) -> None:
    path, fds = wire.link.fd_path, [os.memfd_create("e2e") for _ in range(6)]
    for data, sent in (
        (b"x", ()),
        (b"GET / HTTP/1.1\r\n\r\n", ()),
        (fdproto.MAGIC + b"\2\1", ()),  # a version to come
        (fdproto.MAGIC + b"\1\x63", ()),  # an op to come
        (fdproto.MAGIC + b"\1\2" + b"short", ()),
        (b"x" * 4096, ()),
        (fdproto.encode_request(fdproto.Put(wire.session_id)), ()),  # no descriptor
        (fdproto.encode_request(fdproto.Put(wire.session_id)), fds[:2]),
        (fdproto.encode_request(fdproto.Put(wire.session_id)), fds),  # more than are taken
    ):
        with fdproto.connect(path, 5.0) as sock:
            fdproto.send(sock, data, sent)
            packet = fdproto.receive(sock)
            packet.close_fds()
            with pytest.raises(HicacheError):
                fdproto.decode_answer(packet.data)
    directory = os.open("/", os.O_RDONLY)
    pipe = os.pipe()
    unix = socket.socket(socket.AF_UNIX)
    for fd in (directory, *pipe, unix.fileno()):
        with pytest.raises(HicacheError):
            exchange(path, fdproto.Put(wire.session_id), (fd,))
    unix.close()
    for fd in (directory, *pipe, *fds):
        os.close(fd)
    forged = region_pb2.RegisterRequest(session_id=wire.session_id, fd_token=secrets.token_bytes(16))
    wire.refused(wire.regions.Register, forged, Code.NOT_FOUND)


def test_what_the_client_itself_refuses_before_it_asks(wire: Wire) -> None:
    ns, client = wire.actor.ns, wire.actor.client
    for call in (
        lambda: ns.match([1 << 31]),
        lambda: ns.match(np.array([1.5, 2.5])),
        lambda: ns.match(np.array([1 << 40])),
        lambda: ns.match("tokens"),
        lambda: ns.fetch(prompt(0, 1), max_pages=0),
        lambda: ns.fetch(prompt(0, 1), ttl_ms=-1),
        lambda: ns.prefetch(prompt(0, 1), "tape"),
        lambda: client.namespace(model="", page_bytes=1),
        lambda: client.namespace(model="m", page_bytes=0),
        lambda: client.namespace(model="m", page_bytes=1, tenant="red"),  # type: ignore[call-arg]
    ):
        with pytest.raises((HicacheError, TypeError)) as refused:
            call()
        assert len(str(refused.value)) > 10
    with ns.reserve(prompt(30, PAGES)) as room:
        for page, data in (
            (0, b""),
            (SHARED_PAGES, b"short"),
            (PAGES, bytes(PAGE_BYTES)),
            (-1, bytes(PAGE_BYTES)),
        ):
            with pytest.raises(HicacheError):
                room.write(page, data)
    with ns.fetch(prompt(0, PAGES)) as lease, pytest.raises(HicacheError):
        lease.copy_into(np.empty((PAGES, PAGE_BYTES - 1), np.uint8))
    assert wire.actor.matched(30, PAGES) == SHARED_PAGES
