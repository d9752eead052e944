"""AdminService: operators' calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hicache.errors import InvalidArgumentError, NotFoundError, ViolationError
from hicache.rpc.pb import admin_pb2
from hicache.rpc.server import convert
from hicache.rpc.server.edge import Edge, admin_call, ttl_ms
from hicache.rpc.server.idempotency import payload_digest
from hicache.rpc.server.identity import Context
from hicache.rpc.server.sessions import Session
from hicache.rpc.server.stats import stats_response
from hicache.runtime.service import Service

DEFAULT_TREE_NODES = 1_000
MAX_TREE_NODES = 50_000
MAX_GRACE_MS = 3_600_000


class AdminServicer:
    """Serves AdminService. ``drain`` begins to drain the server and returns at once."""

    def __init__(self, service: Service, edge: Edge, drain: Callable[[int], None]) -> None:
        self.edge = edge
        self._service = service
        self._drain = drain

    @admin_call
    async def Pin(self, session: Session, request: admin_pb2.PinRequest, _: Context) -> admin_pb2.PinResponse:
        """Keep a prefix in a tier."""
        raw = request.prompt
        prompt = self.edge.prompt(session, request.namespace_id, raw)
        tier = convert.tier_index(self._service, request.tier)

        async def work() -> admin_pb2.PinResponse:
            result = await self._service.pin(
                request.namespace_id, prompt, tier, ttl_ms=ttl_ms(request.ttl_ms)
            )
            return admin_pb2.PinResponse(pin_id=result.pin, pages=result.pages)

        answer: admin_pb2.PinResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request, raw), work
        )
        return answer

    @admin_call
    async def Unpin(
        self, _session: Session, request: admin_pb2.UnpinRequest, _: Context
    ) -> admin_pb2.UnpinResponse:
        """Let it go again."""
        await self._service.unpin(request.pin_id)
        return admin_pb2.UnpinResponse()

    @admin_call
    async def Evict(
        self, session: Session, request: admin_pb2.EvictRequest, _: Context
    ) -> admin_pb2.EvictResponse:
        """Make a prefix and what follows it leave a tier, or all."""
        raw = request.prompt
        prompt = self.edge.prompt(session, request.namespace_id, raw)
        tier = -1 if request.everywhere else convert.tier_index(self._service, request.tier)

        async def work() -> admin_pb2.EvictResponse:
            result = await self._service.evict(request.namespace_id, prompt, tier)
            return admin_pb2.EvictResponse(pages=result.pages, kept_pages=result.kept_pages)

        answer: admin_pb2.EvictResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request, raw), work
        )
        return answer

    @admin_call
    async def Clear(
        self, session: Session, request: admin_pb2.ClearRequest, _: Context
    ) -> admin_pb2.ClearResponse:
        """Drop everything of a namespace, or of all."""
        if request.all_namespaces == bool(request.namespace_id):
            raise InvalidArgumentError("Clear: either a namespace_id or all_namespaces")
        if request.namespace_id and request.namespace_id not in session.namespaces:
            raise NotFoundError(
                f"namespace {request.namespace_id} is not open", hint="call OpenNamespace first"
            )

        async def work() -> admin_pb2.ClearResponse:
            result = await self._service.clear(request.namespace_id)
            return admin_pb2.ClearResponse(pages=result.pages, kept_pages=result.kept_pages)

        answer: admin_pb2.ClearResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request), work
        )
        return answer

    @admin_call
    async def GetStats(
        self, _session: Session, _request: admin_pb2.GetStatsRequest, _: Context
    ) -> admin_pb2.GetStatsResponse:
        """Counters and gauges."""
        return stats_response(self._service.stats())

    @admin_call
    async def GetTree(
        self, _session: Session, request: admin_pb2.GetTreeRequest, _: Context
    ) -> admin_pb2.GetTreeResponse:
        """The top of the tree."""
        if request.namespace_id and not self.edge.sessions.knows_namespace(request.namespace_id):
            raise NotFoundError(f"namespace {request.namespace_id} is not open")
        limit = min(request.max_nodes or DEFAULT_TREE_NODES, MAX_TREE_NODES)
        nodes, omitted = self._service.tree_view(request.namespace_id, limit)
        return admin_pb2.GetTreeResponse(nodes=map(convert.tree_node, nodes), omitted_nodes=omitted)

    @admin_call
    async def Check(
        self, _session: Session, _request: admin_pb2.CheckRequest, _: Context
    ) -> admin_pb2.CheckResponse:
        """Check the engine's invariants."""
        try:
            self._service.check()
        except ViolationError as violation:
            return admin_pb2.CheckResponse(ok=False, problem=str(violation), action_digest=self._digest())
        return admin_pb2.CheckResponse(ok=True, action_digest=self._digest())

    @admin_call
    async def GetAdvice(
        self, _session: Session, _request: admin_pb2.GetAdviceRequest, _: Context
    ) -> admin_pb2.GetAdviceResponse:
        """What other sizes and policies would have done."""
        found = await self._service.advice()
        return admin_pb2.GetAdviceResponse(
            uses=found.uses,
            rate=found.rate,
            span_ms=found.span_ms,
            unbounded=found.unbounded,
            sizes=[admin_pb2.SizeAdvice(**dataclasses.asdict(each)) for each in found.sizes],
            policies=[admin_pb2.PolicyAdvice(**dataclasses.asdict(each)) for each in found.policies],
        )

    def _digest(self) -> str:
        return str(self._service.action_digest())

    @admin_call
    async def Drain(
        self, _session: Session, request: admin_pb2.DrainRequest, _: Context
    ) -> admin_pb2.DrainResponse:
        """Begin to stop."""
        self._drain(min(request.grace_ms, MAX_GRACE_MS))
        return admin_pb2.DrainResponse()
