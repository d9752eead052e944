"""Many look-ups in one call: each as if it had come alone, and nothing kept where nobody waits any more."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_helpers import PAGE_BYTES, TestClient, namespace, prompt, running, settle

from hicache.engine.actions import FetchResult
from hicache.errors import HicacheError, InvalidArgumentError, NotFoundError, StaleError, UnavailableError
from hicache.runtime import Service, ServiceOptions
from hicache.runtime.many import Chores, Query
from hicache.runtime.pages import ReserveAlong
from hicache.types import Ack

HOST_ONLY = ServiceOptions(host_bytes=4 << 20, prefault=False)


def two_tiers(tmp_path: Path) -> ServiceOptions:
    return ServiceOptions(
        host_bytes=4 << 20, prefault=False, disk_path=str(tmp_path / "disk"), disk_bytes=32 << 20
    )


def run(options: ServiceOptions, test: Callable[[Service, TestClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(options) as service:
            await test(service, TestClient(service))

    asyncio.run(main())


async def only_on_disk(client: TestClient, pages: int, salt: int) -> None:
    await client.store(pages, salt, ack=Ack.DURABLE)
    result = await client.service.evict(client.namespace, prompt(pages, salt), 0)
    assert result.pages == pages


def granted(outcome: FetchResult | HicacheError) -> FetchResult:
    assert isinstance(outcome, FetchResult), outcome
    return outcome


def test_a_bad_query_spoils_only_itself() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(6)
        queries = [
            Query(client.namespace, prompt(8)),
            Query(999, prompt(3)),
            InvalidArgumentError("known before"),
            Query(client.namespace, prompt(8), max_pages=2),
            Query(client.namespace, prompt(4, salt=9)),
            Query(client.namespace, b"abc"),
        ]
        result = await service.fetch_many(client.session, queries)
        first, unknown, known, some, miss, crumb = result.outcomes
        assert (granted(first).matched_pages, granted(first).granted_pages) == (6, 6)
        assert isinstance(unknown, NotFoundError)
        assert known is queries[2]
        assert granted(some).granted_pages == 2
        assert (granted(miss).lease, granted(miss).matched_pages) == (0, 0)
        assert isinstance(crumb, InvalidArgumentError)
        assert result.renewed is None
        assert service.stats().engine.leases == 2

    run(HOST_ONLY, test)


def test_chores_are_done_first_and_alone_too() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(4)
        one, two = await client.fetch(4), await client.fetch(4)
        chores = Chores(release=[one.lease, 12345], renew=[two.lease, one.lease])
        result = await service.fetch_many(client.session, [], ttl_ms=60_000, chores=chores)
        assert result.outcomes == []
        assert result.renewed is not None and list(result.renewed.lost) == [one.lease]
        assert result.renewed.expires_ms > two.expires_ms
        assert service.stats().engine.leases == 1

    run(HOST_ONLY, test)


def test_draining_refuses_each_query_and_still_releases_and_renews(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(4)
        one, two = await client.fetch(4), await client.fetch(4)
        await service.drain(100)
        result = await service.fetch_many(
            client.session,
            [Query(client.namespace, prompt(4))],
            chores=Chores(release=[one.lease], renew=[two.lease]),
        )
        assert isinstance(result.outcomes[0], UnavailableError)
        assert result.renewed is not None and list(result.renewed.lost) == []
        assert service.stats().engine.leases == 1

    run(two_tiers(tmp_path), test)


def test_without_a_session_nothing_is_asked() -> None:
    async def test(service: Service, client: TestClient) -> None:
        with pytest.raises(StaleError):
            await service.fetch_many(client.session + 1, [Query(client.namespace, prompt(1))])
        assert service.stats().engine.counters.fetches == 0

    run(HOST_ONLY, test)


def test_pages_on_disk_are_waited_for_together(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        for salt in range(6):
            await only_on_disk(client, 5, salt)
        queries = [Query(client.namespace, prompt(5, salt)) for salt in range(6)]
        at_once = await service.fetch_many(client.session, queries)
        assert all(granted(each).operation for each in at_once.outcomes)
        result = await service.fetch_many(client.session, queries, wait_ms=10_000)
        assert [granted(each).granted_pages for each in result.outcomes] == [5] * 6
        for salt, each in enumerate(result.outcomes):
            assert await client.read(granted(each), salt) == 5

    run(two_tiers(tmp_path), test)


def test_a_cancelled_call_gives_everything_back(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(3, salt=50)
        for salt in range(4):
            await only_on_disk(client, 5, salt)
        house = service._house
        assert house is not None
        held = house.ports[1].submit
        gate: list[Callable[[], None]] = []
        house.ports[1].submit = lambda *args, **kw: gate.append(lambda: held(*args, **kw))  # type: ignore[method-assign]
        queries = [Query(client.namespace, prompt(5, salt)) for salt in range(4)]
        call = asyncio.ensure_future(
            service.fetch_many(
                client.session, [Query(client.namespace, prompt(3, 50)), *queries], wait_ms=60_000
            )
        )
        await settle(lambda: bool(gate))
        assert service.stats().engine.leases == 5
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert service.stats().engine.leases == 0
        house.ports[1].submit = held  # type: ignore[method-assign]
        for go in gate:
            go()
        await settle(lambda: service.stats().engine.copies == 0)

    run(two_tiers(tmp_path), test)


def test_a_lease_that_expires_while_others_are_waited_for_is_refused_alone(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(3, salt=50)
        await only_on_disk(client, 5, 1)
        house = service._house
        assert house is not None
        held = house.ports[1].submit
        house.ports[1].submit = lambda *_, **__: None  # type: ignore[method-assign]  # the disk does not answer
        queries = [Query(client.namespace, prompt(5, 1)), Query(client.namespace, prompt(3, 50))]
        result = await service.fetch_many(client.session, queries, ttl_ms=50, wait_ms=300)
        late, there = result.outcomes
        assert isinstance(late, NotFoundError)
        assert granted(there).granted_pages == 3
        house.ports[1].submit = held  # type: ignore[method-assign]

    async def main() -> None:
        service = Service(two_tiers(tmp_path))
        await service.start()
        try:
            await test(service, TestClient(service))
        finally:
            house = service._house
            assert house is not None
            house.copier.in_flight = 0  # the copy that the disk never answered
            await service.close()

    asyncio.run(main())


# --- the same as one by one


@dataclasses.dataclass(frozen=True)
class Ask:
    pages: int
    salt: int
    most: int
    known: bool


ASKS = st.lists(
    st.builds(
        Ask, st.integers(0, 7), st.integers(0, 3), st.integers(0, 4), st.sampled_from([True] * 7 + [False])
    ),
    max_size=12,
)


def seen(found: FetchResult | HicacheError) -> object:
    """What of an answer does not depend on its numbers."""
    if isinstance(found, HicacheError):
        return type(found)
    slots = [slot for piece in found.pieces for slot in piece.slots]
    return (bool(found.lease), found.matched_pages, found.granted_pages, slots, list(found.tier_pages))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stored=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), max_size=4), asks=ASKS)
def test_it_answers_as_the_same_fetches_one_by_one(stored: list[tuple[int, int]], asks: list[Ask]) -> None:
    async def test(service: Service, client: TestClient) -> None:
        for pages, salt in stored:
            await client.store(pages, salt)
        names = [client.namespace if ask.known else 77 for ask in asks]
        alone: list[object] = []
        for ask, name in zip(asks, names, strict=True):
            try:
                found = await service.fetch(
                    client.session, name, prompt(ask.pages, ask.salt), max_pages=ask.most
                )
            except HicacheError as error:
                alone.append(type(error))
            else:
                alone.append(seen(found))
                service.release(client.session, [found.lease])
        queries = [
            Query(name, prompt(ask.pages, ask.salt), ask.most) for ask, name in zip(asks, names, strict=True)
        ]
        result = await service.fetch_many(client.session, queries)
        assert [seen(each) for each in result.outcomes] == alone
        leases = [each.lease for each in result.outcomes if isinstance(each, FetchResult) and each.lease]
        assert len(set(leases)) == len(leases) == service.stats().engine.leases
        service.release(client.session, leases)

    run(ServiceOptions(host_bytes=1 << 20, prefault=False), test)


# --- room for the rest, with the same call


def test_a_fetch_reserves_what_is_missing_and_a_cancelled_one_gives_it_back(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await only_on_disk(client, 5, 0)
        both = await service.fetch(
            client.session, client.namespace, prompt(8), wait_ms=10_000, reserve=ReserveAlong(wanted=True)
        )
        assert both.granted_pages == 5 and both.reserved is not None
        assert (both.reserved.present_pages, both.reserved.missing_pages) == (5, 3)
        service.begin_write(client.session, both.reserved.reservation).close()  # its page size is known
        service.abort(client.session, both.reserved.reservation)
        client.release(both)
        await service.evict(client.namespace, prompt(5), 0)
        house = service._house
        assert house is not None
        held = house.ports[1].submit
        gate: list[Callable[[], None]] = []
        house.ports[1].submit = lambda *args, **kw: gate.append(lambda: held(*args, **kw))  # type: ignore[method-assign]
        call = asyncio.ensure_future(
            service.fetch(
                client.session, client.namespace, prompt(8), wait_ms=60_000, reserve=ReserveAlong(wanted=True)
            )
        )
        await settle(lambda: bool(gate))
        stats = service.stats().engine
        assert (stats.leases, stats.reservations) == (1, 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        stats = service.stats().engine
        assert (stats.leases, stats.reservations) == (0, 0)
        house.ports[1].submit = held  # type: ignore[method-assign]
        for go in gate:
            go()
        await settle(lambda: service.stats().engine.copies == 0)

    run(two_tiers(tmp_path), test)


def test_pages_of_many_ranks_are_one_page_and_another_namespace() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(3)
        ranks = TestClient(service, spec=namespace(world_size=4, page_bytes=4 * PAGE_BYTES))
        assert ranks.match(3) == 0
        await ranks.store(3)
        assert ranks.match(3) == 3
        assert await ranks.read(await ranks.fetch(3)) == 3
        assert ranks.fingerprint != client.fingerprint
        alone = TestClient(service, spec=namespace(world_size=2))
        assert alone.match(3) == 0

    run(HOST_ONLY, test)
