"""Many look-ups with one call, in both clients against a real sidecar."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest

import hicache
import hicache.aio
from hicache.errors import InvalidArgumentError, NotFoundError, StaleError, UnsupportedError
from hicache.rpc.client import FetchQuery, Lease
from hicache.rpc.client.many import refused
from hicache.rpc.pb import cache_pb2
from hicache.types import Use

PAGE = 16 << 10
PAGES = 6


def tokens(salt: int, pages: int = PAGES) -> Any:
    return np.arange(64 * pages, dtype=np.int32) + 100_000 * salt


def data(salt: int, pages: int = PAGES) -> Any:
    return np.random.default_rng(salt).integers(0, 256, (pages, PAGE), dtype=np.uint8)


def query(cache: Any, *args: Any, **fields: Any) -> FetchQuery:
    return FetchQuery(getattr(cache, "_inner", cache), *args, **fields)


@pytest.mark.parametrize("plane", ["shm", "stream"])
def test_each_query_has_its_own_outcome(make_client: Any, sidecar: Any, plane: str) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target, data_plane=plane) as client:
            cache = client.namespace(model="m", page_bytes=PAGE)
            other = client.namespace(model="other", page_bytes=PAGE)
            impossible = client.namespace(model="big", page_bytes=1 << 30)  # fits no segment
            for salt in range(3):
                await cache.store(tokens(salt), data(salt))
            found = await client.fetch_many(
                [
                    query(cache, tokens(0)),
                    query(cache, [1 << 40] * 64),
                    query(impossible, tokens(0)),
                    query(other, tokens(0)),
                    query(cache, tokens(2), max_pages=2, use=Use("chat", 1, 0.5)),
                    query(cache, tokens(1), max_pages=0),
                ],
                wait_ms=1000,
            )
            whole, ids, big, miss, part, none = found
            assert isinstance(ids, InvalidArgumentError)
            assert isinstance(big, InvalidArgumentError | UnsupportedError) or "segment" in str(big)
            assert isinstance(none, InvalidArgumentError)
            assert (len(whole), len(miss), len(part)) == (PAGES, 0, 2)
            into = np.zeros((PAGES, PAGE), np.uint8)
            await whole.copy_into(into)
            assert (into == data(0)).all()
            await part.copy_into(into)
            assert (into[:2] == data(2)[:2]).all()
            assert (await client.fetch_many([])) == []

    asyncio.run(scenario())


def test_leases_are_released_and_renewed_along(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            cache = client.namespace(model="m", page_bytes=PAGE)
            await cache.store(tokens(0), data(0))
            first = await client.fetch_many([query(cache, tokens(0))] * 3, ttl_ms=2_000)
            await first[2].release()
            found = await client.fetch_many(
                [query(cache, tokens(0))], ttl_ms=20_000, release=first[:1], renew=first[1:]
            )
            assert not first[0].still_valid()
            with pytest.raises(NotFoundError, match="released"):
                await first[0].views()
            assert 10_000 < first[1].remaining_ms <= 20_000
            assert not first[2].still_valid()
            assert (await client.admin.stats()).leases == 2
            held = [*found, first[1]]
            assert await client.fetch_many([], release=held) == []
            assert (await client.admin.stats()).leases == 0

    asyncio.run(scenario())


def test_a_lost_lease_is_known_after_the_renewal(sidecar: Any) -> None:
    with hicache.Client(sidecar.target, deadline_margin_ms=0) as client:
        cache = client.namespace(model="m", page_bytes=PAGE)
        cache.store(tokens(0), data(0))
        (lease,) = client.fetch_many([FetchQuery(cache, tokens(0))])
        assert isinstance(lease, Lease)
        number = lease.lease_id
        with hicache.Client(sidecar.target):
            link = client.core.session.current()
            assert link is not None
            request = cache_pb2.ReleaseLeasesRequest(session_id=link.session_id, lease_ids=[number])
            client._driver._methods["ReleaseLeases"](request)  # behind its back
        client.fetch_many([], renew=[lease])
        with pytest.raises(NotFoundError, match="expired"):
            lease.views()


def test_what_one_call_cannot_take_goes_in_several(make_client: Any, idle_sidecar: Any) -> None:
    idle_sidecar.server |= {"max_prompt_bytes": 10_000, "max_prompt_pages": 20, "max_queries_per_call": 3}
    sidecar = idle_sidecar.start()

    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            cache = client.namespace(model="m", page_bytes=PAGE)
            for salt in range(3):
                await cache.store(tokens(salt), data(salt))
            asked = [query(cache, tokens(salt % 4)) for salt in range(10)]
            asked.insert(4, query(cache, tokens(0, 50)))
            found = await client.fetch_many(asked, wait_ms=100)
            assert isinstance(found.pop(4), InvalidArgumentError)
            assert [len(each) for each in found] == [
                PAGES,
                PAGES,
                PAGES,
                0,
                PAGES,
                PAGES,
                PAGES,
                0,
                PAGES,
                PAGES,
            ]

    asyncio.run(scenario())


def test_a_restart_is_survived_and_old_leases_are_left_out(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            cache = client.namespace(model="m", page_bytes=PAGE)
            await cache.store(tokens(0), data(0))
            old = await client.fetch_many([query(cache, tokens(0))] * 2)
            await asyncio.to_thread(sidecar.restart)
            found = await client.fetch_many([query(cache, tokens(0))], release=old[:1], renew=old[1:])
            assert len(found) == 1 and len(found[0]) == 0
            assert isinstance(old[1].still_valid(), bool) and not old[1].still_valid()
            with pytest.raises((StaleError, NotFoundError)):
                await old[1].views()

    asyncio.run(scenario())


def test_a_refusal_becomes_the_error_that_it_was() -> None:
    known = refused(cache_pb2.Refusal(reason="EXHAUSTED", message="m", hint="h", retry_after_ms=7))
    assert (known.code.name, known.message, known.hint, known.retry_after_ms) == ("EXHAUSTED", "m", "h", 7)
    strange = refused(cache_pb2.Refusal(reason="OF_TOMORROW"))
    assert strange.code.name == "INTERNAL"


def test_a_cancelled_caller_holds_no_lease(sidecar: Any) -> None:
    """The server goes on for the sake of a retry; what it then grants is given back at once, not after its time."""

    async def scenario() -> None:
        async with hicache.aio.Client(sidecar.target) as client:
            cache = client.namespace(model="m", page_bytes=PAGE)
            await cache.store(tokens(0), data(0))
            go, call = asyncio.Event(), client._driver._call

            async def slow(step: Any) -> Any:
                answer = await call(step)
                if step.method == "FetchMany":
                    await go.wait()
                return answer

            client._driver._call = slow  # type: ignore[method-assign]
            asking = asyncio.create_task(client.fetch_many([FetchQuery(cache, tokens(0))] * 4))
            async with asyncio.timeout(10):
                while (await client.admin.stats()).leases < 4:
                    await asyncio.sleep(0.01)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                go.set()
                while (await client.admin.stats()).leases:
                    await asyncio.sleep(0.01)
                asking = asyncio.create_task(client.fetch_many([FetchQuery(cache, tokens(0))] * 4))
                await asyncio.sleep(0)
                asking.cancel()

    asyncio.run(scenario())


def test_fetch_and_reserve(make_client: Any, sidecar: Any) -> None:
    async def scenario() -> None:
        async with make_client(sidecar.target) as client:
            cache = client.namespace(model="m", page_bytes=PAGE)
            await cache.store(tokens(0, 2), data(0)[:2])
            found = await cache.fetch_and_reserve(tokens(0))
            lease, room = found
            assert (len(lease), list(room.missing)) == (2, [2, 3, 4, 5])
            for page in room.missing:
                await room.write(page, data(0)[page])
            assert (await room.commit()).stored_pages == 4
            await lease.release()
            again, nothing = await cache.fetch_and_reserve(tokens(0))
            assert (len(again), nothing.missing_pages, nothing.ended) == (PAGES, 0, True)
            into = np.zeros((PAGES, PAGE), np.uint8)
            await again.copy_into(into)
            assert (into == data(0)).all()
            await again.release()
            stats = await client.admin.stats()
            assert (stats.leases, stats.reservations) == (0, 0)

    asyncio.run(scenario())


def test_without_room_at_once_there_is_a_lease_alone(idle_sidecar: Any) -> None:
    idle_sidecar.service |= {"host_bytes": 1 << 20, "host_segment_bytes": 1 << 20}
    sidecar = idle_sidecar.start()
    with hicache.Client(sidecar.target) as client:
        cache = client.namespace(model="m", page_bytes=PAGE)
        cache.store(tokens(0), data(0))
        held = [cache.fetch(tokens(0))]
        rooms = []
        for salt in itertools.count(1):
            lease, room = cache.fetch_and_reserve(tokens(salt))
            held.append(lease)
            if room is None:
                break
            rooms.append(room)
        assert rooms and len(cache.fetch(tokens(0))) == PAGES
        for room in rooms:
            room.abort()
        client.release(held)
