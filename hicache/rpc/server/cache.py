"""CacheService: each method checks shapes and bounds, calls the service once, and translates the answer.

Match and Fetch are the hot path: one look-up of the session, one of the namespace, the prompt taken out of
the message once, columns set with one extend each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from hicache.errors import InvalidArgumentError
from hicache.rpc.pb import cache_pb2
from hicache.rpc.server import convert
from hicache.rpc.server.edge import Edge, session_call, ttl_ms, wait_ms
from hicache.rpc.server.idempotency import payload_digest
from hicache.rpc.server.identity import Context
from hicache.rpc.server.loads import load, paged
from hicache.rpc.server.many import fetch_many, leases
from hicache.rpc.server.sessions import Session
from hicache.rpc.server.writes import write_pages
from hicache.runtime.pages import ReserveAlong
from hicache.runtime.service import Service
from hicache.types import Ack, Pressure

CHUNK_BYTES = 1 << 20


class CacheServicer:
    """Serves CacheService."""

    def __init__(self, service: Service, edge: Edge) -> None:
        self.edge = edge
        self._service = service

    # --- look-up and leases

    @session_call
    async def Match(
        self, session: Session, request: cache_pb2.MatchRequest, _: Context
    ) -> cache_pb2.MatchResponse:
        """How much of a prompt is cached, and where."""
        prompt = self.edge.prompt(session, request.namespace_id, request.prompt)
        view = self._service.match(
            request.namespace_id,
            prompt,
            touch=request.touch,
            prefetch=request.prefetch,
            use=convert.use(request),
        )
        return convert.match_response(view)

    @session_call
    async def Fetch(
        self, session: Session, request: cache_pb2.FetchRequest, context: Context
    ) -> cache_pb2.FetchResponse:
        """Match, lease and promote."""
        raw = request.prompt
        prompt = self.edge.prompt(session, request.namespace_id, raw)
        wait, use = wait_ms(request.wait_ms, context), convert.use(request)
        along = ReserveAlong(request.reserve_missing, ttl_ms(request.reserve_ttl_ms))

        async def work() -> cache_pb2.FetchResponse:
            result = await self._service.fetch(
                session.number,
                request.namespace_id,
                prompt,
                max_pages=request.max_pages,
                ttl_ms=ttl_ms(request.ttl_ms),
                wait_ms=wait,
                use=use,
                reserve=along,
                device=request.device,
            )
            return convert.fetch_response(self._service, result)

        answer: cache_pb2.FetchResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request, raw), work
        )
        return answer

    @session_call
    async def FetchMany(
        self, session: Session, request: cache_pb2.FetchManyRequest, context: Context
    ) -> cache_pb2.FetchManyResponse:
        """Many Fetches, and what is to be released and renewed."""
        return await fetch_many(self._service, self.edge, session, request, context)

    @session_call
    async def RenewLeases(
        self, session: Session, request: cache_pb2.RenewLeasesRequest, _: Context
    ) -> cache_pb2.RenewLeasesResponse:
        """Give leases more time."""
        renewed = leases(request.lease_ids)
        result = await self._service.renew(session.number, renewed, ttl_ms(request.ttl_ms))
        return cache_pb2.RenewLeasesResponse(
            lost_lease_ids=result.lost, expires_in_ms=convert.expires_in(self._service, result.expires_ms)
        )

    @session_call
    async def ReleaseLeases(
        self, session: Session, request: cache_pb2.ReleaseLeasesRequest, _: Context
    ) -> cache_pb2.ReleaseLeasesResponse:
        """Give leases back."""
        self._service.release(session.number, leases(request.lease_ids))
        return cache_pb2.ReleaseLeasesResponse()

    @session_call
    async def ReportCorrupt(
        self, session: Session, request: cache_pb2.ReportCorruptRequest, _: Context
    ) -> cache_pb2.ReportCorruptResponse:
        """Look at pages again that a reader found bad."""
        lease, pages = request.lease_id, list(request.pages)

        async def work() -> cache_pb2.ReportCorruptResponse:
            found = await self._service.report_corrupt(session.number, lease, pages)
            return cache_pb2.ReportCorruptResponse(corrupt_pages=found)

        answer: cache_pb2.ReportCorruptResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request), work
        )
        return answer

    # --- moving pages

    @session_call
    async def Load(
        self, session: Session, request: cache_pb2.LoadRequest, _: Context
    ) -> cache_pb2.LoadResponse:
        """Leased pages into the session's paged KV."""
        return await load(self._service, session, request)

    @session_call
    async def Prefetch(
        self, session: Session, request: cache_pb2.PrefetchRequest, _: Context
    ) -> cache_pb2.PrefetchResponse:
        """Promote a prefix."""
        raw = request.prompt
        prompt = self.edge.prompt(session, request.namespace_id, raw)
        tier = convert.tier_index(self._service, request.tier)

        async def work() -> cache_pb2.PrefetchResponse:
            result = await self._service.prefetch(session.number, request.namespace_id, prompt, tier)
            return cache_pb2.PrefetchResponse(
                operation_id=result.operation,
                matched_pages=result.matched_pages,
                moving_pages=result.moving_pages,
            )

        answer: cache_pb2.PrefetchResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request, raw), work
        )
        return answer

    @session_call
    async def WaitOperation(
        self, session: Session, request: cache_pb2.WaitOperationRequest, context: Context
    ) -> cache_pb2.WaitOperationResponse:
        """Wait for an operation, no longer than asked."""
        wait = wait_ms(request.wait_ms, context)
        view = await self._service.wait_operation(session.number, request.operation_id, wait)
        return convert.operation_response(self._service, session.number, view)

    @session_call
    async def CancelOperation(
        self, session: Session, request: cache_pb2.CancelOperationRequest, _: Context
    ) -> cache_pb2.CancelOperationResponse:
        """Wait for it no longer."""
        self._service.cancel_operation(session.number, request.operation_id)
        return cache_pb2.CancelOperationResponse()

    # --- storing

    @session_call
    async def Reserve(
        self, session: Session, request: cache_pb2.ReserveRequest, context: Context
    ) -> cache_pb2.ReserveResponse:
        """Room for missing pages."""
        raw = request.prompt
        prompt = self.edge.prompt(session, request.namespace_id, raw)
        wait, use = wait_ms(request.wait_ms, context), convert.use(request)
        pressure = Pressure.DROP if request.drop_pressure else Pressure.WAIT

        async def work() -> cache_pb2.ReserveResponse:
            result = await self._service.reserve(
                session.number,
                request.namespace_id,
                prompt,
                ttl_ms=ttl_ms(request.ttl_ms),
                wait_ms=wait,
                pressure=pressure,
                use=use,
            )
            return convert.reserve_response(self._service, result)

        answer: cache_pb2.ReserveResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request, raw), work
        )
        return answer

    @session_call
    async def Commit(
        self, session: Session, request: cache_pb2.CommitRequest, context: Context
    ) -> cache_pb2.CommitResponse:
        """Copy pages in from the session's own regions."""
        pieces, source = convert.pieces(request)
        where = paged(request, context)
        more = {} if where is None else {"paged": where}

        async def work() -> cache_pb2.CommitResponse:
            result = await self._service.commit(
                session.number,
                request.reservation_id,
                pieces,
                source,
                checksums=list(request.checksums),
                ack=Ack.DURABLE if request.durable else Ack.VISIBLE,
                last=request.last,
                **more,
            )
            return convert.commit_response(result)

        answer: cache_pb2.CommitResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request), work
        )
        return answer

    @session_call
    async def Abort(
        self, session: Session, request: cache_pb2.AbortRequest, _: Context
    ) -> cache_pb2.AbortResponse:
        """Give a reservation back."""
        self._service.abort(session.number, request.reservation_id)
        return cache_pb2.AbortResponse()

    # --- bytes over gRPC

    @session_call
    async def ReadPages(
        self, session: Session, request: cache_pb2.ReadPagesRequest, context: Context
    ) -> None:
        """Stream leased pages. A write waits while the client is behind: at most a page is in memory."""
        number = request.first_page
        pages = self._service.read_pages(session.number, request.lease_id, number, request.pages)
        async for page, checksum in pages:
            view = memoryview(page)
            for offset in range(0, len(view), CHUNK_BYTES):
                data = bytes(view[offset : offset + CHUNK_BYTES])
                last = offset + CHUNK_BYTES >= len(view)
                chunk = cache_pb2.PageChunk(
                    page=number, offset=offset, data=data, checksum=checksum if last else 0
                )
                await context.write(chunk)
            number += 1

    async def WritePages(
        self, requests: AsyncIterator[cache_pb2.WritePagesRequest], context: Context
    ) -> cache_pb2.CommitResponse:
        """Take reserved pages as a stream, then commit them."""
        return await self.edge.guard("WritePages", context, self._write_pages(requests, context))

    async def _write_pages(
        self, requests: AsyncIterator[cache_pb2.WritePagesRequest], context: Context
    ) -> cache_pb2.CommitResponse:
        first = await anext(requests, None)
        if first is None or first.WhichOneof("event") != "open":
            raise InvalidArgumentError("WritePages: the first message is Open")
        session = self.edge.enter(first.open.session_id, context)
        try:
            return await write_pages(self._service, session, first.open, requests)
        finally:
            session.inflight -= 1
