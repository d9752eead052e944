"""What the synchronous and the asyncio handles share: everything but the running of steps."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hicache.errors import HicacheError, InvalidArgumentError
from hicache.rpc.client import buffers, calls, flows, many, prompt, staging, storing, ticket
from hicache.rpc.client import options as settings
from hicache.rpc.client.arguments import (
    NamespaceFields,
    count_of,
    fetch_ask,
    make_namespace,
    pages_of,
    use_of,
)
from hicache.rpc.client.core import NS_PER_MS, Core, linked
from hicache.rpc.client.kv_memory import KvMemory
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.many import FetchQuery
from hicache.rpc.client.options import Verify
from hicache.rpc.client.prompt import Tokens
from hicache.rpc.client.reservation import ReservationState
from hicache.rpc.client.results import (
    Capabilities,
    CommitResult,
    MatchResult,
    OperationResult,
    PrefetchResult,
    StoreResult,
)
from hicache.rpc.client.staging import ForeignMemory, Source, Staging
from hicache.rpc.client.steps import Steps, Work
from hicache.rpc.client.storing import Pages
from hicache.rpc.client.ticket import LeaseTicket, TicketReader
from hicache.types import Namespace

Keys = Sequence[bytes] | None


class NamespaceBase:
    """A namespace without its calls."""

    def __init__(self, core: Core, fields: NamespaceFields) -> None:
        self._core = core
        self._state = make_namespace(**fields)

    @property
    def spec(self) -> Namespace:
        """What was asked for; its tenant means nothing here."""
        return self._state.spec

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self._state.spec.page_bytes

    @property
    def page_tokens(self) -> int:
        """Tokens of one page."""
        return self._state.spec.page_tokens

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that stand for all of the namespace, once it was used; empty before."""
        return self._state.fingerprint

    def pages(self, tokens: Tokens, extra_keys: Sequence[bytes] | None = None) -> int:
        """How many whole pages a prompt has."""
        return len(self._pack(tokens, extra_keys)) // self._state.spec.symbol_bytes

    def _pack(self, tokens: Tokens, extra_keys: Sequence[bytes] | None) -> bytes:
        return prompt.pack(self._state.spec, tokens, extra_keys)

    def _match(
        self, tokens: Tokens, extra_keys: Keys, timeout_s: float | None, ask: calls.MatchAsk
    ) -> Steps[MatchResult]:
        prompt, budget = self._pack(tokens, extra_keys), self._core.budget(timeout_s)
        return flows.match(self._core, self._state, prompt, ask, budget)

    def _fetch(
        self, tokens: Tokens, extra_keys: Keys, timeout_s: float | None, ask: calls.FetchAsk
    ) -> Steps[LeaseState]:
        prompt, budget = self._pack(tokens, extra_keys), self._core.budget(timeout_s, wait_ms=ask.wait_ms)
        return flows.fetch(self._core, self._state, prompt, ask, budget)

    def _fetch_and_reserve(
        self, tokens: Tokens, extra_keys: Keys, timeout_s: float | None, ask: calls.FetchAsk
    ) -> Steps[tuple[LeaseState, ReservationState | None]]:
        prompt, budget = self._pack(tokens, extra_keys), self._core.budget(timeout_s, wait_ms=ask.wait_ms)
        return flows.fetch_and_reserve(self._core, self._state, prompt, ask, budget)

    def _reserve(
        self, tokens: Tokens, extra_keys: Keys, timeout_s: float | None, ask: calls.ReserveAsk
    ) -> Steps[ReservationState]:
        prompt, budget = self._pack(tokens, extra_keys), self._core.budget(timeout_s, wait_ms=ask.wait_ms)
        return storing.reserve(self._core, self._state, prompt, ask, budget)

    def _secure(self, tokens: Tokens, extra_keys: Keys, pages: int) -> Steps[StoreResult]:
        """What a durable store still owes when every page was there already: that they are on the durable tier."""
        prompt, budget = self._pack(tokens, extra_keys), self._core.budget(None)
        committed = yield from flows.secure(self._core, self._state, prompt, pages, budget)
        return StoreResult(pages, committed)

    def _prefetch(
        self, tokens: Tokens, extra_keys: Keys, timeout_s: float | None, tier: int | str
    ) -> Steps[PrefetchResult]:
        prompt, budget = self._pack(tokens, extra_keys), self._core.budget(timeout_s)
        return flows.prefetch(self._core, self._state, prompt, tier, budget)


class LeaseBase:
    """A lease without its calls. ``len()`` is the number of pages that can be read now."""

    def __init__(self, core: Core, state: LeaseState) -> None:
        self._core = core
        self._state = state

    def __len__(self) -> int:
        return self._state.granted_pages

    def __bool__(self) -> bool:
        return True  # a lease of no pages is a lease: test len()

    @property
    def lease_id(self) -> int:
        """The server's number for it; 0 where nothing was granted and nothing is coming."""
        return self._state.lease

    @property
    def matched_pages(self) -> int:
        """Pages of the prompt that are cached, in whatever tier."""
        return self._state.matched_pages

    @property
    def granted_pages(self) -> int:
        """Pages, from the first, that can be read now."""
        return self._state.granted_pages

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self._state.terms.page_bytes

    @property
    def pending_pages(self) -> int:
        """Pages that are still on their way: wait for them, or compute them again and release the lease."""
        return self._state.pending_pages

    @property
    def pending_ms(self) -> int:
        """When the last of these may be there, by the pace the server has measured; 0 where it has not yet."""
        return self._state.pending_ms

    @property
    def tier_pages(self) -> dict[str, int]:
        """By tier, how many matched pages it served."""
        return dict(self._state.tier_pages)

    @property
    def operation(self) -> int:
        """Not 0 while more pages of this lease are on their way: see ``wait``."""
        return self._state.operation

    @property
    def expires(self) -> float:
        """When to stop reading: seconds of this process's monotonic clock, before the server's own deadline."""
        return self._state.deadline_ns / 1e9

    @property
    def remaining_ms(self) -> int:
        """Milliseconds until ``expires``, 0 when past."""
        return max(0, (self._state.deadline_ns - self._state.terms.now_ns()) // NS_PER_MS)

    @property
    def zero_copy(self) -> bool:
        """Whether its pages are read in place, in shared memory."""
        return not self._state.streamed

    def ticket(self) -> LeaseTicket:
        """Where its pages lie, as plain data for other processes of this user (``Client.reader``).

        Good until ``expires`` as it is now: a renewed lease needs another ticket. Raises NotFoundError or StaleError
        for a lease that is over, UnsupportedError where its pages come as a stream.
        """
        return ticket.issue(self._core, self._state)

    def still_valid(self) -> bool:
        """Whether the pages are still what was leased: ask *after* reading a view, before using what was read."""
        return self._state.still_valid()

    def _views(self) -> Steps[list[memoryview]]:
        return flows.views(self._core, self._state, verify=self._core.options.verify is Verify.ALWAYS)

    def _copy(self, into: Any, first: int, count: int | None, verify: Verify | str | None) -> Steps[int]:
        how = self._core.options.verify if verify is None else settings.verify(verify)
        rows = buffers.page_rows(into, self.page_bytes, self._state.pages_from(first, count))
        return flows.copy(self._core, self._state, rows, first, verify=how is not Verify.OFF)

    def _renew(self, ttl_ms: int) -> Steps[None]:
        self._state.check()
        budget = self._core.budget(None, incarnation=self._state.terms.incarnation)
        yield from flows.renew(self._core, [self._state], count_of("ttl_ms", ttl_ms), budget)
        self._state.check()

    def _wait(self, wait_ms: int) -> Steps[OperationResult]:
        wait_ms = count_of("wait_ms", wait_ms)
        budget = self._core.budget(None, wait_ms=wait_ms, incarnation=self._state.terms.incarnation)
        return flows.wait_lease(self._core, self._state, wait_ms, budget)

    def _report_corrupt(self, pages: Iterable[int]) -> Steps[int]:
        state = self._state
        numbers = sorted({count_of("page", page) for page in pages})
        if state.over or not state.lease:
            state.check()
        if numbers and numbers[-1] >= state.matched_pages:
            raise InvalidArgumentError(f"page {numbers[-1]} is not in a lease of {state.matched_pages} pages")
        budget = self._core.budget(None, incarnation=state.terms.incarnation)
        return flows.report_corrupt(self._core, state, numbers, budget)

    def _release(self) -> Steps[None]:
        return flows.release(self._core, [self._state])


class ReservationBase:
    """A reservation without its calls. Several threads may prepare its pages."""

    def __init__(self, core: Core, state: ReservationState) -> None:
        self._core = core
        self._state = state

    @property
    def present_pages(self) -> int:
        """Pages [0, present_pages) are cached already."""
        return self._state.present_pages

    @property
    def missing_pages(self) -> int:
        """How many pages, from ``present_pages`` on, are to be written."""
        return self._state.missing_pages

    @property
    def missing(self) -> range:
        """The numbers of the pages to be written."""
        return range(self._state.present_pages, self._state.present_pages + self._state.missing_pages)

    @property
    def ended(self) -> bool:
        """Whether nothing more can be written: all committed, aborted, or nothing was missing."""
        return self._state.ended

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self._state.page_bytes

    def buffer(self, page: int) -> memoryview:
        """A writable view of a missing page in this client's own memory; it is taken back at the commit.

        Raises InvalidArgumentError for a page that is not missing, ExhaustedError at ``write_limit_bytes``.
        """
        return self._state.buffer(page)

    def adopt(self, pages: Mapping[int, Source]) -> None:
        """Take pages as written that lie elsewhere, without a copy: (staging, place) or (memory, offset) a page.

        All of them or none. A place of a Staging is the reservation's from then on. Raises InvalidArgumentError for
        pages that are not missing or were written already, and for places that do not fit or are not there any more.
        """
        self._state.adopt(staging.places(pages))

    def _write(self, page: int, data: Any) -> Steps[None]:
        yield Work(functools.partial(self._state.write, page, data), self._state.page_bytes)

    def _commit(
        self, pages: Iterable[int] | None, timeout_s: float | None, ask: calls.CommitAsk
    ) -> Steps[CommitResult]:
        budget = self._core.budget(timeout_s, incarnation=self._state.incarnation)
        return storing.commit(self._core, self._state, pages, ask, budget)

    def _store(self, pages: Pages, ask: calls.CommitAsk) -> Steps[StoreResult]:
        """All missing pages, part by part."""
        total = CommitResult()
        while not self._state.ended:
            total += yield from storing.store_part(self._core, self._state, pages, ask)
        return StoreResult(self.present_pages, total)

    def _abort(self) -> Steps[None]:
        return flows.abort(self._core, self._state)


class ClientBase:
    """A client without its calls."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def core(self) -> Core:
        """What the client is made of; for tests and measurements."""
        return self._core

    @property
    def attached(self) -> bool:
        """Whether there is a live session, this moment."""
        return self._core.session.alive

    @property
    def draining(self) -> bool:
        """Whether the sidecar said that it is about to stop."""
        return self._core.session.draining

    def _connect(self) -> Steps[Capabilities]:
        core = self._core
        deadline_ns = core.now_ns() + int(core.options.connect_timeout_s * 1e9)
        return (yield from linked(core, deadline_ns, 0)).capabilities

    def _renew(self, leases: Iterable[LeaseBase], ttl_ms: int) -> Steps[list[LeaseState]]:
        """Those that are lost, of the leases given."""
        states = [lease._state for lease in leases]
        ttl_ms = count_of("ttl_ms", ttl_ms)
        now = self._core.session.incarnation
        ours = [state for state in states if state.terms.incarnation == now]
        yield from flows.renew(self._core, ours, ttl_ms, self._core.budget(None, incarnation=now))
        return [state for state in states if not state.still_valid()]

    def _release(self, leases: Iterable[LeaseBase]) -> Steps[None]:
        return flows.release(self._core, [lease._state for lease in leases])

    def staging(self, page_bytes: int, pages: int) -> Staging:
        """Places for between 1 and ``pages`` pages in this client's own memory, for other processes to write.

        Raises ExhaustedError where not one is to be had below ``write_limit_bytes``.
        """
        self._core.check_process()
        return Staging(self._core.memory, page_bytes, pages)

    def adopt_memory(self, fd: int, size_bytes: int) -> ForeignMemory:
        """Memory of the caller's own, to commit pages from as they lie there. ``fd`` stays the caller's.

        Raises InvalidArgumentError for a descriptor that is no memfd or file of that size.
        """
        self._core.check_process()
        return ForeignMemory(self._core.memory, fd, count_of("size_bytes", size_bytes))

    def kv_memory(self, size_bytes: int) -> KvMemory:
        """Host memory to cut an engine's KV tensors out of, which ``register_kv`` takes. Raises ExhaustedError."""
        self._core.check_process()
        return KvMemory(size_bytes)

    def _reader(self, source: LeaseTicket) -> Steps[TicketReader]:
        return TicketReader((yield from ticket.reader(self._core, source)))

    def _fetch_many(
        self,
        queries: Iterable[FetchQuery],
        asked: tuple[int, int, float | None],
        release: Iterable[LeaseBase],
        renew: Iterable[LeaseBase],
    ) -> Steps[list[many.Outcome]]:
        """``asked``: ttl_ms, wait_ms, timeout_s."""
        ttl_ms, wait_ms, timeout_s = asked
        ask = fetch_ask(None, ttl_ms, wait_ms, None)
        chores = many.Chores([lease._state for lease in release], [lease._state for lease in renew])
        budget = self._core.budget(timeout_s)
        return many.fetch_many(self._core, [_packed(query) for query in queries], ask, chores, budget)

    def _release_all(self, found: Iterable[many.Outcome]) -> Steps[None]:
        """What nobody waits for any more."""
        return flows.release(self._core, [each for each in found if isinstance(each, LeaseState)])

    def _wait_operation(self, operation: int, wait_ms: int) -> Steps[OperationResult]:
        wait_ms = count_of("wait_ms", wait_ms)
        return flows.wait_operation(self._core, operation, wait_ms, self._core.budget(None, wait_ms=wait_ms))

    def _cancel(self, operation: int) -> Steps[None]:
        return flows.cancel(self._core, operation, self._core.budget(None))


def _packed(query: FetchQuery) -> many.Query | HicacheError:
    """A query with its prompt packed; one that is wrong spoils only itself."""
    try:
        namespace = query.namespace
        packed = namespace._pack(query.tokens, query.extra_keys)
        pages, use = pages_of(query.max_pages), use_of(query.use)
        return many.Query(namespace._state, packed, pages, use, query.device)
    except HicacheError as error:
        return error
