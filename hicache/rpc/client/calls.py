"""Requests built and responses parsed: the only file that knows the messages of sessions, regions and the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hicache.errors import HicacheError
from hicache.rpc.client.results import (
    Capabilities,
    CommitResult,
    Extent,
    Grant,
    MatchResult,
    OperationResult,
    PoolInfo,
    PrefetchResult,
    RegionInfo,
    Renewed,
    Reserved,
    TierInfo,
    Welcome,
)
from hicache.rpc.common import namespaces
from hicache.rpc.common.columns import fixed64_columns
from hicache.rpc.pb import cache_pb2, region_pb2, session_pb2
from hicache.types import NO_USE, Namespace, Use

CHUNK_BYTES = 1 << 20
CHECKSUMS = cache_pb2.Extents.CHECKSUMS_FIELD_NUMBER
GENERATIONS = cache_pb2.Extents.GENERATIONS_FIELD_NUMBER
NO_LIMIT = 1 << 62  # the server did not name one


@dataclasses.dataclass(frozen=True, slots=True)
class Who:
    """What a namespaced call starts with."""

    session_id: bytes
    namespace_id: int
    request_id: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class MatchAsk:
    """What a caller asks of Match."""

    touch: bool
    prefetch: bool = False
    use: Use = NO_USE


@dataclasses.dataclass(frozen=True, slots=True)
class FetchAsk:
    """What a caller asks of Fetch; 0 as in FetchRequest."""

    max_pages: int
    ttl_ms: int
    wait_ms: int
    use: Use = NO_USE
    reserve: bool = False
    reserve_ttl_ms: int = 0
    device: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ReserveAsk:
    """What a caller asks of Reserve."""

    ttl_ms: int
    wait_ms: int
    drop_pressure: bool
    use: Use = NO_USE


@dataclasses.dataclass(frozen=True, slots=True)
class CommitAsk:
    """How a caller wants pages committed."""

    durable: bool
    last: bool
    verify: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive pages that lie next to each other in a region."""

    first_page: int
    pages: int
    region_id: int
    offset: int


# --- sessions


def hello(name: str, token: bytes, resume_session_id: bytes) -> session_pb2.AttachRequest:
    """The life line's first message."""
    return session_pb2.AttachRequest(
        hello=session_pb2.Hello(client_name=name, token=token, resume_session_id=resume_session_id)
    )


def keep_alive() -> session_pb2.AttachRequest:
    """A sign of life."""
    return session_pb2.AttachRequest(keep_alive=session_pb2.KeepAlive())


def goodbye() -> session_pb2.AttachRequest:
    """The last message: everything the session holds is released."""
    return session_pb2.AttachRequest(goodbye=session_pb2.Goodbye())


def region_released(region_id: int) -> session_pb2.AttachRequest:
    """Confirms that a retired region is no longer mapped."""
    return session_pb2.AttachRequest(region_released=session_pb2.RegionReleased(region_id=region_id))


def parse_capabilities(message: session_pb2.GetCapabilitiesResponse) -> Capabilities:
    """The server's capabilities."""
    return Capabilities(
        server_version=message.server_version,
        epoch=message.server_epoch,
        tiers=tuple(
            TierInfo(tier.name, tier.kind, tier.capacity_bytes, tier.durable, tier.client_readable)
            for tier in message.tiers
        ),
        fd_socket=message.fd_socket,
        max_message_bytes=message.max_message_bytes,
        max_lease_ttl_ms=message.max_lease_ttl_ms,
        chunk_bytes=message.stream_chunk_bytes or CHUNK_BYTES,
        max_prompt_bytes=message.max_prompt_bytes or NO_LIMIT,
        max_prompt_pages=message.max_prompt_pages or NO_LIMIT,
        max_queries_per_call=message.max_queries_per_call or 1,
        kv_memory=tuple(message.kv_memory),
        device_uuids=tuple(message.device_uuids),
        pool_shared=message.pool_shared,
    )


def parse_welcome(message: session_pb2.AttachResponse) -> Welcome:
    """The answer to Hello."""
    if message.WhichOneof("event") != "welcome":
        raise HicacheError("the server answered Hello with something else than Welcome")
    welcome = message.welcome
    return Welcome(
        welcome.session_id, welcome.server_epoch, welcome.tenant, welcome.resumed, welcome.keep_alive_ms
    )


def open_namespace(session_id: bytes, spec: Namespace) -> session_pb2.OpenNamespaceRequest:
    """Names a namespace. The tenant is the server's to say."""
    return session_pb2.OpenNamespaceRequest(
        session_id=session_id,
        namespace=namespaces.to_message(spec),
    )


# --- regions


def parse_arena_regions(message: region_pb2.ListRegionsResponse) -> list[RegionInfo]:
    """The arena regions of a listing, and those of a pool that are mapped as they are: host memory."""
    return [
        _region_info(region)
        for region in message.regions
        if region.kind == region_pb2.Region.ARENA
        or (region.kind == region_pb2.Region.POOL and not region.memory.device_uuid)
    ]


def parse_gpu_pools(message: region_pb2.ListRegionsResponse) -> list[PoolInfo]:
    """The regions of a listing that are on a GPU."""
    return [
        PoolInfo(
            _region_info(region),
            size_bytes=region.memory.size_bytes,
            handle=region.memory.cuda_ipc,
            device_uuid=region.memory.device_uuid,
        )
        for region in message.regions
        if region.memory.device_uuid
    ]


def _region_info(region: region_pb2.Region) -> RegionInfo:
    return RegionInfo(
        region_id=region.region_id,
        size_bytes=region.size_bytes,
        page_bytes=region.page_bytes,
        first_slot_offset=region.first_slot_offset,
        slot_stride=region.slot_stride,
        slots=region.slots,
        counted=region.kind == region_pb2.Region.ARENA,
    )


# --- look-up and leases


def match(who: Who, prompt: bytes, ask: MatchAsk) -> cache_pb2.MatchRequest:
    """How much of a prompt is cached."""
    return cache_pb2.MatchRequest(
        session_id=who.session_id,
        namespace_id=who.namespace_id,
        prompt=prompt,
        touch=ask.touch,
        prefetch=ask.prefetch,
        request_class=ask.use.cls,
        turn=ask.use.turn,
        cost_per_page=ask.use.cost,
    )


def parse_match(
    message: cache_pb2.MatchResponse, capabilities: Capabilities, page_tokens: int
) -> MatchResult:
    """The answer to Match."""
    return MatchResult(
        matched_pages=message.matched_pages,
        matched_tokens=message.matched_pages * page_tokens,
        run_pages=tuple(message.run_pages),
        run_tiers=tuple(capabilities.tier_name(tier) for tier in message.run_tier),
    )


def fetch(who: Who, prompt: bytes, ask: FetchAsk) -> cache_pb2.FetchRequest:
    """Match, lease, promote."""
    return cache_pb2.FetchRequest(
        session_id=who.session_id,
        request_id=who.request_id,
        namespace_id=who.namespace_id,
        prompt=prompt,
        max_pages=ask.max_pages,
        ttl_ms=ask.ttl_ms,
        wait_ms=ask.wait_ms,
        request_class=ask.use.cls,
        turn=ask.use.turn,
        cost_per_page=ask.use.cost,
        reserve_missing=ask.reserve,
        reserve_ttl_ms=ask.reserve_ttl_ms,
        device=ask.device,
    )


def parse_grant(message: cache_pb2.FetchResponse) -> Grant:
    """A lease as it stands. Raises HicacheError for columns that do not add up."""
    columns = message.extents
    extents = tuple(
        Extent(region_id, pages, offset, first_slot)
        for region_id, pages, offset, first_slot in zip(
            columns.region_id, columns.pages, columns.offset, columns.first_slot, strict=False
        )
    )
    checksums, generations = fixed64_columns(columns.SerializeToString(), CHECKSUMS, GENERATIONS)
    if extents:
        pages = sum(extent.pages for extent in extents)
        sizes = {pages, message.granted_pages, len(checksums), len(generations)}
        if len(sizes) != 1 or len(extents) != len(columns.pages) or not all(e.pages for e in extents):
            raise HicacheError(f"the server's extents do not add up to {message.granted_pages} pages")
    return Grant(
        lease=message.lease_id,
        matched_pages=message.matched_pages,
        granted_pages=message.granted_pages,
        expires_in_ms=message.expires_in_ms,
        operation=message.operation_id,
        tier_pages=tuple(message.tier_pages),
        pending_pages=message.pending_pages,
        pending_ms=message.pending_ms,
        extents=extents,
        checksums=checksums,
        generations=generations,
    )


def parse_renewed(message: cache_pb2.RenewLeasesResponse) -> Renewed:
    """The answer to RenewLeases."""
    return Renewed(frozenset(message.lost_lease_ids), message.expires_in_ms)


# --- storing


def reserve(who: Who, prompt: bytes, ask: ReserveAsk) -> cache_pb2.ReserveRequest:
    """Room for what is missing."""
    return cache_pb2.ReserveRequest(
        session_id=who.session_id,
        request_id=who.request_id,
        namespace_id=who.namespace_id,
        prompt=prompt,
        ttl_ms=ask.ttl_ms,
        wait_ms=ask.wait_ms,
        drop_pressure=ask.drop_pressure,
        request_class=ask.use.cls,
        turn=ask.use.turn,
        cost_per_page=ask.use.cost,
    )


def parse_reserved(message: cache_pb2.ReserveResponse) -> Reserved:
    """The answer to Reserve."""
    return Reserved(
        message.reservation_id, message.present_pages, message.missing_pages, message.expires_in_ms
    )


def commit(
    who: Who, reservation: int, pieces: Sequence[Piece], checksums: Sequence[int], ask: CommitAsk
) -> cache_pb2.CommitRequest:
    """Pages to copy out of the session's regions."""
    return cache_pb2.CommitRequest(
        session_id=who.session_id,
        request_id=who.request_id,
        reservation_id=reservation,
        first_page=[piece.first_page for piece in pieces],
        pages=[piece.pages for piece in pieces],
        region_id=[piece.region_id for piece in pieces],
        offset=[piece.offset for piece in pieces],
        checksums=checksums,
        durable=ask.durable,
        last=ask.last,
    )


def open_write(who: Who, reservation: int, ask: CommitAsk) -> cache_pb2.WritePagesRequest:
    """The first message of WritePages."""
    return cache_pb2.WritePagesRequest(
        open=cache_pb2.WritePagesRequest.Open(
            session_id=who.session_id,
            request_id=who.request_id,
            reservation_id=reservation,
            durable=ask.durable,
            last=ask.last,
        )
    )


def parse_commit(message: cache_pb2.CommitResponse) -> CommitResult:
    """The answer to Commit and WritePages."""
    return CommitResult(
        message.stored_pages,
        message.already_present_pages,
        message.durable_pages,
    )


# --- moving


def prefetch(who: Who, prompt: bytes, tier: int) -> cache_pb2.PrefetchRequest:
    """Promote without leasing."""
    return cache_pb2.PrefetchRequest(
        session_id=who.session_id,
        request_id=who.request_id,
        namespace_id=who.namespace_id,
        prompt=prompt,
        tier=tier,
    )


def parse_prefetch(message: cache_pb2.PrefetchResponse) -> PrefetchResult:
    """The answer to Prefetch."""
    return PrefetchResult(message.operation_id, message.matched_pages, message.moving_pages)


def parse_operation(message: cache_pb2.WaitOperationResponse) -> OperationResult:
    """How far an operation is; its lease, if it has one, is parsed apart."""
    return OperationResult(message.done, message.moved_pages, message.failed_pages)
