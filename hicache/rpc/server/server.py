"""The gRPC server around one Service, on the Service's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import grpc

from hicache import heap
from hicache.errors import ConfigError, HicacheError
from hicache.rpc.pb import (
    admin_pb2,
    admin_pb2_grpc,
    batch_pb2,
    batch_pb2_grpc,
    cache_pb2,
    cache_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    region_pb2,
    region_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from hicache.rpc.server.admin import AdminServicer
from hicache.rpc.server.attach import SessionServicer
from hicache.rpc.server.batch import BatchServicer
from hicache.rpc.server.cache import CacheServicer
from hicache.rpc.server.edge import Edge
from hicache.rpc.server.events import EventServicer
from hicache.rpc.server.fdsocket import FdSocket
from hicache.rpc.server.identity import Authenticator, Credentials
from hicache.rpc.server.lock import SocketLock, remove_stale_socket
from hicache.rpc.server.onetime import OneTimeTokens
from hicache.rpc.server.options import ServerOptions
from hicache.rpc.server.probes import Probes
from hicache.rpc.server.region import RegionServicer
from hicache.rpc.server.sessions import Sessions
from hicache.runtime.service import Service

log = logging.getLogger(__name__)

HELLO_TTL_S = 10.0
DESCRIPTOR_TTL_S = 30.0
MAX_HELLOS_PER_UID = 64
MAX_DESCRIPTORS_PER_SESSION = 64  # an engine's KV may lie in as many allocations as it has layers
SWEEP_S = 5.0
TIER_HEALTH = "hicache.tier."  # health services: that, and the tier's name
DEFAULT_GRACE_MS = 5_000
SERVICES = tuple(
    descriptor.services_by_name[name].full_name
    for descriptor, name in (
        (session_pb2.DESCRIPTOR, "SessionService"),
        (region_pb2.DESCRIPTOR, "RegionService"),
        (cache_pb2.DESCRIPTOR, "CacheService"),
        (batch_pb2.DESCRIPTOR, "BatchService"),
        (admin_pb2.DESCRIPTOR, "AdminService"),
        (events_pb2.DESCRIPTOR, "EventService"),
    )
)


class Server:
    """Serves a Service from ``start`` to ``stop``; make it and use it on the Service's event loop."""

    def __init__(self, service: Service, options: ServerOptions) -> None:
        loop = asyncio.get_running_loop()
        self._service = service
        self._options = options
        self._authenticator = Authenticator(options)
        self._sessions = Sessions(service, options)
        self._edge = Edge(
            self._sessions, self._authenticator, options, latencies=service.latencies, now=loop.time
        )
        self._hellos: OneTimeTokens[Credentials] = OneTimeTokens(
            now=loop.time, ttl_s=HELLO_TTL_S, per_owner=MAX_HELLOS_PER_UID, discard=lambda _: None
        )
        self._descriptors: OneTimeTokens[int] = OneTimeTokens(
            now=loop.time, ttl_s=DESCRIPTOR_TTL_S, per_owner=MAX_DESCRIPTORS_PER_SESSION, discard=os.close
        )
        self._sessions.on_end = self._descriptors.forget
        self._lock = SocketLock(options.socket_path) if options.socket_path else None
        self._fd_socket = FdSocket(service, self._sessions, self._hellos, self._descriptors)
        self._probes = Probes()
        self._server = self._build()
        self._draining: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._drained = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._stopped = False
        self._bound = False
        self.addresses: tuple[str, ...] = ()

    # --- life

    async def start(self) -> None:
        """Bind and serve. Raises ConfigError where an address cannot be had; nothing stays bound then."""
        heap.keep_freed(heap.MESSAGE_BYTES)
        try:
            self._bind()
            await self._server.start()
        except (HicacheError, RuntimeError, OSError):
            self._unbind()
            await self._server.stop(None)
            raise
        self._service.regions.on_retired = self._sessions.retire_region
        self._service.on_draining.append(self._begin_draining)
        self._service.on_tier.append(self._tell_health)
        for name in ("", *SERVICES):
            await self._probes.tell(name, well=True)
        for tier in self._service.stats().tiers:
            self._tell_health(tier.name, tier.state == "ok")
        self._sweep()
        log.info("serving on %s", ", ".join(self.addresses))

    async def stop(self, grace_ms: int = DEFAULT_GRACE_MS) -> None:
        """Refuse new calls, give those in flight the grace, end sessions, remove the sockets. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        await self._probes.end()
        self._sessions.drain(grace_ms)
        self._sessions.close_streams()
        await self._server.stop(grace_ms / 1000)
        self._sessions.end_all("the server stopped")
        self._unbind()
        log.info("stopped")

    def drain(self, grace_ms: int) -> None:
        """Begin to drain the service, once; ``wait_drained`` tells when that is done."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain(grace_ms))

    async def wait_drained(self) -> None:
        """Return when a drain that ``drain`` or an administrator began is done: time to ``stop``."""
        await self._drained.wait()

    async def _drain(self, grace_ms: int) -> None:
        try:
            await self._service.drain(grace_ms)
        except HicacheError as error:
            log.error("drain failed: %s", error)
        finally:
            self._drained.set()

    def _tell_health(self, tier: str, well: bool) -> None:  # noqa: FBT001
        """A tier is a health service of its own: the sidecar serves without it."""
        told = self._probes.tell(f"{TIER_HEALTH}{tier}", well=well)
        task = asyncio.get_running_loop().create_task(told)
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    def _begin_draining(self, grace_ms: int) -> None:
        """The service drains: no new sessions, tell those there are, look unwell to load balancers."""
        self._sessions.drain(grace_ms)
        self._unwell = asyncio.get_running_loop().create_task(self._probes.end())

    def _sweep(self) -> None:
        self._hellos.expire()
        self._descriptors.expire()
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    # --- addresses

    def _bind(self) -> None:
        addresses = []
        if self._lock is not None:
            self._lock.acquire()
            addresses.append(self._bind_unix())
        if self._options.tcp_address:
            addresses.append(self._bind_tcp())
        self.addresses = tuple(addresses)

    def _bind_unix(self) -> str:
        options = self._options
        for path in (options.socket_path, options.fd_socket_path):
            remove_stale_socket(path)
        try:
            with _umask(0o777 & ~options.socket_mode):
                self._server.add_insecure_port(f"unix:{options.socket_path}")
                self._bound = True
                self._fd_socket.start(options.fd_socket_path, options.socket_mode)
            Path(options.socket_path).chmod(options.socket_mode)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"socket_path: cannot bind {options.socket_path}: {error}") from error
        return f"unix:{options.socket_path}"

    def _bind_tcp(self) -> str:
        options = self._options
        host = options.tcp_address.rpartition(":")[0]
        try:
            if options.tls_cert:
                port = self._server.add_secure_port(options.tcp_address, _tls(options))
            else:
                log.warning(
                    "tcp_address %s is plain TCP: tokens and KV are readable on it", options.tcp_address
                )
                port = self._server.add_insecure_port(options.tcp_address)
        except RuntimeError as error:
            raise ConfigError(f"tcp_address: cannot bind {options.tcp_address}: {error}") from error
        return f"{host}:{port}"

    def _unbind(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._fd_socket.stop()
        self._hellos.clear()
        self._descriptors.clear()
        if self._lock is not None:
            if self._bound:
                Path(self._options.socket_path).unlink(missing_ok=True)
            self._lock.release()

    # --- what is served

    def _build(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._options.max_message_bytes),
                ("grpc.max_send_message_length", self._options.max_message_bytes),
                ("grpc.so_reuseport", 0),  # a second server must not share the port unnoticed
            ]
        )
        service, edge = self._service, self._edge
        session_pb2_grpc.add_SessionServiceServicer_to_server(
            SessionServicer(service, edge, self._hellos), server
        )
        region_pb2_grpc.add_RegionServiceServicer_to_server(
            RegionServicer(service, edge, self._descriptors), server
        )
        cache_pb2_grpc.add_CacheServiceServicer_to_server(CacheServicer(service, edge), server)
        batch_pb2_grpc.add_BatchServiceServicer_to_server(BatchServicer(service, edge), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(service, edge, self.drain), server)
        events_pb2_grpc.add_EventServiceServicer_to_server(EventServicer(service, edge), server)
        self._probes.register(server, SERVICES, self._authenticator)
        return server


async def serve(service: Service, options: ServerOptions) -> Server:
    """A server that has started. Raises ConfigError."""
    server = Server(service, options)
    await server.start()
    return server


def _tls(options: ServerOptions) -> grpc.ServerCredentials:
    try:
        key, cert = Path(options.tls_key).read_bytes(), Path(options.tls_cert).read_bytes()
        roots = Path(options.tls_client_ca).read_bytes() if options.tls_client_ca else None
    except OSError as error:
        raise ConfigError(f"tls_cert, tls_key or tls_client_ca: {error}") from error
    return grpc.ssl_server_credentials(
        [(key, cert)], root_certificates=roots, require_client_auth=roots is not None
    )


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
