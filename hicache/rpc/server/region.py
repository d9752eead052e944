"""RegionService: the arenas that a session may map, and the regions it registers."""

from __future__ import annotations

import os
import stat

from hicache.errors import ExhaustedError, InvalidArgumentError, NotFoundError, UnsupportedError
from hicache.rpc.pb import region_pb2
from hicache.rpc.server.edge import Edge, session_call
from hicache.rpc.server.idempotency import payload_digest
from hicache.rpc.server.identity import Context
from hicache.rpc.server.kv import paged_kv, put_memory
from hicache.rpc.server.onetime import OneTimeTokens
from hicache.rpc.server.sessions import Session
from hicache.runtime.regions import ArenaInfo, RegionInfo, RegionKind
from hicache.runtime.service import Service

KINDS = {
    RegionKind.CLIENT: region_pb2.Region.CLIENT,
    RegionKind.KV: region_pb2.Region.KV,
    RegionKind.TIMELINE: region_pb2.Region.TIMELINE,
}


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
        arenas = self._service.regions.arenas(session.peer.tenant)
        # who is told of a pool's handle may map it without asking again: it is to confirm when the segment retires
        session.mapped.update(arena.region_id for arena in arenas if arena.memory is not None)
        regions = [_arena(arena) for arena in arenas]
        regions += [
            region_pb2.Region(region_id=info.region_id, kind=KINDS[info.kind], size_bytes=info.size_bytes)
            for info in session.regions.values()
        ]
        return region_pb2.ListRegionsResponse(regions=regions)

    @session_call
    async def Register(
        self, session: Session, request: region_pb2.RegisterRequest, _: Context
    ) -> region_pb2.RegisterResponse:
        """Register memory whose descriptors were sent before, or have a timeline made."""

        async def work() -> region_pb2.RegisterResponse:
            session.registering += 1
            try:
                self._check_room(session)
                info = await self._register(session, request)
                session.regions[info.region_id] = info
            finally:
                session.registering -= 1
            return region_pb2.RegisterResponse(region_id=info.region_id, size_bytes=info.size_bytes)

        answer: region_pb2.RegisterResponse = await session.answers.answer(
            request.request_id, lambda: payload_digest(request), work
        )
        return answer

    def _check_room(self, session: Session) -> None:
        regions = len(session.regions) + session.registering
        if regions > self.edge.options.max_regions_per_session:
            raise ExhaustedError(
                f"the session has {regions - 1} regions", hint="unregister those no longer used"
            )

    async def _register(self, session: Session, request: region_pb2.RegisterRequest) -> RegionInfo:
        source = request.WhichOneof("source")
        if source is not None and source != "fd_token" and session.peer.pid <= 0:
            raise UnsupportedError(
                "paged KV and timelines are for sessions of this host", hint="attach over the unix socket"
            )
        if source == "kv":
            kv = paged_kv(request.kv, lambda token: self._redeem(token, session))
            return await self._service.register_kv(session.number, kv)
        if source == "timeline":
            return self._service.make_timeline(session.number, request.timeline.counters)
        fd = self._redeem(request.fd_token, session)
        if fd is None:
            raise NotFoundError("the fd token is unknown, used or expired", hint="PUT the descriptor again")
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise InvalidArgumentError("pages are copied from a memfd or a regular file only")
        return self._service.regions.register(session.number, fd)

    def _redeem(self, token: bytes, session: Session) -> int | None:
        return self._descriptors.redeem(token, session.number)

    @session_call
    async def Unregister(
        self, session: Session, request: region_pb2.UnregisterRequest, _: Context
    ) -> region_pb2.UnregisterResponse:
        """Forget a region; unknown ones are fine."""
        info = session.regions.pop(request.region_id, None)
        if info is None or info.kind is not RegionKind.CLIENT:  # one that is being closed is waited for again
            await self._service.unregister_kv(session.number, request.region_id)
        else:
            self._service.regions.unregister(session.number, request.region_id)
        return region_pb2.UnregisterResponse()


def _arena(arena: ArenaInfo) -> region_pb2.Region:
    """A segment of ours that a client may map: of the host tier, or of a device's pool."""
    region = region_pb2.Region(
        region_id=arena.region_id,
        kind=region_pb2.Region.ARENA,
        size_bytes=arena.size_bytes,
        page_bytes=arena.page_bytes,
        first_slot_offset=arena.first_slot_offset,
        slot_stride=arena.slot_stride,
        slots=arena.slots,
    )
    if arena.memory is not None:
        region.kind = region_pb2.Region.POOL
        put_memory(region.memory, arena.memory)
    return region
