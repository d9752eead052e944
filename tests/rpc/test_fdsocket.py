"""The descriptor socket: what passes, who may ask, and that nothing leaks or breaks."""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_kit import failure, open_fds, run, serving, until

from hicache.errors import (
    ERROR_BY_CODE,
    DeniedError,
    ErrorCode,
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
    StaleError,
    UnavailableError,
)
from hicache.rpc.common import fdproto
from hicache.rpc.pb import region_pb2
from hicache.rpc.server import fdsocket
from hicache.rpc.server.onetime import OneTimeTokens


@pytest.mark.parametrize(
    "request_", [fdproto.Hello(), fdproto.Get(b"s" * 16, (1 << 64) - 1), fdproto.Put(b"s" * 16)]
)
def test_requests_survive_the_wire(request_: fdproto.Request) -> None:
    assert fdproto.decode_request(fdproto.encode_request(request_)) == request_


@pytest.mark.parametrize("code", list(ErrorCode))
def test_errors_survive_the_wire(code: ErrorCode) -> None:
    error = ERROR_BY_CODE[code]("what happened", hint="do this")
    with pytest.raises(ERROR_BY_CODE[code], match=r"what happened \(do this\)"):
        fdproto.decode_answer(fdproto.encode_error(error))


def test_closed_and_foreign_answers_are_told_apart() -> None:
    with pytest.raises(UnavailableError):
        fdproto.decode_answer(b"")
    for packet in (b"HCFD", b"HCFD\x02\x80", b"HCFD\x01\x01", b"HCFD\x01\x81", b"HCFD\x01\x81\xff"):
        with pytest.raises(InvalidArgumentError):
            fdproto.decode_answer(packet)


def test_a_short_session_id_is_not_sent() -> None:
    with pytest.raises(InvalidArgumentError):
        fdproto.encode_request(fdproto.Put(b"short"))


def test_an_arena_is_handed_to_its_tenant(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            house.service.regions.add_arena("default", 5, b"pages")
            house.service.regions.add_arena("red", 6, b"others")
            attached = await house.client.attach()
            answer = await house.client.transact(fdproto.Get(attached.id, 5))
            (fd,) = answer.fds
            assert os.pread(fd, 5, 0) == b"pages"
            assert not os.get_inheritable(fd)
            os.close(fd)
            with pytest.raises(NotFoundError):
                await house.client.transact(fdproto.Get(attached.id, 6))
            with pytest.raises(StaleError):
                await house.client.transact(fdproto.Get(b"x" * 16, 5))
            listed = await house.client.region.ListRegions(
                region_pb2.ListRegionsRequest(session_id=attached.id)
            )
            assert [(region.region_id, region.kind) for region in listed.regions] == [
                (5, region_pb2.Region.ARENA)
            ]

    run(main())


def test_a_region_is_registered_listed_and_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            memory = os.memfd_create("client")
            os.ftruncate(memory, 8192)
            token = (await house.client.transact(fdproto.Put(attached.id), (memory,))).payload
            os.close(memory)
            request = region_pb2.RegisterRequest(session_id=attached.id, request_id=b"r", fd_token=token)
            registered = await house.client.region.Register(request)
            assert registered.size_bytes == 8192
            assert await house.client.region.Register(request) == registered
            again = region_pb2.RegisterRequest(session_id=attached.id, fd_token=token)
            assert (await failure(house.client.region.Register(again))).code() is grpc.StatusCode.NOT_FOUND
            mine = region_pb2.ListRegionsRequest(session_id=attached.id)
            (region,) = (await house.client.region.ListRegions(mine)).regions
            assert (region.kind, region.size_bytes) == (region_pb2.Region.CLIENT, 8192)
            for _ in range(2):  # unknown ones are fine
                await house.client.region.Unregister(
                    region_pb2.UnregisterRequest(session_id=attached.id, region_id=region.region_id)
                )
            assert not (await house.client.region.ListRegions(mine)).regions

    run(main())


def test_regions_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, max_regions_per_session=1) as house:
            attached = await house.client.attach()
            memory = os.memfd_create("client")
            codes = []
            for _ in range(2):
                token = (await house.client.transact(fdproto.Put(attached.id), (memory,))).payload
                call = house.client.region.Register(
                    region_pb2.RegisterRequest(session_id=attached.id, fd_token=token)
                )
                codes.append(await call.code())
            os.close(memory)
            assert codes == [grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED]

    run(main())


def test_a_descriptor_of_another_session_cannot_be_registered(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            mine, other = await house.client.attach(), await house.client.attach()
            memory = os.memfd_create("client")
            token = (await house.client.transact(fdproto.Put(mine.id), (memory,))).payload
            os.close(memory)
            stolen = region_pb2.RegisterRequest(session_id=other.id, fd_token=token)
            assert (await failure(house.client.region.Register(stolen))).code() is grpc.StatusCode.NOT_FOUND

    run(main())


THIEF = """
import sys
from hicache.errors import DeniedError
from hicache.rpc.common import fdproto
with fdproto.connect(sys.argv[1], 5.0) as sock:
    try:
        fdproto.transact(sock, fdproto.Get(bytes.fromhex(sys.argv[2]), 5))
    except DeniedError as error:
        print(error)
"""


def test_a_session_belongs_to_one_process(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            house.service.regions.add_arena("default", 5, b"pages")
            attached = await house.client.attach()
            command = [sys.executable, "-c", THIEF, house.options.fd_socket_path, attached.id.hex()]
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, check=True
            )
            assert "another process" in done.stdout

    run(main())


def not_regular_files(tmp_path: Path) -> dict[str, int]:
    (tmp_path / "f").write_text("x")
    read_end, write_end = os.pipe()
    os.close(write_end)
    return {
        "pipe": read_end,
        "directory": os.open(tmp_path, os.O_RDONLY),
        "device": os.open("/dev/null", os.O_RDWR),
        "socket": socket.socket(socket.AF_UNIX).detach(),
        "write-only": os.open(tmp_path / "f", os.O_WRONLY),
        "path-only": os.open(tmp_path / "f", os.O_PATH),
    }


def test_only_readable_files_and_memory_are_taken_and_nothing_leaks(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            bad = not_regular_files(tmp_path)
            before = open_fds()
            for name, fd in bad.items():
                with pytest.raises(InvalidArgumentError):
                    await house.client.transact(fdproto.Put(attached.id), (fd,))
                assert open_fds() <= before, name
            memory = os.memfd_create("client")
            before = open_fds()
            for fds in ((), (memory, memory), (memory,) * 20):
                with pytest.raises(InvalidArgumentError):
                    await house.client.transact(fdproto.Put(attached.id), fds)
            with pytest.raises(StaleError):
                await house.client.transact(fdproto.Put(b"x" * 16), (memory,))
            await house.client.transact(fdproto.Hello(), (memory, memory))
            await until(lambda: open_fds() <= before)
            for fd in (*bad.values(), memory):
                os.close(fd)

    run(main())


def test_outstanding_descriptors_are_bounded_and_end_with_the_session(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            attached = await house.client.attach()
            memory = os.memfd_create("client")
            before = open_fds()
            with pytest.raises(ExhaustedError):
                for _ in range(100):
                    await house.client.transact(fdproto.Put(attached.id), (memory,))
            assert before < open_fds() < before + 80
            attached.stream.cancel()
            house.server._sessions.end_all("test")
            await until(lambda: open_fds() <= before)
            os.close(memory)

    run(main())


def test_hellos_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            with pytest.raises(ExhaustedError):
                for _ in range(1000):
                    await house.client.transact(fdproto.Hello())

    run(main())


def test_one_time_tokens_expire_and_their_values_are_discarded() -> None:
    now = 0.0
    dropped: list[str] = []
    table: OneTimeTokens[str] = OneTimeTokens(now=lambda: now, ttl_s=10, per_owner=2, discard=dropped.append)
    first, second = table.issue("me", "a"), table.issue("me", "b")
    with pytest.raises(ExhaustedError):
        table.issue("me", "c")
    other = table.issue("you", "d")
    assert table.redeem(first, "you") is None
    assert table.redeem(first, "me") == "a"
    assert table.redeem(first, "me") is None
    now = 11.0
    assert table.redeem(second) is None
    assert table.redeem(other) is None
    assert dropped == ["b", "d"]
    table.issue("me", "e")
    table.clear()
    assert dropped == ["b", "d", "e"]
    assert len(table) == 0


def test_the_socket_is_private(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            for path in (house.options.socket_path, house.options.fd_socket_path):
                mode = Path(path).stat().st_mode
                assert stat.S_ISSOCK(mode)
                assert stat.S_IMODE(mode) == 0o600

    run(main())


def exchange_raw(path: str, packet: bytes, fds: tuple[int, ...] = ()) -> Any:
    with fdproto.connect(path, 5.0) as sock:
        fdproto.send(sock, packet, fds)
        return fdproto.receive(sock).data


@pytest.mark.parametrize("packet", [b"x", b"HCFD\x02\x01", b"HCFD\x01\x80", b"HCFD\x01\x02abc", b"y" * 5000])
def test_malformed_packets_get_an_error(tmp_path: Path, packet: bytes) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            answer = await asyncio.to_thread(exchange_raw, house.options.fd_socket_path, packet)
            with pytest.raises(InvalidArgumentError):
                fdproto.decode_answer(answer)
            await house.client.attach()

    run(main())


@settings(max_examples=10)
@given(packets=st.lists(st.binary(min_size=1, max_size=1500), min_size=1, max_size=10))
def test_random_packets_never_harm_the_server(
    tmp_path_factory: pytest.TempPathFactory, packets: list[bytes]
) -> None:
    async def main() -> None:
        async with serving(tmp_path_factory.mktemp("s")) as house:
            path = house.options.fd_socket_path
            for packet in packets:
                await asyncio.to_thread(exchange_raw, path, packet)
                await asyncio.to_thread(exchange_raw, path, b"HCFD\x01" + packet[:100])
            await house.client.attach()

    run(main())


def test_a_peer_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            before = open_fds()
            sock = fdproto.connect(house.options.fd_socket_path, 0.2)
            with pytest.raises(OSError):  # a full queue, or a closed peer
                for _ in range(100_000):
                    await asyncio.to_thread(fdproto.send, sock, b"HCFD\x01\x01")
            sock.close()
            await until(lambda: open_fds() <= before)
            with pytest.raises(StaleError):
                await house.client.transact(fdproto.Put(b"x" * 16))

    run(main())


def test_descriptors_sent_with_nothing_are_closed(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as house:
            memory = os.memfd_create("client")
            before = open_fds()
            with fdproto.connect(house.options.fd_socket_path, 5.0) as sock:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))]
                sock.sendmsg([b""], rights)
                await until(lambda: len(house.server._fd_socket._open) == 0)
            await until(lambda: open_fds() <= before)
            os.close(memory)

    run(main())


def test_another_user_is_denied() -> None:
    from hicache.rpc.server.identity import Credentials, local_peer
    from hicache.rpc.server.options import ServerOptions

    options = ServerOptions(socket_path="/s", tenants={4242: "blue"})
    assert local_peer(options, Credentials(1, 4242)).tenant == "blue"
    assert not local_peer(options, Credentials(1, 4242)).admin
    assert local_peer(options, Credentials(1, os.geteuid())).admin
    with pytest.raises(DeniedError):
        local_peer(options, Credentials(1, 4243))


def test_connections_of_one_user_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fdsocket, "MAX_CONNECTIONS_PER_UID", 2)

    async def main() -> None:
        async with serving(tmp_path) as house:
            path = house.options.fd_socket_path
            held = [fdproto.connect(path, 1.0) for _ in range(2)]
            await until(lambda: len(house.server._fd_socket._open) == 2)
            with pytest.raises((UnavailableError, OSError)):
                await house.client.transact(fdproto.Hello())
            for sock in held:
                sock.close()
            await until(lambda: not house.server._fd_socket._open)
            await house.client.transact(fdproto.Hello())

    run(main())


def test_idle_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fdsocket, "IDLE_S", 0.05)

    async def main() -> None:
        async with serving(tmp_path) as house:
            with fdproto.connect(house.options.fd_socket_path, 5.0) as sock:
                packet = await asyncio.to_thread(fdproto.receive, sock)
                assert not packet.data

    run(main())


def test_without_descriptors_accepting_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fdsocket, "ACCEPT_PAUSE_S", 0.05)

    async def main() -> None:
        async with serving(tmp_path) as house:
            listening = house.server._fd_socket._listener
            attempts = 0

            class Full:
                """A listener whose process has no descriptor left, once."""

                def fileno(self) -> int:
                    return listening.fileno()

                def accept(self) -> Any:
                    nonlocal attempts
                    attempts += 1
                    if attempts == 1:
                        raise OSError(errno.EMFILE, "too many open files")
                    return listening.accept()

                def close(self) -> None:
                    listening.close()

            monkeypatch.setattr(house.server._fd_socket, "_listener", Full())
            await house.client.transact(fdproto.Hello())
            assert attempts == 2

    run(main())
