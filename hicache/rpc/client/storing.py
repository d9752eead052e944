"""Storing as steps: reserve room, fill buffers, commit them, or give the room back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from hicache.errors import ExhaustedError, HicacheError, NotFoundError, StaleError, UnavailableError
from hicache.rpc.client import calls
from hicache.rpc.client.core import Attempt, Budget, Core, NamespaceState, Reply, invoke, named
from hicache.rpc.client.lifeline import exchange
from hicache.rpc.client.region import Region, Registration
from hicache.rpc.client.reservation import (
    PageBuffer,
    ReservationState,
    checksums,
    foreign,
    pieces,
    regions,
)
from hicache.rpc.client.results import CommitResult
from hicache.rpc.client.session import Link
from hicache.rpc.client.steps import Call, Step, Steps, Upload, Work
from hicache.rpc.common import fdproto
from hicache.rpc.pb import cache_pb2, region_pb2

UNREGISTER_TIMEOUT_S = 5.0
#: ``store`` commits in parts of this size: bounded memory, and pages still in the processor's cache.
PART_BYTES = 64 << 20

Pages = Sequence[Any] | Callable[[int, memoryview], object]


def reserve(
    core: Core, namespace: NamespaceState, prompt: bytes, ask: calls.ReserveAsk, budget: Budget
) -> Steps[ReservationState]:
    """Room for the missing pages of a prompt."""
    reply = yield from named(
        core, "Reserve", namespace, lambda who, _: calls.reserve(who, prompt, ask), budget
    )
    reserved = calls.parse_reserved(reply.message)
    return ReservationState(reserved, reply.link.incarnation, namespace.spec.page_bytes, core.memory)


@dataclasses.dataclass(slots=True)
class _Sending:
    """One Commit. ``named``: the server may have seen it."""

    pages: dict[int, PageBuffer]
    checksums: list[int]
    request_id: bytes
    ask: calls.CommitAsk
    named: bool = False


def commit(
    core: Core, state: ReservationState, pages: Iterable[int] | None, ask: calls.CommitAsk, budget: Budget
) -> Steps[CommitResult]:
    """Commit prepared pages; their buffers are used again only when the server has answered."""
    if state.ended and state.reservation:
        raise NotFoundError("the reservation has ended")
    chosen = state.select(pages)
    if not state.reservation or not (chosen or ask.last):
        return CommitResult()
    sending = _Sending(chosen, [], core.new_id(), ask)
    settled = False
    try:
        if ask.verify or foreign(chosen):  # foreign memory may change: only what was checksummed is stored
            sending.checksums = yield Work(
                functools.partial(checksums, chosen), len(chosen) * state.page_bytes
            )
        reply: Reply = yield from invoke(core, _commit_step(core, state, sending), budget)
        settled = True
    except HicacheError as error:
        settled = not (sending.named and isinstance(error, UnavailableError | StaleError))
        if settled:
            state.refused(chosen)
        raise
    finally:
        if not settled:
            state.unanswered(chosen)
    state.committed(chosen)
    if ask.last:
        state.end()
    yield from _unregister(core, reply.link)
    return calls.parse_commit(reply.message)


def _commit_step(core: Core, state: ReservationState, sending: _Sending) -> Callable[[Attempt], Steps[Step]]:
    """What each attempt of a Commit sends: places in our regions, or the bytes themselves."""

    def step(attempt: Attempt) -> Steps[Step]:
        who = calls.Who(attempt.link.session_id, 0, sending.request_id)
        if not attempt.link.mapped:
            sending.named = True
            requests = functools.partial(_chunks, who, state, sending, attempt.link.capabilities.chunk_bytes)
            return Upload(requests, attempt.left_s)
        region_ids: dict[Region, int] = {}
        for region in regions(sending.pages):
            region_ids[region] = yield from registered(core, region, attempt)
        found = pieces(sending.pages, region_ids, state.page_bytes)
        request = calls.commit(who, state.reservation, found, sending.checksums, sending.ask)
        sending.named = True
        return Call("Commit", request, attempt.left_s)

    return step


def _chunks(
    who: calls.Who, state: ReservationState, sending: _Sending, chunk_bytes: int
) -> Iterator[cache_pb2.WritePagesRequest]:
    yield calls.open_write(who, state.reservation, sending.ask)
    sums = sending.checksums or checksums(sending.pages)  # a stream is always checked
    for (page, buffer), checksum in zip(sending.pages.items(), sums, strict=True):
        for offset in range(0, state.page_bytes, chunk_bytes):
            data = buffer.bytes[offset : offset + chunk_bytes].tobytes()
            last = offset + chunk_bytes >= state.page_bytes
            yield cache_pb2.WritePagesRequest(
                chunk=cache_pb2.PageChunk(
                    page=page, offset=offset, data=data, checksum=checksum if last else 0
                )
            )


def registered(core: Core, region: Region, attempt: Attempt) -> Steps[int]:
    """A region's id in this session."""
    link, held = attempt.link, region.registration
    if held is None or held.incarnation != link.incarnation:
        put = functools.partial(exchange, link.fd_path, fdproto.Put(link.session_id), (region.fd,))
        token: fdproto.Answer = yield Work(put)
        request = region_pb2.RegisterRequest(
            session_id=link.session_id, request_id=core.new_id(), fd_token=token.payload
        )
        answer: region_pb2.RegisterResponse = yield Call("Register", request, attempt.left_s)
        held = region.registration = Registration(link.incarnation, answer.region_id)
    return held.region_id


def _unregister(core: Core, link: Link) -> Steps[None]:
    """Tell the server of regions that are gone."""
    for gone in core.memory.discarded():
        if gone.incarnation != link.incarnation:
            continue
        request = region_pb2.UnregisterRequest(session_id=link.session_id, region_id=gone.region_id)
        try:
            yield Call("Unregister", request, UNREGISTER_TIMEOUT_S)
        except HicacheError:
            return  # the session's end does it


def store_part(
    core: Core, state: ReservationState, pages: Pages, ask: calls.CommitAsk
) -> Steps[CommitResult]:
    """Fill and commit the next missing pages, as many as fit a part; the last part ends the reservation."""
    yield Work(functools.partial(fill, state, pages), state.missing_pages * state.page_bytes)
    ask = dataclasses.replace(ask, last=state.first_open is None)
    budget = core.budget(None, incarnation=state.incarnation)
    return (yield from commit(core, state, None, ask, budget))


def fill(state: ReservationState, pages: Pages) -> None:
    """Fill buffers until a part is full or the client's memory is. Raises ExhaustedError if not one could be had."""
    filled_bytes = 0
    while filled_bytes < PART_BYTES and (page := state.first_open) is not None:
        try:
            view = state.buffer(page)
        except ExhaustedError:
            if not filled_bytes:
                raise
            return
        if callable(pages):
            pages(page, view)
        else:
            state.write(page, pages[page])
        filled_bytes += state.page_bytes
