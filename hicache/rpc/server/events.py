"""EventService: which pages can be read where, as a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hicache.errors import DeniedError, ExhaustedError, InvalidArgumentError
from hicache.rpc.common import namespaces
from hicache.rpc.pb import events_pb2
from hicache.rpc.server import convert
from hicache.rpc.server.edge import Edge
from hicache.rpc.server.identity import Context
from hicache.rpc.server.sessions import Session
from hicache.runtime.journal import Entry
from hicache.runtime.service import Service
from hicache.runtime.watchers import ALL_TENANTS, Kind, Watcher

Response = events_pb2.WatchEventsResponse
KINDS = {
    Kind.SURVEY: Response.SNAPSHOT,
    Kind.CAUGHT_UP: Response.SNAPSHOT_DONE,
    Kind.NEWS: Response.NEWS,
    Kind.PROGRESS: Response.PROGRESS,
    Kind.COMPACTED: Response.COMPACTED,
}
PROGRESS_MS = 10_000
MIN_PROGRESS_MS = 50
MAX_WATCHES_PER_SESSION = 16
ROOT = bytes(32)
FINGERPRINT_BYTES = 32


class EventServicer:
    """Serves EventService."""

    def __init__(self, service: Service, edge: Edge) -> None:
        self.edge = edge
        self._service = service
        self._watches: Counter[int] = Counter()  # by session

    async def WatchEvents(self, request: events_pb2.WatchEventsRequest, context: Context) -> None:
        """Serve one stream until its watcher leaves, falls behind, or the server stops."""
        await self.edge.guard("WatchEvents", context, self._watch(request, context))

    async def _watch(self, request: events_pb2.WatchEventsRequest, context: Context) -> None:
        session = self.edge.enter(request.session_id, context)
        session.inflight -= 1  # it lasts; what bounds watches is their own number
        self._admit(session, request)
        stale = request.start_revision > 0 and request.server_epoch != self._service.epoch
        tenant = ALL_TENANTS if request.all_tenants else session.peer.tenant
        watcher = self._service.watch(tenant, request.start_revision)
        self._watches[session.number] += 1
        try:
            await context.write(self._opened(request))
            if stale:
                await context.write(Response(kind=Response.COMPACTED, first_revision=watcher.journal.first))
                return
            await self._serve(session, watcher, _Columns(self._service, request), context)
        finally:
            self._service.unwatch(watcher)
            self._watches[session.number] -= 1
            if not self._watches[session.number]:
                del self._watches[session.number]

    def _admit(self, session: Session, request: events_pb2.WatchEventsRequest) -> None:
        if request.all_tenants and not session.peer.admin:
            raise DeniedError("watching all tenants is for administrators")
        for tier in request.tiers:
            convert.tier_index(self._service, tier)
        if any(len(each) != FINGERPRINT_BYTES for each in request.fingerprints):
            raise InvalidArgumentError(f"WatchEvents: a fingerprint has {FINGERPRINT_BYTES} bytes")
        if self._watches[session.number] >= MAX_WATCHES_PER_SESSION:
            raise ExhaustedError(f"the session has {MAX_WATCHES_PER_SESSION} watches")

    def _opened(self, request: events_pb2.WatchEventsRequest) -> Response:
        return Response(
            kind=Response.OPENED,
            server_epoch=self._service.epoch,
            tiers=[convert.tier_info(spec) for spec in self._service.specs],
            snapshot=not request.start_revision,
        )

    async def _serve(self, session: Session, watcher: Watcher, columns: _Columns, context: Context) -> None:
        while (part := await watcher.next(columns.quiet_s)) is not None:
            self.edge.sessions.find(session.id)  # it may have ended meanwhile
            if part.kind is Kind.COMPACTED:
                await context.write(Response(kind=Response.COMPACTED, first_revision=part.revision))
                return
            response = Response(kind=KINDS[part.kind], revision=part.revision)
            if part.entries:
                columns.fill(response, part.entries)
            await context.write(response)


class _Columns:
    """Turns entries into columns, for one stream with its filters."""

    def __init__(self, service: Service, request: events_pb2.WatchEventsRequest) -> None:
        self._service = service
        self._tiers = frozenset(request.tiers)
        self._fingerprints = frozenset(request.fingerprints)
        self._wanted: dict[int, bool] = {}  # namespaces that this stream has met
        progress_ms = request.progress_ms or PROGRESS_MS
        self.quiet_s = max(progress_ms, MIN_PROGRESS_MS) / 1000

    def fill(self, response: Response, entries: Iterable[Entry]) -> None:
        """Add what passes the filters; namespaces are described when they are first met."""
        parents: list[bytes] = []
        keys: list[bytes] = []
        symbols: list[bytes] = []
        for entry in entries:
            if (self._tiers and entry.tier not in self._tiers) or not self._wants(response, entry.namespace):
                continue
            response.namespace_id.append(entry.namespace)
            response.tier.append(entry.tier)
            response.stored.append(entry.stored)
            response.pages.append(len(entry.keys) // len(ROOT))
            parents.append(entry.parent or ROOT)
            keys.append(entry.keys)
            symbols.append(entry.symbols)
        response.parents = b"".join(parents)
        response.keys = b"".join(keys)
        response.symbols = b"".join(symbols)

    def _wants(self, response: Response, number: int) -> bool:
        known = self._wanted.get(number)
        if known is not None:
            return known
        spec, fingerprint = self._service.describe_namespace(number)
        wanted = not self._fingerprints or fingerprint in self._fingerprints
        self._wanted[number] = wanted
        if wanted:
            response.namespaces.append(
                events_pb2.WatchedNamespace(
                    namespace_id=number,
                    tenant=spec.tenant,
                    fingerprint=fingerprint,
                    symbol_bytes=spec.symbol_bytes,
                    namespace=namespaces.to_message(spec),
                )
            )
        return wanted
