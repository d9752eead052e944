"""What callers do with the cache, as steps: look up, lease, read, move. Storing is in ``storing``."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np

from hicache.errors import HicacheError, NotFoundError, StaleError, UnavailableError, UnsupportedError
from hicache.rpc.client import calls
from hicache.rpc.client.arena import ArenaRegion
from hicache.rpc.client.core import (
    Attempt,
    Budget,
    Core,
    NamespaceState,
    invoke,
    named,
    simple,
    tier_index,
)
from hicache.rpc.client.lease import LeaseState, PageSink, Rows
from hicache.rpc.client.lifeline import exchange
from hicache.rpc.client.options import DataPlane
from hicache.rpc.client.reservation import ReservationState
from hicache.rpc.client.results import (
    CommitResult,
    Grant,
    MatchResult,
    OperationResult,
    PrefetchResult,
    RegionInfo,
)
from hicache.rpc.client.session import Link
from hicache.rpc.client.steps import Download, Step, Steps, Work
from hicache.rpc.common import fdproto
from hicache.rpc.pb import cache_pb2, region_pb2

RELEASE_TIMEOUT_S = 5.0
ABORT_TIMEOUT_S = 5.0
#: Time that a stream of pages gets, on top of the call's: at this rate.
STREAM_BYTES_PER_S = 20 << 20


# --- look-up


def match(
    core: Core, namespace: NamespaceState, prompt: bytes, ask: calls.MatchAsk, budget: Budget
) -> Steps[MatchResult]:
    """How much of a prompt is cached."""
    reply = yield from named(core, "Match", namespace, lambda who, _: calls.match(who, prompt, ask), budget)
    return calls.parse_match(reply.message, reply.link.capabilities, namespace.spec.page_tokens)


# --- leases


def fetch(
    core: Core, namespace: NamespaceState, prompt: bytes, ask: calls.FetchAsk, budget: Budget
) -> Steps[LeaseState]:
    """Lease what is cached of a prompt."""
    lease, _ = yield from fetch_and_reserve(core, namespace, prompt, ask, budget)
    return lease


def fetch_and_reserve(
    core: Core, namespace: NamespaceState, prompt: bytes, ask: calls.FetchAsk, budget: Budget
) -> Steps[tuple[LeaseState, ReservationState | None]]:
    """Lease what is cached, and reserve room for the rest where it is asked for and there is room at once."""
    sent_ns = core.now_ns()

    def build(who: calls.Who, link: Link) -> cache_pb2.FetchRequest:
        if ask.device:
            check_device(link)
        return calls.fetch(who, prompt, ask)

    reply = yield from named(core, "Fetch", namespace, build, budget)
    room = None
    if reply.message.HasField("reserved"):
        reserved = calls.parse_reserved(reply.message.reserved)
        room = ReservationState(reserved, reply.link.incarnation, namespace.spec.page_bytes, core.memory)
    lease = core.new_lease(reply.link, namespace.spec.page_bytes)
    try:
        yield from adopt(core, lease, reply.link, calls.parse_grant(reply.message), sent_ns)
        if lease.lease and answered_late(core, lease, sent_ns):
            yield from renew(core, [lease], ask.ttl_ms, core.budget(None, incarnation=reply.link.incarnation))
    except HicacheError:
        yield from release(core, [lease])
        if room is not None:
            yield from abort(core, room)
        raise
    return lease, room


def check_device(link: Link) -> None:
    """Raise UnsupportedError where the sidecar leases nothing in a device tier: an old one would lease in another."""
    if not any(tier.kind == "device" for tier in link.capabilities.tiers):
        raise UnsupportedError("the sidecar has no device tier", hint="fetch without device=True")
    if not link.capabilities.kv_memory:
        raise UnsupportedError(
            f"the sidecar (version {link.capabilities.server_version}) leases nothing in its device tier",
            hint="upgrade it, or fetch without device=True",
        )


def adopt(core: Core, lease: LeaseState, link: Link, grant: Grant, sent_ns: int) -> Steps[None]:
    """Make a grant's pages readable, and the lease what the grant says."""
    lease.lease = grant.lease  # so that it is released even where mapping fails
    regions = yield from _regions(core, link, grant)
    lease.adopt(grant, regions, core.deadline_ns(sent_ns, grant.expires_in_ms))


def answered_late(core: Core, lease: LeaseState, sent_ns: int) -> bool:
    """Whether the answer took so long that counting from before the call leaves little of the lease: to be renewed."""
    now_ns = core.now_ns()
    return now_ns - sent_ns > lease.deadline_ns - now_ns


def _regions(core: Core, link: Link, grant: Grant) -> Steps[dict[int, ArenaRegion]]:
    """The mapped regions of a grant's extents; none where its pages are to be streamed."""
    wanted = {extent.region_id for extent in grant.extents}
    if not link.finds_regions or not wanted:
        return {}
    try:
        if core.unmapped(wanted):
            yield from map_regions(core, link, core.unmapped(wanted))
        if wanted & core.pools.ids:
            return {}
        found = {region_id: core.arena.find(region_id) for region_id in wanted}
        if None in found.values():
            raise NotFoundError("the lease points to a region that the server does not list")
    except HicacheError:
        if core.options.data_plane is DataPlane.SHM:
            raise
        return {}
    return {region_id: region for region_id, region in found.items() if region is not None}


def map_regions(core: Core, link: Link, wanted: set[int]) -> Steps[None]:
    """Map those of these regions that the server lists."""
    budget = core.budget(None, incarnation=link.incarnation)
    reply = yield from simple(
        core, "ListRegions", lambda at: region_pb2.ListRegionsRequest(session_id=at.session_id), budget
    )
    core.pools.add(link.incarnation, calls.parse_gpu_pools(reply.message))
    for info in calls.parse_arena_regions(reply.message):
        if info.region_id in wanted:
            yield Work(functools.partial(_map_region, core, link, info))


def _map_region(core: Core, link: Link, info: RegionInfo) -> None:
    answer = exchange(link.fd_path, fdproto.Get(link.session_id, info.region_id))
    try:
        if len(answer.fds) != 1:
            raise HicacheError(f"the server sent {len(answer.fds)} descriptors for region {info.region_id}")
        core.arena.add(info, answer.fds[0], link.incarnation)
    finally:
        for fd in answer.fds:
            os.close(fd)


def renew(core: Core, leases: Sequence[LeaseState], ttl_ms: int, budget: Budget) -> Steps[list[LeaseState]]:
    """Give leases of one session more time. Answers those that are lost, which are over."""
    held = {lease.lease: lease for lease in leases if lease.lease and not lease.over}
    if not held:
        return []
    sent_ns = core.now_ns()
    reply = yield from simple(
        core,
        "RenewLeases",
        lambda link: cache_pb2.RenewLeasesRequest(
            session_id=link.session_id, lease_ids=list(held), ttl_ms=ttl_ms
        ),
        budget,
    )
    renewed = calls.parse_renewed(reply.message)
    for number, lease in held.items():
        if number in renewed.lost:
            lease.end(NotFoundError(f"lease {number} has expired", hint="fetch again"))
        else:
            lease.deadline_ns = core.deadline_ns(sent_ns, renewed.expires_in_ms)
    return [lease for number, lease in held.items() if number in renewed.lost]


def release(core: Core, leases: Sequence[LeaseState]) -> Steps[None]:
    """Give leases back. What cannot be told to the server ends with the session or the lease's time."""
    held = [lease for lease in leases if lease.lease and not lease.over]
    for lease in leases:
        lease.end(NotFoundError(f"lease {lease.lease} was released"))
    incarnation = core.session.incarnation
    numbers = [lease.lease for lease in held if lease.terms.incarnation == incarnation]
    if not numbers:
        return
    budget = core.parting(RELEASE_TIMEOUT_S, incarnation)
    try:
        yield from simple(
            core,
            "ReleaseLeases",
            lambda link: cache_pb2.ReleaseLeasesRequest(session_id=link.session_id, lease_ids=numbers),
            budget,
        )
    except (UnavailableError, StaleError, NotFoundError):
        return


def abort(core: Core, state: ReservationState) -> Steps[None]:
    """Give the rest of a reservation back. What cannot be told to the server ends with the reservation's time."""
    if state.ended:
        return
    state.end()
    budget = core.parting(ABORT_TIMEOUT_S, state.incarnation)
    try:
        yield from simple(
            core,
            "Abort",
            lambda link: cache_pb2.AbortRequest(session_id=link.session_id, reservation_id=state.reservation),
            budget,
        )
    except (UnavailableError, StaleError, NotFoundError):
        return


def wait_lease(core: Core, lease: LeaseState, wait_ms: int, budget: Budget) -> Steps[OperationResult]:
    """Wait for the pages that are still on their way; the lease then covers what has arrived."""
    if not lease.operation:
        return OperationResult(done=True, moved_pages=0, failed_pages=0)
    lease.check()
    sent_ns = core.now_ns()
    message, link = yield from _wait(core, lease.operation, wait_ms, budget)
    if message.HasField("fetch") and message.fetch.lease_id == lease.lease:
        deadline_ns = lease.deadline_ns
        yield from adopt(core, lease, link, calls.parse_grant(message.fetch), sent_ns)
        lease.deadline_ns = max(lease.deadline_ns, deadline_ns)
    if message.done:
        lease.operation = 0
    return calls.parse_operation(message)


def wait_operation(core: Core, operation: int, wait_ms: int, budget: Budget) -> Steps[OperationResult]:
    """Wait for an operation."""
    message, _ = yield from _wait(core, operation, wait_ms, budget)
    return calls.parse_operation(message)


def _wait(
    core: Core, operation: int, wait_ms: int, budget: Budget
) -> Steps[tuple[cache_pb2.WaitOperationResponse, Link]]:
    reply = yield from simple(
        core,
        "WaitOperation",
        lambda link: cache_pb2.WaitOperationRequest(
            session_id=link.session_id, operation_id=operation, wait_ms=wait_ms
        ),
        budget,
    )
    return reply.message, reply.link


# --- reading


def views(core: Core, lease: LeaseState, *, verify: bool) -> Steps[list[memoryview]]:
    """Read-only views of a lease's pages, in place where they are mapped."""
    lease.check()
    if lease.streamed and lease.granted_pages:
        yield from _download_all(core, lease, verify=verify)
    if not verify:
        return lease.views(verify=False)
    found: list[memoryview] = yield Work(functools.partial(lease.views, verify=True))
    return found


def copy(core: Core, lease: LeaseState, rows: Rows, first: int, *, verify: bool) -> Steps[int]:
    """Copy pages out. Answers how many."""
    lease.check()
    if not len(rows):
        return 0
    moved_bytes = len(rows) * lease.terms.page_bytes
    if not lease.streamed:
        yield Work(functools.partial(lease.copy, rows, first, verify=verify), moved_bytes)
    elif lease.private is not None:
        yield Work(functools.partial(lease.copy_private, rows, first), moved_bytes)
    else:
        yield from _download(core, lease, PageSink(rows, first, verify=verify))
    return len(rows)


def _download_all(core: Core, lease: LeaseState, *, verify: bool) -> Steps[None]:
    """Read a lease's pages into memory of our own, once."""
    if lease.private is None:
        rows = np.empty((lease.granted_pages, lease.terms.page_bytes), np.uint8)
        yield from _download(core, lease, PageSink(rows, 0, verify=verify))
        lease.private = rows


def _download(core: Core, lease: LeaseState, sink: PageSink) -> Steps[None]:
    extra_s = sink.missing_pages * lease.terms.page_bytes / STREAM_BYTES_PER_S
    budget = core.budget(core.options.timeout_s + extra_s, incarnation=lease.terms.incarnation)

    def step(attempt: Attempt) -> Steps[Step]:
        yield from ()
        sink.restart()
        request = cache_pb2.ReadPagesRequest(
            session_id=attempt.link.session_id,
            lease_id=lease.lease,
            first_page=sink.next_page,
            pages=sink.missing_pages,
        )
        return Download(request, attempt.left_s, sink.take)

    yield from invoke(core, step, budget)
    if sink.missing_pages:
        raise HicacheError(f"ReadPages ended {sink.missing_pages} pages early")


# --- moving


def prefetch(
    core: Core, namespace: NamespaceState, prompt: bytes, tier: int | str, budget: Budget
) -> Steps[PrefetchResult]:
    """Promote a prefix."""

    def build(who: calls.Who, link: Link) -> cache_pb2.PrefetchRequest:
        return calls.prefetch(who, prompt, tier_index(link, tier))

    reply = yield from named(core, "Prefetch", namespace, build, budget)
    return calls.parse_prefetch(reply.message)


def secure(
    core: Core, namespace: NamespaceState, prompt: bytes, pages: int, budget: Budget
) -> Steps[CommitResult]:
    """Bring pages of a prompt that are cached already to the durable tier, and wait until they are there."""
    link = core.session.current()
    durable = (
        next((tier.name for tier in link.capabilities.tiers if tier.durable), "") if link is not None else ""
    )
    if not durable:
        return CommitResult()
    moving = yield from prefetch(core, namespace, prompt, durable, budget)
    missing = pages - moving.matched_pages
    if moving.operation:
        wait_ms = int(budget.timeout_s * 1000)
        waiting = dataclasses.replace(budget, wait_ms=wait_ms)
        result = yield from wait_operation(core, moving.operation, wait_ms, waiting)
        missing += moving.moving_pages - result.moved_pages
    return CommitResult(durable_pages=max(pages - missing, 0))


def cancel(core: Core, operation: int, budget: Budget) -> Steps[None]:
    """Wait for an operation no longer."""
    yield from simple(
        core,
        "CancelOperation",
        lambda link: cache_pb2.CancelOperationRequest(session_id=link.session_id, operation_id=operation),
        budget,
    )


# --- rot


def report_corrupt(core: Core, lease: LeaseState, pages: Sequence[int], budget: Budget) -> Steps[int]:
    """Have the server look at pages again that were not what their checksums say."""
    if not pages:
        return 0
    request_id = core.new_id()
    reply = yield from simple(
        core,
        "ReportCorrupt",
        lambda link: cache_pb2.ReportCorruptRequest(
            session_id=link.session_id, request_id=request_id, lease_id=lease.lease, pages=pages
        ),
        budget,
    )
    found: int = reply.message.corrupt_pages
    return found
