"""The calls that look pages up, lease them and move them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from hicache.engine import Engine, MatchView, OperationView, events
from hicache.engine.actions import FetchResult, OperationResult, RenewResult, ReserveResult
from hicache.errors import NotFoundError
from hicache.runtime.advice import Window
from hicache.runtime.clock import Clock
from hicache.runtime.counters import Latencies
from hicache.runtime.door import Door
from hicache.runtime.lease_tiers import LeaseTiers
from hicache.runtime.loop import EngineLoop
from hicache.runtime.namespaces import NamespaceBook
from hicache.runtime.reader import PageReader
from hicache.types import NO_USE, Use


class ReserveAlong(NamedTuple):
    """Whether a Fetch is to reserve room for what is missing, and for how long."""

    wanted: bool = False
    ttl_ms: int = 0


NO_RESERVE = ReserveAlong()


class PageCalls:
    """Each call checks its arguments, hands the engine one event, and waits for what it asked for."""

    def __init__(
        self,
        engine: Engine,
        loop: EngineLoop,
        namespaces: NamespaceBook,
        *,
        door: Door,
        reader: PageReader,
        clock: Clock,
        latencies: Latencies,
        window: Window,
        tiers: LeaseTiers,
        on_reserved: Callable[[int, int, ReserveResult], object],
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._namespaces = namespaces
        self._door = door
        self._reader = reader
        self._clock = clock
        self._latencies = latencies
        self._window = window
        self._tiers = tiers
        self._on_reserved = on_reserved

    def match(
        self,
        namespace: int,
        prompt: bytes,
        *,
        touch: bool = False,
        prefetch: bool = False,
        use: Use = NO_USE,
    ) -> MatchView:
        """How much of a prompt is cached, and where. ``touch`` counts it as a use, of which ``use`` tells more.

        ``prefetch`` also starts to promote what a Fetch would wait for, within bounds; nobody leases or awaits it.
        """
        began = self._clock.now_ns()
        self._door.alive()
        prompt = self._namespaces.prompt(namespace, prompt)
        view = self._engine.match(namespace, prompt)
        if touch:
            self._saw(namespace, prompt, began)
        if (touch or prefetch) and view.pages:
            self._loop.handle(events.Touch(namespace, prompt, use, prefetch))
        self._latencies.observe("match", self._clock.now_ns() - began)
        return view

    def _saw(self, namespace: int, prompt: bytes, began_ns: int) -> None:
        width = self._namespaces.find(namespace)[0].symbol_bytes
        self._window.saw(namespace, prompt, width, began_ns // 1_000_000)

    # --- leases

    async def fetch(
        self,
        session: int,
        namespace: int,
        prompt: bytes,
        *,
        max_pages: int = 0,
        ttl_ms: int = 0,
        wait_ms: int = 0,
        promote: bool = True,
        use: Use = NO_USE,
        reserve: ReserveAlong = NO_RESERVE,
        device: bool = False,
    ) -> FetchResult:
        """Lease what is readable and promote the rest; wait for that up to ``wait_ms``.

        ``device``: lease in the device tier and promote to it, whatever tier is usual. The result is the lease as it
        stands then; with ``reserve`` also the room for what does not match, where it was to be had at once. A call that
        is cancelled gives both back; promotions that it started go on. Raises UnavailableError, StaleError,
        NotFoundError, InvalidArgumentError, UnsupportedError.
        """
        began = self._clock.now_ns()
        self._door.admit(session)
        tier = self._tiers.asked(device=device)
        whole = self._namespaces.prompt(namespace, prompt)
        self._saw(namespace, whole, began)
        result = await self._loop.call(
            FetchResult,
            lambda request: events.Fetch(
                request, session, namespace, whole, max_pages, ttl_ms, promote, use, *reserve, tier
            ),
            session,
        )
        if result.lease and result.operation and wait_ms > 0:
            result = await self._wait_lease(session, result, wait_ms)
        if result.reserved is not None:
            self._on_reserved(session, namespace, result.reserved)
        self._latencies.observe("fetch", self._clock.now_ns() - began)
        return result

    async def _wait_lease(self, session: int, result: FetchResult, wait_ms: int) -> FetchResult:
        try:
            await self._loop.wait_operation(result.operation, wait_ms)
        except asyncio.CancelledError:
            self._loop.give_back(session, result)
            raise
        return after_wait(self._engine, self._loop, session, result)

    async def renew(self, session: int, leases: Sequence[int], ttl_ms: int = 0) -> RenewResult:
        """Give leases more time; also while draining, for as long as that lasts."""
        self._door.require(session)
        return await self._loop.call(
            RenewResult, lambda request: events.RenewLeases(request, session, tuple(leases), ttl_ms), session
        )

    def release(self, session: int, leases: Sequence[int]) -> None:
        """Give leases back; unknown ones are fine."""
        self._loop.handle(events.ReleaseLeases(session, tuple(leases)))

    def lease_view(self, session: int, lease: int) -> FetchResult:
        """A lease as it stands. Raises NotFoundError."""
        self._door.alive()
        return self._engine.lease_view(session, lease)

    async def read_pages(
        self, session: int, lease: int, first: int, count: int
    ) -> AsyncIterator[tuple[memoryview, int]]:
        """Pages [first, first + count) of a lease with their checksums; ``count`` 0: to its end.

        A page is valid until the next is asked for. Raises as ``PageReader.read`` does.
        """
        self._door.require(session)
        async for page in self._reader.read(session, lease, first, count):
            self._door.alive()
            yield page

    # --- operations

    async def prefetch(self, session: int, namespace: int, prompt: bytes, tier: int) -> OperationResult:
        """Promote a prefix to a tier without leasing it."""
        self._door.admit(session)
        whole = self._namespaces.prompt(namespace, prompt)
        return await self._loop.call(
            OperationResult,
            lambda request: events.Prefetch(request, session, namespace, whole, tier),
            session,
        )

    async def wait_operation(self, session: int, operation: int, wait_ms: int) -> OperationView:
        """How an operation stands when it is done, or after ``wait_ms``. Raises NotFoundError."""
        self._door.alive()
        view = self._engine.operation_view(session, operation)
        if view.done or wait_ms <= 0:
            return view
        await self._loop.wait_operation(operation, wait_ms)
        return self._engine.operation_view(session, operation)

    def cancel_operation(self, session: int, operation: int) -> None:
        """Wait for it no longer; copies under way go on. Unknown ones are fine."""
        self._loop.handle(events.CancelOperation(session, operation))


def after_wait(engine: Engine, loop: EngineLoop, session: int, result: FetchResult) -> FetchResult:
    """A lease whose promotions were waited for, as it stands now. Raises NotFoundError where it is gone."""
    try:
        now = engine.lease_view(session, result.lease)
    except NotFoundError:
        loop.give_back(session, result)  # what was reserved along with it
        raise
    now.reserved = result.reserved
    if now.granted_pages or now.operation:
        return now
    loop.handle(events.ReleaseLeases(session, (result.lease,)))  # nothing of it could be brought
    return FetchResult(0, now.matched_pages, 0, 0, (), 0, now.tier_pages, reserved=now.reserved)
