"""SessionService: capabilities, namespaces, and the Attach stream that is a session's life line."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from hicache.errors import (
    ExhaustedError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from hicache.rpc.common import namespaces
from hicache.rpc.pb import session_pb2
from hicache.rpc.server import convert
from hicache.rpc.server.edge import Edge, session_call
from hicache.rpc.server.identity import Context, Credentials, Peer, local_peer
from hicache.rpc.server.onetime import OneTimeTokens
from hicache.rpc.server.sessions import Outbox, Session
from hicache.runtime.service import Service
from hicache.version import __version__

HELLO_TIMEOUT_S = 10.0
KEEP_ALIVES_MISSED = 3
MAX_NAME_CHARS = 128
STREAM_CHUNK_BYTES = 1 << 20


class SessionServicer:
    """Serves SessionService."""

    def __init__(self, service: Service, edge: Edge, hellos: OneTimeTokens[Credentials]) -> None:
        self.edge = edge
        self._service = service
        self._hellos = hellos

    # --- before a session

    async def GetCapabilities(
        self, request: session_pb2.GetCapabilitiesRequest, context: Context
    ) -> session_pb2.GetCapabilitiesResponse:
        """What this server offers; needs no session."""
        return await self.edge.guard("GetCapabilities", context, self._capabilities(context))

    async def _capabilities(self, context: Context) -> session_pb2.GetCapabilitiesResponse:
        options = self.edge.options
        self.edge.authenticator.require(context)
        local = self.edge.authenticator.is_local(context)
        return session_pb2.GetCapabilitiesResponse(
            server_version=__version__,
            server_epoch=self._service.epoch,
            tiers=[convert.tier_info(spec) for spec in self._service.specs],
            fd_socket=options.fd_socket_path if local else "",
            max_message_bytes=options.max_message_bytes,
            max_inflight_per_session=options.max_inflight_per_session,
            max_lease_ttl_ms=self._service.options.max_ttl_ms,
            idempotency_entries=options.idempotency_entries,
            idempotency_ttl_ms=options.idempotency_ttl_ms,
            stream_chunk_bytes=STREAM_CHUNK_BYTES,
            max_prompt_bytes=options.max_prompt_bytes,
            max_prompt_pages=options.max_prompt_pages,
            max_queries_per_call=options.max_queries_per_call,
            kv_memory=self._service.kv_memory if local else (),
            device_uuids=self._service.device_uuids if local else (),
            pool_shared=local and self._service.pool_shared,
        )

    # --- the life line

    async def Attach(self, _: Any, context: Context) -> None:
        """Serve one life line until it ends."""
        await self.edge.guard("Attach", context, self._attach(context))

    async def _attach(self, context: Context) -> None:
        hello = await self._hello(context)
        peer = self._peer(hello, context)
        sessions = self.edge.sessions
        session = sessions.resume(hello.resume_session_id, peer) if hello.resume_session_id else None
        resumed = session is not None
        if session is None:
            session = sessions.open(peer, hello.client_name[:MAX_NAME_CHARS])
        outbox = sessions.connect(session)
        try:
            await context.write(self._welcome(session, resumed=resumed))
            await self._converse(session, outbox, context)
        finally:
            sessions.disconnect(session, outbox)

    async def _hello(self, context: Context) -> session_pb2.Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await context.read()
        except TimeoutError as error:
            raise UnavailableError(f"no Hello within {HELLO_TIMEOUT_S:.0f} s") from error
        if first is grpc.aio.EOF or first.WhichOneof("event") != "hello":
            raise InvalidArgumentError("the first message of Attach is Hello")
        hello: session_pb2.Hello = first.hello
        return hello

    def _peer(self, hello: session_pb2.Hello, context: Context) -> Peer:
        if not self.edge.authenticator.is_local(context):
            return self.edge.authenticator.remote_peer(context)
        credentials = self._hellos.redeem(hello.token)
        if credentials is None:
            raise UnauthenticatedError(
                "Hello carries no valid token",
                hint=f"get one with HELLO on {self.edge.options.fd_socket_path}; it is good once",
            )
        return local_peer(self.edge.options, credentials)

    def _welcome(self, session: Session, *, resumed: bool) -> session_pb2.AttachResponse:
        welcome = session_pb2.Welcome(
            session_id=session.id,
            server_epoch=self._service.epoch,
            tenant=session.peer.tenant,
            resumed=resumed,
            keep_alive_ms=self.edge.options.keep_alive_ms,
            resume_window_ms=self.edge.options.resume_window_ms,
        )
        return session_pb2.AttachResponse(welcome=welcome)

    async def _converse(self, session: Session, outbox: Outbox, context: Context) -> None:
        """Read and write side by side; whichever ends first ends the other."""
        sides = [
            asyncio.ensure_future(self._listen(session, outbox, context)),
            asyncio.ensure_future(_speak(outbox, context)),
        ]
        try:
            done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            for side in done:
                side.result()
        finally:
            for side in sides:
                side.cancel()
            await asyncio.gather(*sides, return_exceptions=True)

    async def _listen(self, session: Session, outbox: Outbox, context: Context) -> None:
        patience_s = KEEP_ALIVES_MISSED * self.edge.options.keep_alive_ms / 1000
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    message = await context.read()
            except TimeoutError as error:
                raise UnavailableError(f"no keep-alive for {patience_s:.1f} s") from error
            if message is grpc.aio.EOF:
                return
            match message.WhichOneof("event"):
                case "keep_alive":
                    outbox.put(session_pb2.AttachResponse(keep_alive=session_pb2.KeepAlive()))
                case "region_released":
                    self.edge.sessions.region_released(session, message.region_released.region_id)
                case "goodbye":
                    self.edge.sessions.end(session, dead=False, why="goodbye")
                    return
                case _:
                    raise InvalidArgumentError("Attach takes one Hello, then keep-alives and releases")

    # --- namespaces

    @session_call
    async def OpenNamespace(
        self, session: Session, request: session_pb2.OpenNamespaceRequest, _: Context
    ) -> session_pb2.OpenNamespaceResponse:
        """Name a namespace; idempotent by nature."""
        spec = namespaces.from_message(request.namespace, session.peer.tenant)
        full = len(session.namespaces) >= self.edge.options.max_namespaces_per_tenant
        if full and spec not in session.namespaces.values():
            raise ExhaustedError(f"the tenant has {len(session.namespaces)} namespaces open")
        number, fingerprint = self._service.open_namespace(spec)
        session.namespaces[number] = spec
        return session_pb2.OpenNamespaceResponse(
            namespace_id=number, fingerprint=fingerprint, symbol_bytes=spec.symbol_bytes
        )


async def _speak(outbox: Outbox, context: Context) -> None:
    while (message := await outbox.get()) is not None:
        await context.write(message)
