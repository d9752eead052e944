"""RegionService: the arenas that a session may map, and the regions it registers."""

from __future__ import annotations

from hicache.errors import ExhaustedError, NotFoundError
from hicache.rpc.pb import region_pb2
from hicache.rpc.server.edge import Edge, session_call
from hicache.rpc.server.idempotency import payload_digest
from hicache.rpc.server.identity import Context
from hicache.rpc.server.onetime import OneTimeTokens
from hicache.rpc.server.sessions import Session
from hicache.runtime.service import Service


class RegionServicer:
    """Serves RegionService. ``descriptors`` holds what arrived over the descriptor socket."""

    def __init__(self, service: Service, edge: Edge, descriptors: OneTimeTokens[int]) -> None:
        self.edge = edge
        self._service = service
        self._descriptors = descriptors

    @session_call
    async def ListRegions(
        self, session: Session, _request: region_pb2.ListRegionsRequest, _: Context
    ) -> region_pb2.ListRegionsResponse:
        """The tenant's arenas and the session's own regions."""
        regions = [
            region_pb2.Region(
                region_id=arena.region_id,
                kind=region_pb2.Region.ARENA,
                size_bytes=arena.size_bytes,
                page_bytes=arena.page_bytes,
                first_slot_offset=arena.first_slot_offset,
                slot_stride=arena.slot_stride,
                slots=arena.slots,
            )
            for arena in self._service.regions.arenas(session.peer.tenant)
        ]
        regions += [
            region_pb2.Region(
                region_id=info.region_id, kind=region_pb2.Region.CLIENT, size_bytes=info.size_bytes
            )
            for info in session.regions.values()
        ]
        return region_pb2.ListRegionsResponse(regions=regions)

    @session_call
    async def Register(
        self, session: Session, request: region_pb2.RegisterRequest, _: Context
    ) -> region_pb2.RegisterResponse:
        """Register the region whose descriptor was sent before."""

        async def work() -> region_pb2.RegisterResponse:
            if len(session.regions) >= self.edge.options.max_regions_per_session:
                raise ExhaustedError(
                    f"the session has {len(session.regions)} regions", hint="unregister those no longer used"
                )
            fd = self._descriptors.redeem(request.fd_token, session.number)
            if fd is None:
                raise NotFoundError(
                    "the fd token is unknown, used or expired", hint="PUT the descriptor again"
                )
            info = self._service.regions.register(session.number, fd)
            session.regions[info.region_id] = info
            return region_pb2.RegisterResponse(region_id=info.region_id, size_bytes=info.size_bytes)

        answer: region_pb2.RegisterResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request), work
        )
        return answer

    @session_call
    async def Unregister(
        self, session: Session, request: region_pb2.UnregisterRequest, _: Context
    ) -> region_pb2.UnregisterResponse:
        """Forget a region; unknown ones are fine."""
        if session.regions.pop(request.region_id, None) is not None:
            self._service.regions.unregister(session.number, request.region_id)
        return region_pb2.UnregisterResponse()
