"""Between messages and the engine's words. No decisions, no checks but those of shape."""

from __future__ import annotations

from hicache.engine import MatchView, NodeView, OperationView, actions
from hicache.errors import CorruptError, InvalidArgumentError
from hicache.keys import validate_use
from hicache.rpc.common.columns import packed_fixed64
from hicache.rpc.pb import admin_pb2, cache_pb2, session_pb2
from hicache.runtime.service import Service
from hicache.types import NO_USE, TierSpec, Use

MAX_U32 = (1 << 32) - 1
CHECKSUMS = cache_pb2.Extents.CHECKSUMS_FIELD_NUMBER
GENERATIONS = cache_pb2.Extents.GENERATIONS_FIELD_NUMBER
MAX_OFFSET = 1 << 62


def tier_info(spec: TierSpec) -> session_pb2.TierInfo:
    """A tier as clients see it."""
    return session_pb2.TierInfo(
        name=spec.name,
        kind=spec.kind.value,
        capacity_bytes=spec.capacity_bytes,
        durable=spec.durable,
        client_readable=spec.client_readable,
    )


def match_response(view: MatchView) -> cache_pb2.MatchResponse:
    """How much of a prompt is cached."""
    return cache_pb2.MatchResponse(matched_pages=view.pages, run_pages=view.run_pages, run_tier=view.run_tier)


def fetch_response(service: Service, result: actions.FetchResult) -> cache_pb2.FetchResponse:
    """A lease as it stands."""
    message = cache_pb2.FetchResponse()
    put_fetch(message, service, result)
    return message


def put_fetch(message: cache_pb2.FetchResponse, service: Service, result: actions.FetchResult) -> None:
    """Fill a message in with a lease as it stands: in place, since columns are not copied into their message then."""
    columns = service.extents(result)
    if columns.pages:
        extents = message.extents
        extents.pages.extend(columns.pages)
        extents.region_id.extend(columns.region_id)
        extents.offset.extend(columns.offset)
        extents.first_slot.extend(columns.first_slot)
        checksums = packed_fixed64(CHECKSUMS, columns.checksums)
        extents.MergeFromString(checksums + packed_fixed64(GENERATIONS, columns.generations))
    message.lease_id = result.lease
    message.matched_pages = result.matched_pages
    message.granted_pages = result.granted_pages
    message.expires_in_ms = expires_in(service, result.expires_ms)
    message.tier_pages.extend(result.tier_pages)
    if result.operation:
        message.operation_id = result.operation
        message.pending_pages, message.pending_ms = service.pending(result)
    if result.reserved is not None:
        message.reserved.CopyFrom(reserve_response(service, result.reserved))


def reserve_response(service: Service, result: actions.ReserveResult) -> cache_pb2.ReserveResponse:
    """Room for what is missing."""
    return cache_pb2.ReserveResponse(
        reservation_id=result.reservation,
        present_pages=result.present_pages,
        missing_pages=result.missing_pages,
        expires_in_ms=expires_in(service, result.expires_ms),
    )


def use(
    request: cache_pb2.MatchRequest
    | cache_pb2.FetchRequest
    | cache_pb2.FetchQuery
    | cache_pb2.ReserveRequest,
) -> Use:
    """What a call says of its request. Raises InvalidArgumentError."""
    said = Use(request.request_class, request.turn, request.cost_per_page)
    return validate_use(said) if said != NO_USE else NO_USE


def expires_in(service: Service, expires_ms: int) -> int:
    """Milliseconds until a moment of the service's clock; 0 where it is past or there is none."""
    now_ms: int = service.now_ms()
    return max(0, expires_ms - now_ms)


def tier_index(service: Service, tier: int) -> int:
    """A tier that there is. Raises InvalidArgumentError."""
    if tier >= len(service.specs):
        raise InvalidArgumentError(f"tier {tier} does not exist, there are {len(service.specs)}")
    return tier


def operation_response(
    service: Service, session: int, view: OperationView
) -> cache_pb2.WaitOperationResponse:
    """How far an operation is; for a Fetch's, with its lease."""
    fetch = None
    if view.lease:
        fetch = fetch_response(service, service.lease_view(session, view.lease))
    return cache_pb2.WaitOperationResponse(
        done=view.done, moved_pages=view.moved_pages, failed_pages=view.failed_pages, fetch=fetch
    )


def commit_response(result: actions.CommitResult) -> cache_pb2.CommitResponse:
    """What became of a commit's pages. Raises CorruptError where some could not be copied in."""
    if result.failed_pages:
        raise CorruptError(
            f"{result.failed_pages} pages of the commit were not taken: "
            "they lie outside their region or do not have the checksum they came with",
            hint=f"{result.stored_pages} pages were stored; commit the others again",
        )
    return cache_pb2.CommitResponse(
        stored_pages=result.stored_pages,
        already_present_pages=result.already_present_pages,
        durable_pages=result.durable_pages,
    )


def pieces(request: cache_pb2.CommitRequest) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """A commit's (first page, pages) and (region, offset) columns.

    Raises InvalidArgumentError for columns of unequal length, pieces that are empty, overlap or are out of
    page order, and checksums that are not one a page.
    """
    first, counts = list(request.first_page), list(request.pages)
    regions, offsets = list(request.region_id), list(request.offset)
    if not len(first) == len(counts) == len(regions) == len(offsets):
        raise InvalidArgumentError("Commit: first_page, pages, region_id and offset have different lengths")
    if not all(counts):
        raise InvalidArgumentError("Commit: a piece without pages")
    ends = [begin + count for begin, count in zip(first, counts, strict=True)]
    if any(begin < end for begin, end in zip(first[1:], ends, strict=False)):
        raise InvalidArgumentError("Commit: pieces overlap or are not in page order")
    if (ends and ends[-1] > MAX_U32) or any(offset > MAX_OFFSET for offset in offsets):
        raise InvalidArgumentError("Commit: a page number or offset is out of range")
    if request.checksums and len(request.checksums) != sum(counts):
        raise InvalidArgumentError(f"Commit: {len(request.checksums)} checksums for {sum(counts)} pages")
    return list(zip(first, counts, strict=True)), list(zip(regions, offsets, strict=True))


def tree_node(node: NodeView) -> admin_pb2.TreeNode:
    """One node of the tree view."""
    return admin_pb2.TreeNode(
        id=node.id,
        parent=node.parent,
        namespace=node.namespace,
        depth_pages=node.depth_pages,
        pages=node.pages,
        first_symbol_digest=node.digest,
        tier_pages=node.tier_pages,
        pinned_pages=node.pinned_pages,
        hits=node.hits,
        idle_ms=node.idle_ms,
        children=node.children,
    )
