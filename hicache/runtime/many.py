"""Many look-ups in one call: each is a Fetch to the engine, all of them wait together."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from hicache.engine import Engine, events
from hicache.engine.actions import FetchResult, RenewResult
from hicache.errors import HicacheError
from hicache.runtime.advice import Window
from hicache.runtime.clock import Clock
from hicache.runtime.counters import Latencies
from hicache.runtime.door import Door
from hicache.runtime.lease_tiers import LeaseTiers
from hicache.runtime.loop import Answer, EngineLoop
from hicache.runtime.namespaces import NamespaceBook
from hicache.runtime.pages import after_wait
from hicache.types import NO_USE, Use


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """One look-up; the fields as in ``PageCalls.fetch``."""

    namespace: int
    prompt: bytes
    max_pages: int = 0
    use: Use = NO_USE
    device: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Chores:
    """Leases to give back, and leases to give more time, along with the look-ups."""

    release: Sequence[int] = ()
    renew: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class ManyResult:
    """One outcome a query, in their order. ``renewed`` is None where nothing was to be renewed."""

    outcomes: list[FetchResult | HicacheError]
    renewed: RenewResult | None


class ManyCalls:
    """The one call that does what many would."""

    def __init__(
        self,
        engine: Engine,
        loop: EngineLoop,
        namespaces: NamespaceBook,
        *,
        door: Door,
        clock: Clock,
        latencies: Latencies,
        window: Window,
        tiers: LeaseTiers,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._namespaces = namespaces
        self._door = door
        self._clock = clock
        self._latencies = latencies
        self._window = window
        self._tiers = tiers

    async def fetch_many(
        self,
        session: int,
        queries: Sequence[Query | HicacheError],
        *,
        ttl_ms: int = 0,
        wait_ms: int = 0,
        chores: Chores | None = None,
    ) -> ManyResult:
        """Release, renew, then look up: what is readable is leased, the rest waited for up to ``wait_ms`` in all.

        A query that is refused has its error as its outcome; one that is an error already keeps it. Also while
        draining, when every query is refused. A call that is cancelled gives all its leases back. Raises
        UnavailableError where nothing is served, StaleError without the session.
        """
        began = self._clock.now_ns()
        self._door.require(session)
        renewed = await self._do(session, chores, ttl_ms) if chores is not None else None
        answers = [self._ask(session, query, ttl_ms, began) for query in queries]
        try:
            outcomes = [await _outcome(answer) for answer in answers]
            if wait_ms > 0:
                outcomes = await self._wait(session, outcomes, wait_ms)
        except asyncio.CancelledError:
            self._undo(session, answers)
            raise
        self._latencies.observe("fetch_many", self._clock.now_ns() - began)
        return ManyResult(outcomes, renewed)

    async def _do(self, session: int, chores: Chores, ttl_ms: int) -> RenewResult | None:
        if chores.release:
            self._loop.handle(events.ReleaseLeases(session, tuple(chores.release)))
        if not chores.renew:
            return None
        renew = tuple(chores.renew)
        return await self._loop.call(
            RenewResult, lambda request: events.RenewLeases(request, session, renew, ttl_ms), session
        )

    def _ask(
        self, session: int, query: Query | HicacheError, ttl_ms: int, began_ns: int
    ) -> Answer | HicacheError:
        if isinstance(query, HicacheError):
            return query
        try:
            self._door.admit(session)
            spec = self._namespaces.find(query.namespace)[0]
            prompt = self._namespaces.prompt(query.namespace, query.prompt)
            tier = self._tiers.asked(device=query.device)
        except HicacheError as error:
            return error
        self._window.saw(query.namespace, prompt, spec.symbol_bytes, began_ns // 1_000_000)
        namespace, most, use = query.namespace, query.max_pages, query.use
        return self._loop.ask(
            lambda request: events.Fetch(
                request, session, namespace, prompt, most, ttl_ms, use=use, tier=tier
            ),
            session,
        )

    async def _wait(
        self, session: int, outcomes: list[FetchResult | HicacheError], wait_ms: int
    ) -> list[FetchResult | HicacheError]:
        """All operations at once, each for no longer than all."""
        moving = [found for found in outcomes if isinstance(found, FetchResult) and found.operation]
        if not moving:
            return outcomes
        await asyncio.gather(*(self._loop.wait_operation(found.operation, wait_ms) for found in moving))
        return [self._after(session, found) for found in outcomes]

    def _after(self, session: int, found: FetchResult | HicacheError) -> FetchResult | HicacheError:
        if isinstance(found, HicacheError) or not found.operation:
            return found
        try:
            return after_wait(self._engine, self._loop, session, found)
        except HicacheError as error:  # the lease has expired meanwhile, or its session ended
            return error

    def _undo(self, session: int, answers: Sequence[Answer | HicacheError]) -> None:
        for answer in answers:
            if isinstance(answer, HicacheError) or answer.cancel():
                continue  # refused; or still to come, and then given back by the loop
            if not answer.cancelled() and answer.exception() is None:
                self._loop.give_back(session, answer.result())


async def _outcome(answer: Answer | HicacheError) -> FetchResult | HicacheError:
    if isinstance(answer, HicacheError):
        return answer
    try:
        result = await answer
    except HicacheError as error:
        return error
    assert isinstance(result, FetchResult), f"expected a FetchResult, got {result}"
    return result
