"""Addresses and callers: locks, socket files, TLS, tokens, settings, and input made of random bytes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from server_kit import PAGE_TOKENS, Client, FakeService, failure, open_fds, run, serving, tokens

from hicache.errors import ConfigError
from hicache.rpc.pb import admin_pb2, cache_pb2, session_pb2
from hicache.rpc.server import ServerOptions, serve
from hicache.rpc.server.identity import certificate_name, read_tokens
from hicache.rpc.server.lock import SocketLock

BLUE, RED, ROOT = "blue-token-0123456789", "red-token-0123456789", "root-token-0123456789"


# --- socket files


def test_a_second_start_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            before = open_fds()
            with pytest.raises(ConfigError, match="pid"):
                await serve(FakeService(), house.options)
            assert open_fds() <= before + 1
            await house.client.attach()

    run(main())


LOCKER = """
import os, sys
from hicache.rpc.server.lock import SocketLock
SocketLock(sys.argv[1]).acquire()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def test_the_refusal_names_the_holder_and_its_death_frees_the_path(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    child = subprocess.Popen(
        [sys.executable, "-c", LOCKER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        pid = child.stdout.readline().strip()
        with pytest.raises(ConfigError, match=f"pid {pid}"):
            SocketLock(path).acquire()
        child.kill()
        child.wait()
        lock = SocketLock(path)
        lock.acquire()
        lock.release()
        lock.release()


def test_stale_sockets_are_removed_and_other_files_kept(tmp_path: Path) -> None:
    async def main() -> None:
        for name in ("s", "s.fd"):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(tmp_path / name))
        async with serving(tmp_path) as house:
            await house.client.attach()
        (tmp_path / "s").write_text("precious")
        with pytest.raises(ConfigError, match="not a socket"):
            async with serving(tmp_path):
                pass
        assert (tmp_path / "s").read_text() == "precious"

    run(main())


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="nowhere"):
            await serve(FakeService(), ServerOptions(socket_path=str(tmp_path / "nowhere" / "s")))

    run(main())


# --- settings


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "nowhere"),
        ({"socket_path": "/" + "x" * 120}, "107"),
        ({"socket_path": "/s", "socket_mode": 0o4600}, "mode"),
        ({"socket_path": "/s", "max_sessions": 0}, "max_sessions"),
        ({"socket_path": "/s", "resume_window_ms": -1}, "resume_window_ms"),
        ({"tcp_address": "127.0.0.1:0"}, "token_file"),
        ({"tcp_address": "127.0.0.1:0", "token_file": "t"}, "TLS"),
        ({"tcp_address": "0.0.0.0:0", "token_file": "t", "allow_plain_tcp": True}, "loopback"),
        ({"tcp_address": "example.org:1", "token_file": "t", "allow_plain_tcp": True}, "loopback"),
        ({"tcp_address": "[::]:1", "token_file": "t", "allow_plain_tcp": True}, "loopback"),
        ({"tcp_address": "127.0.0.1:0", "token_file": "t", "tls_cert": "c"}, "tls_key"),
        ({"tcp_address": "127.0.0.1:0", "tls_client_ca": "c"}, "tls_cert"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        ServerOptions(**fields)


def test_loopback_addresses_may_be_plain() -> None:
    for address in ("127.0.0.1:1", "[::1]:1", "localhost:1"):
        ServerOptions(tcp_address=address, token_file="t", allow_plain_tcp=True)


@pytest.mark.parametrize("text", ["", "# nothing\n", "blue\n", f"blue {BLUE} boss\n", "blue short\n"])
def test_token_files_that_cannot_work_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match="token_file"):
        read_tokens(str(path))
    with pytest.raises(ConfigError, match="token_file"):
        read_tokens(str(tmp_path / "missing"))


def test_a_token_file_others_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"blue {BLUE}  # the blue team\nred {RED}\nops {ROOT} admin\n")
    path.chmod(0o644)
    found = read_tokens(str(path))
    assert [(peer.tenant, peer.admin) for _, peer in found] == [
        ("blue", False),
        ("red", False),
        ("ops", True),
    ]
    assert "chmod" in caplog.text


# --- TCP


@contextlib.asynccontextmanager
async def on_tcp(tmp_path: Path, **fields: Any) -> AsyncIterator[tuple[str, FakeService]]:
    """A server on loopback TCP and a unix socket; its TCP address."""
    path = tmp_path / "tokens"
    path.write_text(f"blue {BLUE}\nred {RED}\nops {ROOT} admin\n")
    path.chmod(0o600)
    service = FakeService()
    settings_ = {"token_file": str(path), "tcp_address": "127.0.0.1:0"} | fields
    async with serving(tmp_path, service, **settings_) as house:
        (address,) = [each for each in house.server.addresses if not each.startswith("unix:")]
        yield address, service


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def test_plain_tcp_needs_tokens_on_every_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with (
            on_tcp(tmp_path, allow_plain_tcp=True) as (address, service),
            grpc.aio.insecure_channel(address) as channel,
        ):
            client = Client(channel)
            asked = session_pb2.GetCapabilitiesRequest()
            for metadata in (None, bearer("x" * 20), (("authorization", f"Basic {BLUE}"),)):
                error = await failure(client.session.GetCapabilities(asked, metadata=metadata))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                error = await failure(client.attach(metadata=metadata))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            answer = await client.session.GetCapabilities(asked, metadata=bearer(BLUE))
            assert answer.fd_socket == ""
            attached = await client.attach(metadata=bearer(BLUE))
            assert attached.welcome.tenant == "blue"
            request = cache_pb2.ReleaseLeasesRequest(session_id=attached.id)
            await client.cache.ReleaseLeases(request, metadata=bearer(BLUE))
            error = await failure(client.cache.ReleaseLeases(request))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            error = await failure(client.cache.ReleaseLeases(request, metadata=bearer(RED)))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            error = await failure(client.attach(resume=attached.id, metadata=bearer(RED)))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            attached.stream.cancel()
            assert (await client.attach(resume=attached.id, metadata=bearer(BLUE))).welcome.resumed
            assert len(service.called("release")) == 1

    run(main())
    assert "plain TCP" in caplog.text


def test_administrators_over_tcp_are_marked_tokens(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            on_tcp(tmp_path, allow_plain_tcp=True) as (address, _),
            grpc.aio.insecure_channel(address) as channel,
        ):
            client = Client(channel)
            for token, code in ((BLUE, grpc.StatusCode.PERMISSION_DENIED), (ROOT, grpc.StatusCode.OK)):
                attached = await client.attach(metadata=bearer(token))
                call = client.admin.Check(
                    admin_pb2.CheckRequest(session_id=attached.id), metadata=bearer(token)
                )
                assert await call.code() is code

    run(main())


def test_a_local_session_cannot_be_used_from_tcp(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "tokens"
        path.write_text(f"default {BLUE}\n")
        async with serving(
            tmp_path, token_file=str(path), tcp_address="127.0.0.1:0", allow_plain_tcp=True
        ) as house:
            attached = await house.client.attach()
            async with grpc.aio.insecure_channel(house.server.addresses[1]) as channel:
                call = Client(channel).cache.ReleaseLeases(
                    cache_pb2.ReleaseLeasesRequest(session_id=attached.id), metadata=bearer(BLUE)
                )
                assert (await failure(call)).code() is grpc.StatusCode.PERMISSION_DENIED

    run(main())


def test_probes_need_no_token_but_reflection_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            on_tcp(tmp_path, allow_plain_tcp=True) as (address, _),
            grpc.aio.insecure_channel(address) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            calls = stub.ServerReflectionInfo(iter([request]))
            assert (await failure(calls.read())).code() is grpc.StatusCode.UNAUTHENTICATED
            calls = stub.ServerReflectionInfo(iter([request]), metadata=bearer(RED))
            assert (await calls.read()).list_services_response.service

    run(main())


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with on_tcp(tmp_path, allow_plain_tcp=True) as (address, _):
            with pytest.raises(ConfigError, match="tcp_address"):
                async with serving(
                    tmp_path / "..",
                    token_file=str(tmp_path / "tokens"),
                    tcp_address=address,
                    allow_plain_tcp=True,
                ):
                    pass

    run(main())


def openssl(*words: str, cwd: Path) -> None:
    subprocess.run(["openssl", *words], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, server.pem, client.pem (CN=green) and their keys."""
    if shutil.which("openssl") is None:
        pytest.skip("certificates: needs the openssl program")
    folder = tmp_path_factory.mktemp("tls")
    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *ec, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test ca", cwd=folder)
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name, subject in (("server", "/CN=server"), ("client", "/CN=green")):
        openssl("req", *ec, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject, cwd=folder)
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext", "-days", "2")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing, cwd=folder)
    return folder


def channel_credentials(folder: Path, *, certificate: bool) -> grpc.ChannelCredentials:
    roots = (folder / "ca.pem").read_bytes()
    if not certificate:
        return grpc.ssl_channel_credentials(roots)
    key, chain = (folder / "client.key").read_bytes(), (folder / "client.pem").read_bytes()
    return grpc.ssl_channel_credentials(roots, key, chain)


def test_tokens_travel_over_tls(tmp_path: Path, certificates: Path) -> None:
    async def main() -> None:
        tls = {"tls_cert": str(certificates / "server.pem"), "tls_key": str(certificates / "server.key")}
        async with on_tcp(tmp_path, **tls) as (address, _):
            trusted = channel_credentials(certificates, certificate=False)
            async with grpc.aio.secure_channel(address, trusted) as channel:
                attached = await Client(channel).attach(metadata=bearer(RED))
                assert attached.welcome.tenant == "red"
            async with grpc.aio.insecure_channel(address) as channel:
                error = await failure(Client(channel).attach(metadata=bearer(RED)))
                assert error.code() is grpc.StatusCode.UNAVAILABLE

    run(main())


def test_a_client_certificate_names_its_tenant(tmp_path: Path, certificates: Path) -> None:
    async def main() -> None:
        tls = {
            "tls_cert": str(certificates / "server.pem"),
            "tls_key": str(certificates / "server.key"),
            "tls_client_ca": str(certificates / "ca.pem"),
            "token_file": "",
        }
        async with on_tcp(tmp_path, **tls) as (address, _):
            mine = channel_credentials(certificates, certificate=True)
            async with grpc.aio.secure_channel(address, mine) as channel:
                attached = await Client(channel).attach()
                assert attached.welcome.tenant == "green"
                error = await failure(
                    Client(channel).admin.Check(admin_pb2.CheckRequest(session_id=attached.id))
                )
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            nobody = channel_credentials(certificates, certificate=False)
            async with grpc.aio.secure_channel(address, nobody) as channel:
                assert (await failure(Client(channel).attach())).code() is grpc.StatusCode.UNAVAILABLE

    run(main())


def test_missing_certificates_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match="tls_cert"):
            async with on_tcp(tmp_path, tls_cert="/none", tls_key="/none"):
                pass

    run(main())


def test_names_in_certificates() -> None:
    ssl = {"transport_security_type": [b"ssl"]}
    assert certificate_name(ssl | {"x509_common_name": [b"a"]}) == "a"
    assert certificate_name(ssl | {"x509_common_name": [b""], "x509_subject_alternative_name": [b"b"]}) == "b"
    assert certificate_name({"x509_common_name": [b"a"]}) == ""
    assert certificate_name(ssl) == ""


# --- random input

METHODS = [
    f"/hicache.v1.{service}/{method}"
    for service, methods in {
        "SessionService": ("GetCapabilities", "OpenNamespace"),
        "RegionService": ("ListRegions", "Register", "Unregister"),
        "CacheService": (
            "Match",
            "Fetch",
            "Reserve",
            "Commit",
            "Abort",
            "Prefetch",
            "WaitOperation",
            "RenewLeases",
            "ReleaseLeases",
        ),
        "AdminService": ("Pin", "Evict", "Clear", "GetTree", "GetStats"),
    }.items()
    for method in methods
]
numbers = st.one_of(st.integers(0, 8), st.integers(0, (1 << 32) - 1))
long_numbers = st.one_of(st.integers(0, 8), st.integers(0, (1 << 64) - 1))


@st.composite
def requests(draw: st.DrawFn) -> Any:
    """A well-formed request of some method with arbitrary values."""
    prompts = st.binary(max_size=200).map(lambda raw: raw[: len(raw) // (4 * PAGE_TOKENS) * 4 * PAGE_TOKENS])
    kind = draw(st.sampled_from([cache_pb2.FetchRequest, cache_pb2.ReserveRequest, cache_pb2.CommitRequest]))
    values: dict[str, Any] = {"request_id": draw(st.binary(max_size=70))}
    if kind is cache_pb2.CommitRequest:
        values |= {name: draw(st.lists(numbers, max_size=3)) for name in ("first_page", "pages")}
        values |= {
            name: draw(st.lists(long_numbers, max_size=3)) for name in ("region_id", "offset", "checksums")
        }
    else:
        values |= {"namespace_id": draw(st.integers(0, 2)), "prompt": draw(prompts)}
        values |= {"ttl_ms": draw(long_numbers), "wait_ms": draw(long_numbers)}
    return kind, values


@settings(max_examples=15)
@given(
    raw=st.lists(st.tuples(st.sampled_from(METHODS), st.binary(max_size=300)), max_size=20),
    shaped=st.lists(requests(), max_size=10),
)
def test_random_requests_never_harm_the_server(
    tmp_path_factory: pytest.TempPathFactory, raw: list[tuple[str, bytes]], shaped: list[Any]
) -> None:
    async def main() -> None:
        async with serving(tmp_path_factory.mktemp("s")) as house:
            attached = await house.client.attach()
            await house.client.namespace(attached)
            for method, body in raw:
                for request in (body, b"\x0a\x10" + attached.id + body):
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await house.client.channel.unary_unary(method)(request, timeout=5)
            codes = set()
            for kind, values in shaped:
                request = kind(session_id=attached.id, **values)
                call = getattr(house.client.cache, kind.__name__.removesuffix("Request"))(request, timeout=5)
                codes.add(await call.code())
            assert grpc.StatusCode.INTERNAL not in codes
            await house.client.cache.Match(
                cache_pb2.MatchRequest(session_id=attached.id, namespace_id=1, prompt=tokens(8))
            )

    run(main())


def test_random_attach_messages_never_harm_the_server(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            for body in (b"", b"\xff" * 9, b"\x0a\x00", b"\x0a\x03\x0a\x01\xff", b"\x1a\x00"):
                stream = house.client.channel.stream_stream("/hicache.v1.SessionService/Attach")()
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await stream.write(body)
                    await stream.read()
                stream.cancel()
            await house.client.attach()

    run(main())
