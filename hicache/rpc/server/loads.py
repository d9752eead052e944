"""Load, and what Commit says of paged KV: between messages and the runtime's words."""

from __future__ import annotations

from typing import Protocol

from hicache.rpc.pb import cache_pb2
from hicache.rpc.server.edge import wait_ms
from hicache.rpc.server.idempotency import payload_digest
from hicache.rpc.server.identity import Context
from hicache.rpc.server.sessions import Session
from hicache.runtime.loading import LoadAsk, LoadResult
from hicache.runtime.paged import PagedPlaces
from hicache.runtime.service import Service
from hicache.runtime.storing import Paged


class _Placed(Protocol):
    page_units: int
    places: bytes
    timeline_id: int
    counter: int


def _places(request: _Placed) -> PagedPlaces:
    return PagedPlaces(request.page_units, request.places, request.timeline_id, request.counter)


async def load(service: Service, session: Session, request: cache_pb2.LoadRequest) -> cache_pb2.LoadResponse:
    """Serve one Load; retried with the same request id it answers the same, and copies once."""
    ask = LoadAsk(
        request.lease_id,
        request.region_id,
        request.first_page,
        _places(request),
        request.first_layer,
        request.layers,
        verify=not request.unverified,
    )

    async def work() -> cache_pb2.LoadResponse:
        return load_response(await service.load(session.number, ask))

    answer: cache_pb2.LoadResponse = await session.answers.answer(
        request.request_id, lambda: payload_digest(request), work
    )
    return answer


def load_response(result: LoadResult) -> cache_pb2.LoadResponse:
    """What became of the pages."""
    return cache_pb2.LoadResponse(
        loaded_pages=result.loaded_pages,
        missing_pages=result.missing,
        corrupt_pages=result.corrupt,
        reason=result.reason,
        moved_bytes=result.moved_bytes,
    )


def paged(request: cache_pb2.CommitRequest, context: Context) -> Paged | None:
    """What a Commit says of places in paged KV; None where it says nothing."""
    said = request.page_units or request.places or request.timeline_id or request.counter
    if not (said or request.layers_wait_ms):
        return None
    wait = max(1, wait_ms(request.layers_wait_ms, context)) if request.layers_wait_ms else 0
    return Paged(_places(request), wait)
