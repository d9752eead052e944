"""What goes wrong with paged KV, and that it goes no further: leases end, regions go, calls make no sense."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from kv_kit import LAYERS, Engine, Kv, Stepped, engine, mappings, packed
from server_kit import PAGE_BYTES, failure, open_fds, run, until

from hicache.device.kv import FAILED
from hicache.rpc.common import fdproto
from hicache.rpc.pb import cache_pb2, region_pb2
from hicache.runtime.extents import lease_slots

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
ROWS = [[0], [4], [8]]
TARGETS = [[64], [68], [72]]


async def stored(session: Engine, stepped: Stepped | None = None) -> tuple[Kv, int, Any]:
    """An engine whose pages are cached and leased."""
    kv = Kv()
    kv.fill(7)
    region = await session.register(kv)
    commit = asyncio.ensure_future(session.store(region, ROWS))
    if stepped is not None:
        await finished(commit, stepped)
    assert (await commit).stored_pages == len(ROWS)
    return kv, region, await session.fetch(len(ROWS))


async def finished(call: asyncio.Future[Any], stepped: Stepped) -> None:
    async with asyncio.timeout(10):
        while not call.done():
            stepped.step()
            await asyncio.sleep(0.001)


async def begun(call: Awaitable[Any], house: Any, transfers: int = 1) -> asyncio.Future[Any]:
    """A call that has a transfer under way."""
    future = asyncio.ensure_future(call)
    await until(lambda: house.service.stats().counters["transfers_in_flight"] == transfers or future.done())
    assert not future.done(), future
    return future


@pytest.mark.parametrize("how", ["released", "expired", "session"])
def test_a_lease_that_ends_meanwhile_makes_all_pages_missing(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        stepped = Stepped()
        async with engine(tmp_path, open_transfers=stepped) as (house, session):
            kv, region, lease = await stored(session, stepped)
            if how == "expired":
                lease = await session.fetch(3, ttl_ms=30)
            timeline, counters = await session.timeline()
            load = await begun(
                session.load(lease.lease_id, region, TARGETS, timeline_id=timeline, counter=1), house
            )
            stepped.step()
            idle: list[bool] = []  # the segment that the load reads stays, whatever becomes of the lease
            port = house.service._house.ports[0]
            port.busy.when_idle(0, lambda: idle.append(True))
            if how == "released":
                await session.release(lease.lease_id)
            elif how == "expired":
                await asyncio.sleep(0.1)
            else:
                house.server._sessions.end(
                    house.server._sessions.find(session.id), dead=True, why="a test's doing"
                )
            await asyncio.sleep(0.02)
            assert not idle
            await stepped.finish()
            assert idle == [True]
            answer = await load
            assert (answer.loaded_pages, [*answer.missing_pages]) == (0, [0, 1, 2])
            assert f"lease {lease.lease_id}" in answer.reason
            assert counters.get(1) == FAILED
            await until(lambda: not house.service.stats().counters["transfers_in_flight"])
            counters.close()
            kv.close()

    run(main())


def test_layers_arrive_one_after_the_other(tmp_path: Path) -> None:
    async def main() -> None:
        stepped = Stepped()
        async with engine(tmp_path, open_transfers=stepped) as (house, session):
            kv, region, lease = await stored(session, stepped)
            timeline, counters = await session.timeline()
            call = session.load(lease.lease_id, region, TARGETS, timeline_id=timeline, counter=3)
            load = await begun(call, house)
            seen = [counters.get(3)]
            while not load.done():
                stepped.step()
                await asyncio.sleep(0.001)
                count = counters.get(3)
                for layer in range(count):  # what is counted is there
                    assert (kv.planes[2 * layer, 64:76] == kv.planes[2 * layer, :12]).all()
                if count != seen[-1]:
                    seen.append(count)
            assert seen == list(range(LAYERS + 1))
            assert (await load).loaded_pages == 3
            counters.close()
            kv.close()

    run(main())


def test_a_commit_takes_layers_as_they_are_computed(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (house, session):
            kv, rng = Kv(), np.random.default_rng(5)
            region = await session.register(kv)
            timeline, counters = await session.timeline()
            reserved = await session.reserve(3)
            call = session.commit(region, reserved.reservation_id, ROWS, timeline_id=timeline, counter=0)
            commit = await begun(call, house)
            for layer in range(LAYERS):
                await asyncio.sleep(0.01)
                assert not commit.done()
                kv.planes[2 * layer : 2 * layer + 2] = rng.integers(
                    0, 256, (2, *kv.planes.shape[1:]), np.uint8
                )
                counters.set(0, layer + 1)
            assert (await commit).stored_pages == 3
            lease = await session.fetch(3)
            loaded = await session.load(lease.lease_id, region, TARGETS)
            assert loaded.loaded_pages == 3
            assert [kv.page(row) for row in TARGETS] == [kv.page(row) for row in ROWS]
            counters.close()
            kv.close()

    run(main())


@pytest.mark.parametrize("how", ["late", "given up", "unregistered", "timeline gone", "ended"])
def test_layers_that_never_come(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (house, session):
            kv = Kv()
            region = await session.register(kv)
            timeline, counters = await session.timeline()
            reserved = await session.reserve(3)
            wait = 60 if how == "late" else 0
            fields = {"timeline_id": timeline, "counter": 0, "layers_wait_ms": wait}
            commit = await begun(session.commit(region, reserved.reservation_id, ROWS, **fields), house)
            counters.set(0, 2)
            if how == "given up":
                counters.set(0, FAILED)
            elif how == "unregistered":
                await session.unregister(region)
            elif how == "timeline gone":
                await session.unregister(timeline)
            elif how == "ended":
                house.server._sessions.end(
                    house.server._sessions.find(session.id), dead=True, why="a test's doing"
                )
            error = await failure(commit)
            if how != "ended":
                assert error.code() is grpc.StatusCode.DATA_LOSS
                assert "3 pages of the commit were not taken" in str(error.details())
            await until(lambda: not house.service.stats().counters["transfers_in_flight"])
            assert house.service.stats().engine.counters.committed_pages == 0
            if how in {"late", "given up"}:  # nothing was taken: they may be committed again
                counters.set(0, LAYERS)
                again = await session.commit(region, reserved.reservation_id, ROWS, **fields)
                assert again.stored_pages == 3
            if how != "ended":
                assert house.service.stats().counters["failed_kv_commits"] == 1
            counters.close()
            kv.close()

    run(main())


def test_unregistering_waits_for_a_load(tmp_path: Path) -> None:
    async def main() -> None:
        stepped = Stepped()
        async with engine(tmp_path, open_transfers=stepped) as (house, session):
            kv, region, lease = await stored(session, stepped)
            mine = mappings("engine")
            load = await begun(session.load(lease.lease_id, region, TARGETS), house)
            going = [asyncio.ensure_future(session.unregister(region)) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert not any(each.done() for each in going)
            assert mappings("engine") == mine
            error = await failure(session.load(lease.lease_id, region, TARGETS))
            assert error.code() is NOT_FOUND
            await stepped.finish()
            assert (await load).loaded_pages == 3
            assert kv.page(TARGETS[2]) == kv.page(ROWS[2])
            await asyncio.gather(*going)
            assert mappings("engine") == mine - 1
            kv.close()

    run(main())


def test_a_call_that_is_cancelled_does_not_stop_its_load(tmp_path: Path) -> None:
    async def main() -> None:
        stepped = Stepped()
        async with engine(tmp_path, open_transfers=stepped) as (house, session):
            kv, region, lease = await stored(session, stepped)
            timeline, counters = await session.timeline()
            fields = {"timeline_id": timeline, "counter": 0}
            load = await begun(session.load(lease.lease_id, region, TARGETS, **fields), house)
            load.cancel()
            await asyncio.sleep(0.05)
            assert house.service.stats().counters["transfers_in_flight"] == 1
            error = await failure(session.load(lease.lease_id, region, TARGETS, **fields))
            assert error.code() is INVALID
            assert "another transfer" in str(error.details())
            await stepped.finish()
            assert counters.get(0) == LAYERS
            assert house.service.stats().counters["loaded_pages"] == 3
            again = await begun(session.load(lease.lease_id, region, TARGETS, **fields), house)
            await finished(again, stepped)
            counters.close()
            kv.close()

    run(main())


def test_a_load_that_is_tried_again_answers_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        stepped = Stepped()
        async with engine(tmp_path, open_transfers=stepped) as (house, session):
            kv, region, lease = await stored(session, stepped)
            request = session.load_request(lease.lease_id, region, TARGETS, request_id=b"one")
            first = await begun(session.client.cache.Load(request), house)
            second = asyncio.ensure_future(_call(session.client.cache.Load(request)))
            first.cancel()
            await finished(second, stepped)
            assert (await second).loaded_pages == 3
            assert await session.client.cache.Load(request) == await second
            assert house.service.stats().counters["loads"] == 1
            request.first_layer = 1
            assert (await failure(session.client.cache.Load(request))).code() is (
                grpc.StatusCode.ALREADY_EXISTS
            )
            kv.close()

    run(main())


async def _call(call: Any) -> Any:
    return await call


def test_corrupt_pages_are_named_and_leave(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (house, session):
            kv, region, lease = await stored(session)
            view = house.service.lease_view(1, lease.lease_id)
            memory = house.service._house.ports[view.tier].addressable
            memory.views(lease_slots(view)[1:2])[0][50] ^= 1
            timeline, counters = await session.timeline()
            unverified = await session.load(lease.lease_id, region, TARGETS, unverified=True)
            assert unverified.loaded_pages == 3
            fields = {"timeline_id": timeline, "counter": 0}
            loaded = await session.load(lease.lease_id, region, TARGETS, **fields)
            assert (loaded.loaded_pages, [*loaded.corrupt_pages]) == (2, [1])
            assert counters.get(0) == FAILED
            assert sum(house.service.stats().engine.counters.corrupt_pages) == 1
            after = await session.fetch(3)
            assert after.matched_pages == 1
            assert house.service.stats().counters["load_corrupt_pages"] == 1
            counters.close()
            kv.close()

    run(main())


def test_pages_that_are_not_there_yet_are_missing(tmp_path: Path) -> None:
    """The tier lost what follows a page: the first is loaded, the counter tells of no arrival."""

    async def main() -> None:
        async with engine(tmp_path) as (house, session):
            kv, region, lease = await stored(session)
            view = house.service.lease_view(1, lease.lease_id)
            memory = house.service._house.ports[view.tier].addressable
            memory.views(lease_slots(view)[1:2])[0][50] ^= 1
            await session.load(lease.lease_id, region, TARGETS)
            timeline, counters = await session.timeline()
            fields = {"timeline_id": timeline, "counter": 2}
            loaded = await session.load(lease.lease_id, region, TARGETS, **fields)
            assert (loaded.loaded_pages, [*loaded.missing_pages]) == (1, [1, 2])
            assert counters.get(2) == FAILED
            assert kv.page(TARGETS[0]) == kv.page(ROWS[0])
            loaded = await session.load(lease.lease_id, region, TARGETS[1:], first_page=1, **fields)
            assert (loaded.loaded_pages, [*loaded.missing_pages]) == (0, [1, 2])
            counters.close()
            kv.close()

    run(main())


def test_ranks_load_their_parts_and_commit_whole_pages_only(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (house, _):
            session = await Engine.attach(house.client, world_size=2, page_bytes=2 * PAGE_BYTES)
            whole = Kv(planes=16)
            whole.fill(4)
            region = await session.register(whole)
            assert (await session.store(region, ROWS)).stored_pages == 3
            rank = Kv()
            part = await session.register(rank, page_offset=PAGE_BYTES)
            lease = await session.fetch(3)
            assert (await session.load(lease.lease_id, part, TARGETS)).loaded_pages == 3
            for row, target in zip(ROWS, TARGETS, strict=True):
                assert rank.page(target) == whole.page(row)[PAGE_BYTES:]
            error = await failure(session.commit(part, 1 << 40, ROWS))
            assert error.code() is NOT_FOUND
            reserved = await session.client.cache.Reserve(
                cache_pb2.ReserveRequest(
                    session_id=session.id, namespace_id=session.namespace, prompt=b"\1\0\0\0" * 12
                )
            )
            error = await failure(session.commit(part, reserved.reservation_id, ROWS))
            assert error.code() is INVALID
            assert "gather the ranks' parts" in str(error.details())
            over = await session.register(rank, page_offset=PAGE_BYTES + 2)
            assert (await failure(session.load(lease.lease_id, over, TARGETS))).code() is INVALID
            whole.close()
            rank.close()

    run(main())


def test_others_regions_and_timelines_do_not_exist(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (house, session):
            kv, region, lease = await stored(session)
            timeline, counters = await session.timeline()
            other = await Engine.attach(house.client)
            mine = await other.register(kv)
            theirs = await other.fetch(3)
            for call in (
                other.load(theirs.lease_id, region, TARGETS),
                other.load(lease.lease_id, mine, TARGETS),
                other.load(theirs.lease_id, mine, TARGETS, timeline_id=timeline),
                other.commit(region, 1, ROWS),
            ):
                assert (await failure(call)).code() is NOT_FOUND
            with pytest.raises(Exception, match="gone or never was"):
                await other.client.transact(fdproto.Get(other.id, timeline))
            with pytest.raises(Exception, match="not one that this session"):
                await session.client.transact(fdproto.Get(session.id, region))
            await other.unregister(region)  # not its own: nothing happens
            assert (await session.load(lease.lease_id, region, TARGETS)).loaded_pages == 3
            counters.close()
            kv.close()

    run(main())


def test_what_cannot_be_registered(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path, server={"max_regions_per_session": 3}) as (house, session):
            kv, loose = Kv(), Kv(seal=False)
            before = open_fds()
            size = kv.size_bytes
            plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
            os.ftruncate(plain, size)
            for fd, changes, words in (
                (loose.fd, {}, "sealed against shrinking"),
                (plain, {}, "memfd"),
                (kv.fd, {"blocks": 17}, "which has"),
                (kv.fd, {"plane_offset": [0] * 7}, "planes"),
                (kv.fd, {"plane_memory": [1] * 8}, "which is none"),
                (kv.fd, {"strides": [1, 2, 3]}, "3 strides"),
                (kv.fd, {"strides": [1, -2, 3, 4]}, "none negative"),
                (kv.fd, {"planes_per_layer": 3}, "layers of 3"),
                (kv.fd, {"planes_per_layer": 0}, "positive"),
                (kv.fd, {"element_bytes": 3}, "1, 2, 4 or 8"),
                (kv.fd, {"blocks": 1 << 63}, "largest number"),
                (kv.fd, {"memories": []}, "0 memories"),
                (kv.fd, {"memories": [region_pb2.Memory(size_bytes=size)]}, "without a handle"),
            ):
                error = await failure(session.register(fd_owner(fd, kv), **changes))
                assert error.code() is INVALID, error.details()
                assert words in str(error.details())
            os.close(plain)
            token = await session.put(kv.fd)
            one = region_pb2.Memory(size_bytes=size, fd_token=token)
            larger = region_pb2.Memory(size_bytes=size + 4096, fd_token=await session.put(kv.fd))
            cuda = region_pb2.Memory(size_bytes=size, cuda_ipc=b"h" * 64, device_uuid=b"u" * 16)
            vmm = region_pb2.Memory(
                size_bytes=size, cuda_fd_token=await session.put(kv.fd), device_uuid=b"u" * 16
            )
            short = region_pb2.Memory(size_bytes=size, cuda_ipc=b"h" * 63, device_uuid=b"u" * 16)
            for memories, code in (
                ([one, one], NOT_FOUND),
                ([one], NOT_FOUND),  # it was redeemed, and closed
                ([larger], INVALID),
                ([cuda], grpc.StatusCode.UNIMPLEMENTED),
                ([vmm], grpc.StatusCode.UNIMPLEMENTED),
                ([short], INVALID),
            ):
                error = await failure(session.register(kv, memories=memories))
                assert error.code() is code, error.details()
            for counters in (0, 65_537):
                request = region_pb2.RegisterRequest(
                    session_id=session.id, timeline=region_pb2.Timeline(counters=counters)
                )
                assert (await failure(house.client.region.Register(request))).code() is INVALID
            house.server._descriptors.clear()
            await until(lambda: open_fds() <= before)
            for _ in range(3):
                await session.register(kv)
            error = await failure(session.register(kv))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            loose.close()
            kv.close()

    run(main())


def fd_owner(fd: int, kv: Kv) -> Any:
    """A Kv that says what another does, with another descriptor."""
    found = object.__new__(Kv)
    found.__dict__ = {**kv.__dict__, "fd": fd}
    return found


def test_calls_that_make_no_sense_change_nothing(tmp_path: Path) -> None:
    """Hundreds of them; each is refused with words, and the server goes on."""

    async def main() -> None:
        async with engine(tmp_path) as (house, session):
            kv, region, lease = await stored(session)
            timeline, counters = await session.timeline()
            plain = os.memfd_create("plain")
            os.ftruncate(plain, 4 * PAGE_BYTES)
            request = region_pb2.RegisterRequest(session_id=session.id, fd_token=await session.put(plain))
            client = (await house.client.region.Register(request)).region_id
            reserved = await session.client.cache.Reserve(
                cache_pb2.ReserveRequest(
                    session_id=session.id, namespace_id=session.namespace, prompt=b"\1\0\0\0" * 12
                )
            )
            before, planes = house.service.stats(), kv.planes.copy()
            ids = {"lease": lease.lease_id, "region": region, "timeline": timeline, "client": client}
            rng = random.Random(11)
            for number in range(300):
                if number % 2:
                    call = house.client.cache.Load(_bad_load(rng, session.id, ids))
                else:
                    call = house.client.cache.Commit(
                        _bad_commit(rng, session.id, ids, reserved.reservation_id)
                    )
                error = await failure(call)
                assert error.code() in {INVALID, NOT_FOUND}, error.details()
                assert len(str(error.details())) > 15
            after = house.service.stats()
            assert (kv.planes == planes).all()
            assert [counters.get(at) for at in range(4)] == [0] * 4
            for name in ("loads", "kv_commits", "transfers_in_flight", "loaded_pages"):
                assert after.counters[name] == before.counters[name], name
            assert after.engine.reservations == 1
            assert (await session.load(lease.lease_id, region, TARGETS)).loaded_pages == 3
            good = await session.commit(region, reserved.reservation_id, ROWS)
            assert good.stored_pages == 3
            counters.close()
            os.close(plain)
            kv.close()

    run(main())


def _bad_load(rng: random.Random, session: bytes, ids: dict[str, int]) -> cache_pb2.LoadRequest:
    """A good Load with one thing or two wrong."""
    fields: dict[str, Any] = {
        "lease_id": ids["lease"],
        "region_id": ids["region"],
        "page_units": 1,
        "places": packed(TARGETS),
        "timeline_id": ids["timeline"],
    }
    wrong: list[dict[str, Any]] = [
        {"lease_id": rng.randrange(1 << 40, 1 << 60)},
        {"region_id": rng.choice([0, ids["timeline"], ids["client"], 1 << 50])},
        {"page_units": rng.choice([0, 3, 5, 1 << 31])},
        {"places": rng.choice([b"", b"x", packed(TARGETS)[:-1], packed([*TARGETS, [80]])])},
        {"places": packed([[rng.choice([128, 1 << 40, 126, 6])], [0], [0]])},
        {"places": packed([[5], [0], [0]])},
        {"first_page": rng.choice([1, 3, (1 << 32) - 1])},
        {"first_layer": rng.choice([LAYERS, 1 << 31])},
        {"first_layer": 1, "layers": LAYERS},
        {"layers": rng.choice([LAYERS + 1, (1 << 32) - 1])},
        {"timeline_id": rng.choice([ids["region"], 1 << 50])},
        {"counter": rng.choice([4, (1 << 32) - 1])},
        {"timeline_id": 0, "counter": 1},
    ]
    fields |= rng.choice(wrong)
    return cache_pb2.LoadRequest(session_id=session, **fields)


def _bad_commit(
    rng: random.Random, session: bytes, ids: dict[str, int], reservation: int
) -> cache_pb2.CommitRequest:
    fields: dict[str, Any] = {
        "reservation_id": reservation,
        "first_page": [0],
        "pages": [3],
        "region_id": [ids["region"]],
        "offset": [0],
        "page_units": 1,
        "places": packed(ROWS),
        "timeline_id": ids["timeline"],
        "layers_wait_ms": 50,
    }
    region = ids["region"]
    wrong: list[dict[str, Any]] = [
        {"reservation_id": 1 << 50},
        {"region_id": [ids["client"]]},
        {"region_id": [ids["timeline"]]},
        {"offset": [8]},
        {"first_page": [0, 1], "pages": [1, 2], "offset": [0, 0], "region_id": [region, ids["client"]]},
        {
            "first_page": [0, 2],
            "pages": [1, 1],
            "offset": [0, 0],
            "region_id": [region] * 2,
            "places": packed(ROWS[:2]),
        },
        {"first_page": [1]},
        {"pages": [2]},
        {"page_units": 0, "places": b"", "timeline_id": 0, "layers_wait_ms": 0},
        {"page_units": rng.choice([0, 3, 1 << 31])},
        {"places": packed([[-1], [0], [4]])},
        {"places": packed([[128], [0], [4]])},
        {"places": packed([[6], [0], [4]])},
        {"counter": 9},
        {"timeline_id": ids["client"]},
        {"checksums": [1, 2]},
    ]
    fields |= rng.choice(wrong)
    return cache_pb2.CommitRequest(session_id=session, **fields)


def test_nothing_stays_behind(tmp_path: Path) -> None:
    """Sessions come with paged KV and timelines, and go in every way: no mapping and no descriptor outlives them."""

    async def main() -> None:
        stepped = Stepped()
        async with engine(tmp_path, open_transfers=stepped) as (house, first):
            kv, region, _ = await stored(first, stepped)
            await first.unregister(region)
            maps, timelines, fds = mappings("engine"), mappings("hicache-timeline"), open_fds()
            for how in ("goodbye", "dead", "busy", "dead") * 3:
                session = await Engine.attach(house.client)
                mine = await session.register(kv)
                timeline, counters = await session.timeline()
                lease = await session.fetch(3)
                fields = {"timeline_id": timeline, "counter": 0}
                load = await begun(session.load(lease.lease_id, mine, TARGETS, **fields), house)
                counters.close()
                if how != "busy":
                    await finished(load, stepped)
                if how == "goodbye":
                    await session.attached.send(goodbye={})
                else:
                    sessions = house.server._sessions
                    sessions.end(sessions.find(session.id), dead=True, why="a test's doing")
                if how == "busy":
                    await asyncio.sleep(0.02)
                    assert mappings("engine") == maps + 1
                await stepped.finish()
                await until(lambda: mappings("engine") == maps)
                await until(lambda: mappings("hicache-timeline") == timelines)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await load
                session.attached.stream.cancel()
            await until(lambda: open_fds() <= fds)
            found = house.service.stats().counters
            assert (found["kv_regions"], found["timelines"], found["transfers_in_flight"]) == (0, 0, 0)
            kv.close()

    run(main())


def test_a_service_that_stops_ends_its_transfers(tmp_path: Path) -> None:
    async def main() -> None:
        maps = mappings("engine")
        kv = Kv()
        async with engine(tmp_path, open_transfers=Stepped()) as (house, session):
            region = await session.register(kv)
            timeline, counters = await session.timeline()
            reserved = await session.reserve(3)
            call = session.commit(region, reserved.reservation_id, ROWS, timeline_id=timeline)
            commit = await begun(call, house)
            counters.close()
        assert commit.done() or await failure(commit)
        kv.close()
        assert mappings("engine") == maps

    run(main())


def test_a_timeline_is_sealed(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (_, session):
            _, counters = await session.timeline(3)
            for size in (0, 8, 4096):
                with pytest.raises(PermissionError):
                    os.ftruncate(counters.fd, size)
            assert os.fstat(counters.fd).st_size == 24
            counters.close()

    run(main())


def test_many_loads_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (house, session):
            kv, region, lease = await stored(session)
            calls = [
                session.load(lease.lease_id, region, [[8 * block] for block in range(at % 8 + 5, at % 8 + 8)])
                for at in range(60)
            ]
            answers = await asyncio.gather(*calls)
            assert [answer.loaded_pages for answer in answers] == [3] * 60
            assert house.service.stats().counters["loaded_pages"] == 180
            kv.close()

    run(main())


def test_a_session_cannot_map_allocations_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (_, session):
            kv = Kv()
            first, fds = await session.register(kv), open_fds()
            refused = await failure(session.register(kv))
            assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "1 alloc" in refused.details()
            assert (open_fds(), mappings("engine")) == (fds, 2)  # the engine's own, and one here
            await session.unregister(first)
            await session.register(kv)
            kv.close()

    monkeypatch.setattr("hicache.runtime.kv_regions.MEMORIES_PER_SESSION", 1)
    run(main())
