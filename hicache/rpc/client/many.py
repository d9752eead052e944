"""FetchMany as steps: many look-ups, and the leases to release and renew, with one call.

What the server takes in one call is bounded; what is more goes in several, one after the other, which share the wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hicache.errors import (
    ERROR_BY_CODE,
    ErrorCode,
    HicacheError,
    InvalidArgumentError,
    NotFoundError,
    StaleError,
    UnavailableError,
)
from hicache.rpc.client import calls, flows
from hicache.rpc.client.core import NS_PER_MS, Attempt, Budget, Core, NamespaceState, invoke, linked, opened
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.prompt import Tokens
from hicache.rpc.client.results import Capabilities
from hicache.rpc.client.session import Link
from hicache.rpc.client.steps import Call, Step, Steps
from hicache.rpc.pb import cache_pb2
from hicache.types import NO_USE, Use

if TYPE_CHECKING:
    from hicache.rpc.client.handles import NamespaceBase

Outcome = LeaseState | HicacheError


@dataclasses.dataclass(frozen=True, slots=True)
class FetchQuery:
    """One look-up of ``fetch_many``; the fields as the arguments of ``fetch``."""

    namespace: NamespaceBase
    tokens: Tokens
    extra_keys: Sequence[bytes] | None = None
    max_pages: int | None = None
    use: Use | None = None
    device: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """A look-up whose arguments were checked."""

    namespace: NamespaceState
    prompt: bytes
    max_pages: int = 0
    use: Use = NO_USE
    device: bool = False

    @property
    def pages(self) -> int:
        """Of its prompt."""
        return len(self.prompt) // self.namespace.spec.symbol_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Chores:
    """What goes along with the look-ups."""

    release: Sequence[LeaseState] = ()
    renew: Sequence[LeaseState] = ()

    def __bool__(self) -> bool:
        return bool(self.release or self.renew)


def fetch_many(
    core: Core, queries: Sequence[Query | HicacheError], ask: calls.FetchAsk, chores: Chores, budget: Budget
) -> Steps[list[Outcome]]:
    """Release and renew, then look up: one outcome a query, in their order."""
    for lease in chores.release:
        lease.end(NotFoundError(f"lease {lease.lease} was released"))
    core.check_process()
    began_ns = core.now_ns()
    link = yield from linked(core, began_ns + int(budget.timeout_s * 1e9), 0)
    found: list[Outcome] = []
    for part in _parts(queries, link.capabilities, empty=bool(chores)):
        waited_ms = (core.now_ns() - began_ns) // NS_PER_MS if found else 0
        left = dataclasses.replace(ask, wait_ms=max(0, ask.wait_ms - waited_ms))
        found += yield from _call(
            core, _Part(part, left, chores), dataclasses.replace(budget, wait_ms=left.wait_ms)
        )
        chores = Chores()
    return found


def _parts(
    queries: Sequence[Query | HicacheError], limits: Capabilities, *, empty: bool
) -> Iterator[list[Query | HicacheError]]:
    """The queries in parts that the server takes; ``empty``: one part at least."""
    part: list[Query | HicacheError] = []
    size_bytes = pages = 0
    for query in queries:
        mine = _bounded(query, limits)
        if isinstance(mine, Query):
            over = size_bytes + len(mine.prompt) > limits.max_prompt_bytes
            over = over or pages + mine.pages > limits.max_prompt_pages
            if over or len(part) >= limits.max_queries_per_call:
                yield part
                part, size_bytes, pages = [], 0, 0
            size_bytes += len(mine.prompt)
            pages += mine.pages
        part.append(mine)
    if part or empty:
        yield part


def _bounded(query: Query | HicacheError, limits: Capabilities) -> Query | HicacheError:
    """What no call could take is refused here, so that it spoils no other."""
    if isinstance(query, HicacheError):
        return query
    if len(query.prompt) > limits.max_prompt_bytes or query.pages > limits.max_prompt_pages:
        return InvalidArgumentError(
            f"prompt has {len(query.prompt)} bytes and {query.pages} pages, "
            f"at most {limits.max_prompt_bytes} and {limits.max_prompt_pages} are taken"
        )
    return query


@dataclasses.dataclass(slots=True)
class _Part:
    """One call. ``outcomes``: what is known of each query already; the others go to the server."""

    queries: list[Query | HicacheError]
    ask: calls.FetchAsk
    chores: Chores
    outcomes: list[Outcome | None] = dataclasses.field(default_factory=list)
    renewed: dict[int, LeaseState] = dataclasses.field(default_factory=dict)

    def sent(self) -> list[tuple[int, Query]]:
        """The queries that went to the server, with their places."""
        return [
            (at, query)
            for at, query in enumerate(self.queries)
            if isinstance(query, Query) and self.outcomes[at] is None
        ]


def _call(core: Core, part: _Part, budget: Budget) -> Steps[list[Outcome]]:
    request_id = core.new_id()

    def step(attempt: Attempt) -> Steps[Step]:
        request = cache_pb2.FetchManyRequest(
            session_id=attempt.link.session_id,
            request_id=request_id,
            ttl_ms=part.ask.ttl_ms,
            wait_ms=part.ask.wait_ms,
        )
        part.outcomes = [query if isinstance(query, HicacheError) else None for query in part.queries]
        for at, query in part.sent():
            try:
                if query.device:
                    flows.check_device(attempt.link)
                number = yield from opened(query.namespace, attempt)
            except (UnavailableError, StaleError):
                raise
            except HicacheError as error:  # this namespace cannot be had; the others may
                part.outcomes[at] = error
                continue
            _add(request, number, query)
        _add_chores(request, part, attempt.link)
        return Call("FetchMany", request, attempt.left_s)

    sent_ns = core.now_ns()
    reply = yield from invoke(core, step, budget)
    _renewed(core, part, reply.message, sent_ns)
    yield from _take(core, part, reply.message, (reply.link, sent_ns))
    assert None not in part.outcomes, "every query has an outcome"
    return [outcome for outcome in part.outcomes if outcome is not None]


def _add(request: cache_pb2.FetchManyRequest, number: int, query: Query) -> None:
    if query.use is NO_USE:
        request.queries.add(
            namespace_id=number, prompt=query.prompt, max_pages=query.max_pages, device=query.device
        )
        return
    request.queries.add(
        namespace_id=number,
        prompt=query.prompt,
        max_pages=query.max_pages,
        request_class=query.use.cls,
        turn=query.use.turn,
        cost_per_page=query.use.cost,
        device=query.device,
    )


def _add_chores(request: cache_pb2.FetchManyRequest, part: _Part, link: Link) -> None:
    def ours(leases: Sequence[LeaseState]) -> Iterator[LeaseState]:
        return (each for each in leases if each.lease and each.terms.incarnation == link.incarnation)

    request.release_lease_ids.extend(lease.lease for lease in ours(part.chores.release))
    part.renewed = {lease.lease: lease for lease in ours(part.chores.renew) if not lease.over}
    request.renew_lease_ids.extend(part.renewed)


def _renewed(core: Core, part: _Part, message: cache_pb2.FetchManyResponse, sent_ns: int) -> None:
    lost = frozenset(message.lost_lease_ids)
    for number, lease in part.renewed.items():
        if number in lost:
            lease.end(NotFoundError(f"lease {number} has expired", hint="fetch again"))
        else:
            lease.deadline_ns = core.deadline_ns(sent_ns, message.renewed_expires_in_ms)


def _take(
    core: Core, part: _Part, message: cache_pb2.FetchManyResponse, sent: tuple[Link, int]
) -> Steps[None]:
    """Make leases of what was granted. What cannot be read is released again, together."""
    link, sent_ns = sent
    asked = part.sent()
    if len(message.outcomes) != len(asked):
        raise HicacheError(f"the server answered {len(message.outcomes)} of {len(asked)} queries")
    yield from _map_all(core, link, message)
    failed: list[LeaseState] = []
    late: list[LeaseState] = []
    for (at, query), outcome in zip(asked, message.outcomes, strict=True):
        if outcome.WhichOneof("outcome") != "fetch":
            part.outcomes[at] = refused(outcome.refusal)
            continue
        lease = core.new_lease(link, query.namespace.spec.page_bytes)
        part.outcomes[at] = lease
        try:
            yield from flows.adopt(core, lease, link, calls.parse_grant(outcome.fetch), sent_ns)
        except HicacheError as error:
            part.outcomes[at] = error
            failed.append(lease)
            continue
        if lease.lease and flows.answered_late(core, lease, sent_ns):
            late.append(lease)
    if failed:
        yield from flows.release(core, failed)
    if late:
        budget = core.budget(None, incarnation=link.incarnation)
        yield from flows.renew(core, late, part.ask.ttl_ms, budget)


def _map_all(core: Core, link: Link, message: cache_pb2.FetchManyResponse) -> Steps[None]:
    """Map what the leases need, at once. Where that fails each lease tries for itself, and says so."""
    wanted: set[int] = set()
    for outcome in message.outcomes:
        wanted.update(outcome.fetch.extents.region_id)
    unknown = core.unmapped(wanted)
    if link.finds_regions and unknown:
        with contextlib.suppress(HicacheError):
            yield from flows.map_regions(core, link, unknown)


def refused(refusal: cache_pb2.Refusal) -> HicacheError:
    """The error that a refusal stands for."""
    code = ErrorCode.__members__.get(refusal.reason, ErrorCode.INTERNAL)
    return ERROR_BY_CODE[code](
        refusal.message or "the server did not say why",
        hint=refusal.hint,
        retry_after_ms=refusal.retry_after_ms,
    )
