"""The asyncio client: the synchronous one with ``await``. Its handles run the steps that ``handles`` makes.

async with hicache.aio.Client("unix:///run/hicache.sock") as client:
cache = client.namespace(model="llama-3.1-8b", page_bytes=2 << 20)
async with await cache.fetch(tokens, wait_ms=50) as lease:
await lease.copy_into(buffer)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from hicache.device.kv import PagedKv
from hicache.errors import HicacheError
from hicache.rpc.client import buffers, kv_flows
from hicache.rpc.client.aio_admin import Admin
from hicache.rpc.client.aio_copier import Copier
from hicache.rpc.client.aio_driver import Driver
from hicache.rpc.client.aio_held import Lease, Reservation
from hicache.rpc.client.aio_kv_held import KvRegion
from hicache.rpc.client.arguments import (
    NamespaceFields,
    OptionFields,
    fetch_and_reserve_ask,
    fetch_ask,
    make_options,
    match_ask,
    reserve_ask,
)
from hicache.rpc.client.copier import open_engine
from hicache.rpc.client.handles import ClientBase, NamespaceBase
from hicache.rpc.client.kv_handles import kv_state
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.many import FetchQuery
from hicache.rpc.client.options import ClientOptions
from hicache.rpc.client.prompt import Tokens
from hicache.rpc.client.results import (
    Capabilities,
    MatchResult,
    OperationResult,
    PrefetchResult,
    StoreResult,
)
from hicache.rpc.client.storing import Pages
from hicache.rpc.client.ticket import LeaseTicket, TicketReader
from hicache.rpc.client.watch import WatchAsk
from hicache.rpc.client.watches import AsyncWatch
from hicache.types import Use

#: How long calls that move pages wait for room, or for pages from lower tiers, unless they say otherwise.
WAIT_MS = 5_000


class NamespaceHandle(NamespaceBase):
    """The calls in one namespace; opened at its first use, and again after a restart of the sidecar."""

    def __init__(self, driver: Driver, fields: NamespaceFields) -> None:
        super().__init__(driver.core, fields)
        self._driver = driver

    async def match(
        self,
        tokens: Tokens,
        *,
        extra_keys: Sequence[bytes] | None = None,
        touch: bool = False,
        prefetch: bool = False,
        use: Use | None = None,
        timeout_s: float | None = None,
    ) -> MatchResult:
        """How much of a prompt is cached; counts as a use only with ``touch`` or ``prefetch``.

        ``prefetch`` starts to promote what a ``fetch`` would wait for; nothing is leased. ``use``: as in ``fetch``.
        """
        return await self._driver.run(
            self._match(tokens, extra_keys, timeout_s, match_ask(use, touch=touch, prefetch=prefetch))
        )

    async def fetch(
        self,
        tokens: Tokens,
        *,
        max_pages: int | None = None,
        ttl_ms: int = 0,
        wait_ms: int = 0,
        device: bool = False,
        use: Use | None = None,
        extra_keys: Sequence[bytes] | None = None,
        timeout_s: float | None = None,
    ) -> Lease:
        """Lease what is cached of a prompt. A miss is a lease of no pages.

        What is readable is granted at once; pages that must first be promoted are waited for up to ``wait_ms``, and
        may be waited for further with ``Lease.wait``. ``ttl_ms`` 0: the server's default.
        ``use`` says what kind of request this is, which eviction and admission may weigh. ``device``: lease, and
        promote to, the device tier, for ``Lease.load``. Raises UnsupportedError where the sidecar has none.
        """
        ask = fetch_ask(max_pages, ttl_ms, wait_ms, use, device=device)
        return Lease(self._driver, await self._driver.run(self._fetch(tokens, extra_keys, timeout_s, ask)))

    async def fetch_and_reserve(
        self,
        tokens: Tokens,
        *,
        ttl_ms: int = 0,
        reserve_ttl_ms: int = 0,
        wait_ms: int = 0,
        device: bool = False,
        use: Use | None = None,
        extra_keys: Sequence[bytes] | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Lease, Reservation | None]:
        """``fetch``, and with the same call room for what does not match: pages from ``present_pages`` on.

        None for the reservation: there is no room at once; ``reserve`` waits for some. Both are to be given back.
        """
        ask = fetch_and_reserve_ask(ttl_ms, reserve_ttl_ms, wait_ms, use, device=device)
        lease, room = await self._driver.run(self._fetch_and_reserve(tokens, extra_keys, timeout_s, ask))
        return Lease(self._driver, lease), Reservation(self._driver, room) if room is not None else None

    async def load(
        self,
        tokens: Tokens,
        into: Any,
        *,
        wait_ms: int = WAIT_MS,
        use: Use | None = None,
        extra_keys: Sequence[bytes] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Copy what is cached of a prompt into a buffer, or one buffer a page; answers how many pages."""
        room = buffers.capacity_pages(into, self.page_bytes)
        if not room:
            return 0
        ask = fetch_ask(room, 0, wait_ms, use)
        state = await self._driver.run(self._fetch(tokens, extra_keys, timeout_s, ask))
        async with Lease(self._driver, state) as lease:
            return await lease.copy_into(into)

    async def reserve(
        self,
        tokens: Tokens,
        *,
        ttl_ms: int = 0,
        wait_ms: int = WAIT_MS,
        drop_pressure: bool = False,
        use: Use | None = None,
        extra_keys: Sequence[bytes] | None = None,
        timeout_s: float | None = None,
    ) -> Reservation:
        """Room for a prompt's missing pages, waited for up to ``wait_ms`` while others are moved out.

        ``drop_pressure``: drop unsaved victims instead of waiting. ``use``: as in ``fetch``; kept with the
        pages. Raises ExhaustedError where there is no room.
        """
        ask = reserve_ask(ttl_ms, wait_ms, use, drop_pressure=drop_pressure)
        state = await self._driver.run(self._reserve(tokens, extra_keys, timeout_s, ask))
        return Reservation(self._driver, state)

    async def store(
        self,
        tokens: Tokens,
        pages: Pages,
        *,
        durable: bool = False,
        wait_ms: int = WAIT_MS,
        drop_pressure: bool = False,
        use: Use | None = None,
        extra_keys: Sequence[bytes] | None = None,
    ) -> StoreResult:
        """``reserve``, then ``Reservation.store``.

        ``durable`` holds for pages that were there already, too: they are brought to the durable tier.
        """
        ask = reserve_ask(0, wait_ms, use, drop_pressure=drop_pressure)
        state = await self._driver.run(self._reserve(tokens, extra_keys, None, ask))
        async with Reservation(self._driver, state) as reservation:
            if durable and not reservation.missing_pages:
                return await self._driver.run(self._secure(tokens, extra_keys, reservation.present_pages))
            return await reservation.store(pages, durable=durable)

    async def prefetch(
        self,
        tokens: Tokens,
        tier: int | str = 0,
        *,
        extra_keys: Sequence[bytes] | None = None,
        timeout_s: float | None = None,
    ) -> PrefetchResult:
        """Promote a prompt's cached pages to a tier (by number or name) without leasing them."""
        return await self._driver.run(self._prefetch(tokens, extra_keys, timeout_s, tier))


class Client(ClientBase):
    """A connection to one sidecar. It belongs to one event loop.

    ``target``: a path or ``unix:///path`` of the sidecar's socket, or ``host:port`` with ``token`` or ``tls``. The
    keywords are the fields of ClientOptions. Raises ConfigError for settings that cannot work.
    """

    def __init__(
        self, target: str, options: ClientOptions | None = None, **fields: Unpack[OptionFields]
    ) -> None:
        self._driver = Driver(target, make_options(options, fields))
        super().__init__(self._driver.core)
        self.admin = Admin(self._driver)
        self._copiers: list[Copier] = []

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except HicacheError:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()

    async def connect(self) -> Capabilities:
        """Attach, or wait until it is done. Raises UnavailableError after ``connect_timeout_s``."""
        return await self._driver.run(self._connect())

    async def close(self) -> None:
        """End the session: everything it holds is released. Idempotent."""
        for copier in self._copiers:
            await copier.close()
        await self._driver.close()

    def copier(
        self, layers: Sequence[Any], *, layout: str, page_tokens: int, codec: str | None = None, **how: Any
    ) -> Copier:
        """Ready-made copies between pages and an engine's paged KV; needs torch.

        ``layers``: the KV tensors, on the CPU or a CUDA device: one a layer, or a pair of keys and values; ``layout``
        as in docs/GPU.md. ``codec``: quantise pages on the way (fp8-e4m3, int8-g64, int4-g64). ``how``: the fields of
        ``hicache.device.copying.CopyOptions``. Closed with the client. Raises InvalidArgumentError, UnsupportedError.
        """
        copies = open_engine(layers, layout=layout, page_tokens=page_tokens, codec=codec, **how)
        copier = Copier(self._driver.core, copies)
        self._copiers = [*(each for each in self._copiers if not each.closed), copier]
        return copier

    def namespace(self, **fields: Unpack[NamespaceFields]) -> NamespaceHandle:
        """A namespace: ``model`` and ``page_bytes`` at least. Raises InvalidArgumentError naming the field."""
        return NamespaceHandle(self._driver, fields)

    async def register_kv(
        self,
        layers: Sequence[Any] | PagedKv,
        *,
        layout: str | None = None,
        page_offset: int = 0,
        planes_per_layer: int | None = None,
    ) -> KvRegion:
        """Let the sidecar copy pages to and from an engine's paged KV.

        ``layers``: a tensor a layer, or a pair of keys and values, whose axes ``layout`` names (``kernels/paged.py``);
        or a ready PagedKv, whose descriptors stay the caller's. CPU tensors lie in ``kv_memory``. ``page_offset``:
        where in a page these layers begin, for a rank whose part comes behind others'. Raises InvalidArgumentError,
        and UnsupportedError for memory that cannot be shared: says why and what to do instead.
        """
        state = kv_state(layers, layout, page_offset, planes_per_layer)
        region = KvRegion(self._driver, state)
        try:
            await self._driver.run(kv_flows.register(self._core, state, self._core.budget(None)))
        except HicacheError:
            state.close()
            raise
        return region

    async def fetch_many(
        self,
        queries: Iterable[FetchQuery],
        *,
        ttl_ms: int = 0,
        wait_ms: int = 0,
        release: Iterable[Lease] = (),
        renew: Iterable[Lease] = (),
        timeout_s: float | None = None,
    ) -> list[Lease | HicacheError]:
        """Many look-ups with one call: for each a lease as ``fetch`` answers, or the error of that query alone.

        ``release`` and ``renew`` go along, and are done first; a renewed lease that is lost is no longer valid.
        ``wait_ms`` is for all queries together, ``ttl_ms`` for leases granted and renewed. A caller that is cancelled
        holds none of the leases.
        """
        asked = (ttl_ms, wait_ms, timeout_s)
        steps = self._fetch_many(queries, asked, release, renew)
        found = await self._driver.run_or_undo(steps, self._release_all)
        return [Lease(self._driver, each) if isinstance(each, LeaseState) else each for each in found]

    async def reader(self, ticket: LeaseTicket) -> TicketReader:
        """Read the pages of a lease that another process of this user holds, in place.

        Raises StaleError for a ticket of another run of the sidecar, NotFoundError for one that has expired,
        UnsupportedError where this client does not share memory with the sidecar.
        """
        return await self._driver.run(self._reader(ticket))

    async def renew(self, leases: Iterable[Lease], ttl_ms: int = 0) -> list[Lease]:
        """Renew many leases with one call; answers those that are lost."""
        held = {lease._state: lease for lease in leases}
        return [held[lost] for lost in await self._driver.run(self._renew(held.values(), ttl_ms))]

    async def release(self, leases: Iterable[Lease]) -> None:
        """Release many leases with one call."""
        await self._driver.run(self._release(leases))

    async def wait_operation(self, operation: int, wait_ms: int) -> OperationResult:
        """Wait for an operation, such as a prefetch."""
        return await self._driver.run(self._wait_operation(operation, wait_ms))

    async def cancel(self, operation: int) -> None:
        """Wait for an operation no longer; copies that others share go on."""
        await self._driver.run(self._cancel(operation))

    def watch(
        self,
        *,
        tiers: Sequence[int | str] = (),
        fingerprints: Sequence[bytes] = (),
        all_tenants: bool = False,
        progress_ms: int = 0,
        lost_ms: int = 5_000,
    ) -> AsyncWatch:
        """What can be read where, from now on: batches of events, beginning with a snapshot (see docs/EVENTS.md).

        An asynchronous iterator that reconnects by itself. Empty filters let everything pass; ``all_tenants`` is for
        administrators. ``progress_ms``: how often the sidecar says that nothing happened; ``lost_ms``: after how long
        without it a LOST batch says so.
        """
        ask = WatchAsk(tuple(tiers), tuple(fingerprints), all_tenants, progress_ms, lost_ms)
        return AsyncWatch(self._driver, ask)
