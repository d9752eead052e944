"""The service over real stores and the real engine."""

from __future__ import annotations

import asyncio
import mmap
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from runtime_helpers import (
    PAGE_BYTES,
    FakeClock,
    TestClient,
    checksum,
    memfd,
    namespace,
    open_fds,
    page,
    prompt,
    running,
    settle,
)

from hicache.engine.actions import CommitResult, FetchResult
from hicache.errors import (
    ConfigError,
    ExhaustedError,
    HicacheError,
    InvalidArgumentError,
    NotFoundError,
    StaleError,
    UnavailableError,
    UnsupportedError,
)
from hicache.runtime import Service, ServiceOptions, sources
from hicache.tier.region import read_region
from hicache.types import Ack, Outcome, SymbolKind, WritePolicy

HOST_ONLY = ServiceOptions(host_bytes=4 << 20, prefault=False)


def tiers(tmp_path: Path, which: str, **more: object) -> ServiceOptions:
    """Options with the tiers whose initials are given: d(evice), h(ost), k (disk)."""
    fields: dict[str, object] = {"prefault": False}
    if "d" in which:
        fields |= {"device": "cpu", "device_bytes": 4 << 20}
    if "h" in which:
        fields |= {"host_bytes": 4 << 20}
    if "k" in which:
        fields |= {"disk_path": str(tmp_path / "disk"), "disk_bytes": 32 << 20}
    return ServiceOptions(**(fields | more))  # type: ignore[arg-type]


def run(options: ServiceOptions, test: Callable[[Service, TestClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(options) as service:
            await test(service, TestClient(service))

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


@pytest.mark.parametrize("which", ["d", "h", "k", "dh", "dk", "hk", "dhk"])
def test_what_was_stored_is_fetched_and_read_whatever_the_tiers(tmp_path: Path, which: str) -> None:
    async def test(service: Service, client: TestClient) -> None:
        assert await client.store(20) == CommitResult(20, 0, 0, 0)
        assert client.match(25) == 20
        result = await client.fetch(25)
        assert (result.matched_pages, result.granted_pages, result.operation) == (20, 20, 0)
        assert await client.read(result) == 20
        columns = service.extents(result)
        assert sum(columns.pages) == (20 if "h" in which else 0)
        client.release(result)
        again = await client.store(20)
        assert again.reservation == 0

    run(tiers(tmp_path, which), test)


def test_extents_say_where_a_client_finds_its_pages(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        for salt in range(3):  # so that slots do not all follow each other
            await client.store(7 + salt, salt)
        await service.evict(client.namespace, prompt(8, 1))
        await client.store(12, 3)
        result = await client.fetch(12, 3)
        columns = service.extents(result)
        arenas = {arena.region_id: arena for arena in service.regions.arenas("default")}
        number = 0
        columns_of = zip(columns.pages, columns.region_id, columns.offset, columns.first_slot, strict=True)
        for pages, region, offset, first_slot in columns_of:
            arena = arenas[region]
            with mmap.mmap(
                service.regions.arena_fd("default", region), arena.size_bytes, prot=mmap.PROT_READ
            ) as view:
                for at in range(pages):
                    start = offset + at * arena.slot_stride
                    assert view[start : start + PAGE_BYTES] == page(number, 3)
                    assert columns.checksums[number] == checksum(page(number, 3))
                    counter = view[8 * (first_slot + at) : 8 * (first_slot + at) + 8]
                    assert int.from_bytes(counter, "little") == columns.generations[number]
                    number += 1
        assert number == 12

    run(HOST_ONLY, test)


def test_a_freed_slot_gets_a_new_generation() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(2)
        result = await client.fetch(2)
        before = service.extents(result).generations
        client.release(result)
        assert (await service.evict(client.namespace, prompt(2))).pages == 2
        await client.store(2)
        after = service.extents(await client.fetch(2)).generations
        assert all(new > old for old, new in zip(before, after, strict=True))

    run(HOST_ONLY, test)


# --- promotions


async def only_on_disk(service: Service, client: TestClient, pages: int) -> None:
    await client.store(pages, ack=Ack.DURABLE)
    for tier in range(len(service.specs) - 1):
        await service.evict(client.namespace, prompt(pages), tier)
    view = service.match(client.namespace, prompt(pages), touch=False)
    assert view.run_tier == [len(service.specs) - 1]


def test_a_fetch_waits_for_its_promotions(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await only_on_disk(service, client, 100)
        result = await client.fetch(100)
        assert (result.granted_pages, result.operation) == (100, 0)
        assert await client.read(result) == 100

    run(tiers(tmp_path, "hk"), test)


def test_a_fetch_that_does_not_wait_says_what_to_wait_for(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await only_on_disk(service, client, 10)
        result = await client.fetch(10, wait_ms=0)
        assert (result.granted_pages, bool(result.operation)) == (0, True)
        with pytest.raises(NotFoundError):
            await service.wait_operation(client.session + 1, result.operation, 0)
        view = await service.wait_operation(client.session, result.operation, 5_000)
        assert (view.done, view.moved_pages, view.lease) == (True, 10, result.lease)
        assert service.lease_view(client.session, result.lease).granted_pages == 10
        service.cancel_operation(client.session, result.operation)

    run(tiers(tmp_path, "hk"), test)


def test_a_cancelled_fetch_gives_its_lease_back_and_lets_promotions_go_on(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await only_on_disk(service, client, 50)
        call = asyncio.ensure_future(client.fetch(50))
        await asyncio.sleep(0)
        assert service.stats().engine.leases == 1
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert service.stats().engine.leases == 0
        await settle(lambda: service.stats().counters["copies_in_flight"] == 0)
        assert service.match(client.namespace, prompt(50), touch=True).run_tier[0] == 0

    run(tiers(tmp_path, "hk"), test)


def test_prefetch_and_pin(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await only_on_disk(service, client, 10)
        moving = await service.prefetch(client.session, client.namespace, prompt(10), 0)
        assert (moving.matched_pages, moving.moving_pages) == (10, 10)
        assert (await service.wait_operation(client.session, moving.operation, 5_000)).moved_pages == 10
        pin = await service.pin(client.namespace, prompt(10), 0)
        assert pin.pages == 10
        assert (await service.clear()).kept_pages >= 10
        await service.unpin(pin.pin)
        await service.unpin(pin.pin)
        assert (await service.clear(client.namespace)).pages == 10

    run(tiers(tmp_path, "hk"), test)


# --- storing


def test_a_short_region_stores_what_it_has(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        reserved = await service.reserve(client.session, client.namespace, prompt(4))
        info = service.regions.register(client.session, memfd(page(0) + page(1)))
        result = await service.commit(
            client.session, reserved.reservation, [(0, 4)], [(info.region_id, 0)], last=True
        )
        assert result == CommitResult(2, 0, 0, 2)
        assert client.match(4) == 2

    run(HOST_ONLY, test)


def test_a_wrong_checksum_is_not_stored() -> None:
    async def test(service: Service, client: TestClient) -> None:
        reserved = await service.reserve(client.session, client.namespace, prompt(2))
        info = service.regions.register(client.session, memfd(page(0) + page(1)))
        sums = [checksum(page(0)), 7]
        result = await service.commit(
            client.session, reserved.reservation, [(0, 2)], [(info.region_id, 0)], checksums=sums
        )
        assert (result.stored_pages, result.failed_pages) == (1, 1)
        retried = await service.commit(
            client.session, reserved.reservation, [(1, 1)], [(info.region_id, PAGE_BYTES)], last=True
        )
        assert retried.stored_pages == 1

    run(HOST_ONLY, test)


def test_malformed_commits_change_nothing() -> None:
    async def test(service: Service, client: TestClient) -> None:
        reserved = await service.reserve(client.session, client.namespace, prompt(2))
        region = service.regions.register(client.session, memfd(page(0))).region_id
        cases: list[tuple[list[tuple[int, int]], list[tuple[int, int]], list[int], type[HicacheError]]] = [
            ([(0, 1)], [], [], InvalidArgumentError),
            ([(0, 1)], [(region, -1)], [], InvalidArgumentError),
            ([(0, 1)], [(region, 0)], [1, 2], InvalidArgumentError),
            ([(0, 1)], [(region + 1, 0)], [], NotFoundError),
            ([(1, 1)], [(region, 0)], [], InvalidArgumentError),
            ([(0, 0)], [(region, 0)], [], InvalidArgumentError),
        ]
        for pieces, source, sums, error in cases:
            with pytest.raises(error):
                await service.commit(client.session, reserved.reservation, pieces, source, checksums=sums)
        with pytest.raises(NotFoundError):
            await service.commit(client.session, reserved.reservation + 99, [(0, 1)], [(region, 0)])
        service.abort(client.session, reserved.reservation)
        service.abort(client.session, reserved.reservation)
        assert client.match(2) == 0
        assert service.stats().engine.reservations == 0

    run(HOST_ONLY, test)


def test_a_session_that_ends_while_its_pages_are_copied_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()

    def slow(fd: int, offsets: Sequence[int], buffers: Sequence[memoryview]) -> list[Outcome]:
        assert go_on.wait(10)
        return read_region(fd, offsets, buffers)

    async def test(service: Service, client: TestClient) -> None:
        store = asyncio.ensure_future(client.store(500))
        await settle(lambda: service.stats().counters["copies_in_flight"] == 1)
        service.end_session(client.session, dead=True)
        service.end_session(client.session, dead=True)
        go_on.set()
        await asyncio.gather(store, return_exceptions=True)
        await settle(lambda: service.stats().counters["copies_in_flight"] == 0)
        stats = service.stats().engine
        assert (stats.sessions, stats.leases, stats.reservations) == (0, 0, 0)
        with pytest.raises(StaleError):
            await client.fetch(1)

    monkeypatch.setattr(sources, "read_region", slow)
    run(HOST_ONLY, test)


def test_no_room_is_refused_and_said() -> None:
    async def test(service: Service, client: TestClient) -> None:
        pages = (4 << 20) // PAGE_BYTES
        await client.store(pages)
        held = await client.fetch(pages)
        with pytest.raises(ExhaustedError) as caught:
            await service.reserve(client.session, client.namespace, prompt(5, 9), wait_ms=10)
        assert caught.value.retry_after_ms > 0
        waiting = asyncio.ensure_future(
            service.reserve(client.session, client.namespace, prompt(5, 9), wait_ms=5_000)
        )
        await asyncio.sleep(0.01)
        client.release(held)
        assert (await waiting).missing_pages == 5

    run(HOST_ONLY, test)


# --- time


def test_leases_end_with_their_time() -> None:
    async def main() -> None:
        clock = FakeClock()
        async with running(HOST_ONLY, clock) as service:
            client = TestClient(service)
            await client.store(3)
            result = await client.fetch(3, ttl_ms=1_000)
            assert result.expires_ms == service.now_ms() + 1_000
            clock.advance(900)
            renewed = await service.renew(client.session, [result.lease, 99], 500)
            assert (list(renewed.lost), renewed.expires_ms) == ([99], service.now_ms() + 500)
            clock.advance(499)
            assert service.lease_view(client.session, result.lease).granted_pages == 3
            clock.advance(1)
            with pytest.raises(NotFoundError):
                service.lease_view(client.session, result.lease)
            assert (await service.evict(client.namespace, prompt(3))).pages == 0  # the slots rest
            clock.advance(HOST_ONLY.expiry_grace_ms)
            assert (await service.evict(client.namespace, prompt(3))).pages == 3

    asyncio.run(main())


def test_a_suspended_session_ends_after_its_window() -> None:
    async def main() -> None:
        clock = FakeClock()
        async with running(HOST_ONLY, clock) as service:
            first, second = TestClient(service), TestClient(service)
            for client in (first, second):
                service.suspend_session(client.session, 500)
            service.resume_session(second.session)
            clock.advance(500)
            assert service.stats().engine.sessions == 1

    asyncio.run(main())


# --- namespaces and sessions


def test_a_namespace_has_one_number() -> None:
    async def test(service: Service, client: TestClient) -> None:
        assert service.open_namespace(client.spec) == (client.namespace, client.fingerprint)
        other, _ = service.open_namespace(namespace(tenant="blue"))
        assert other != client.namespace
        await client.store(2)
        assert service.match(other, prompt(2)).pages == 0
        with pytest.raises(NotFoundError):
            service.match(99, b"")
        with pytest.raises(InvalidArgumentError):
            service.match(client.namespace, b"abc")
        nodes, omitted = service.tree_view(client.namespace, 10)
        assert (len(nodes), nodes[0].pages, omitted) == (1, 2, 0)

    run(HOST_ONLY, test)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": ""}, InvalidArgumentError, "model"),
        ({"codec": "int4"}, UnsupportedError, "codec"),
        ({"page_bytes": 3 << 20}, ConfigError, "--host-segment-bytes"),
        ({"symbol_kind": SymbolKind.HASHES}, InvalidArgumentError, "symbol_hash_bytes"),
    ],
)
def test_namespaces_that_cannot_be_served(
    changes: dict[str, object], error: type[HicacheError], words: str
) -> None:
    async def test(service: Service, _: TestClient) -> None:
        with pytest.raises(error, match=words):
            service.open_namespace(namespace(**changes))

    run(HOST_ONLY, test)


def test_pages_too_large_for_the_disk_name_its_flag(tmp_path: Path) -> None:
    async def test(service: Service, _: TestClient) -> None:
        with pytest.raises(ConfigError, match="--disk-bytes"):
            service.open_namespace(namespace(page_bytes=16 << 20))

    run(tiers(tmp_path, "k"), test)


def test_room_moves_between_tenants_when_the_sessions_have_let_go() -> None:
    """A segment that a session still maps counts against the capacity, and is not given to another tenant."""

    async def test(service: Service, red: TestClient) -> None:
        pages = (4 << 20) // PAGE_BYTES
        await red.store(pages)
        mapped: dict[int, set[int]] = {}

        def retire(tenant: str, region: int) -> set[int]:
            assert tenant == "default"
            mapped[region] = {red.session}
            return {red.session}

        service.regions.on_retired = retire
        blue = TestClient(service, tenant="blue")
        asked = asyncio.ensure_future(service.reserve(blue.session, blue.namespace, prompt(3), wait_ms=5_000))
        await settle(lambda: bool(mapped))
        await asyncio.sleep(0.02)
        assert not asked.done()
        assert service.stats().counters["regions_retiring"] == 1
        (region,) = mapped
        with pytest.raises(NotFoundError):
            service.regions.arena_fd("default", region)
        service.regions.released(red.session, region)
        assert (await asked).missing_pages == 3
        assert len(service.regions.arenas("blue")) == 1

    run(HOST_ONLY, test)


# --- the end


def test_drain_saves_everything_and_refuses_new_work(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        told: list[int] = []
        service.on_draining.append(told.append)
        await client.store(30)
        result = await service.drain(5_000)
        assert (result.unsaved_pages, service.state, told) == (0, "draining", [5_000])
        for call in (client.fetch(1), client.store(1), service.pin(client.namespace, prompt(1), 0)):
            with pytest.raises(UnavailableError):
                await call
        with pytest.raises(UnavailableError):
            service.open_session("default", "late")
        assert client.match(30) == 30
        assert (await service.drain(100)).unsaved_pages == 0
        assert told == [5_000]

    run(tiers(tmp_path, "dhk"), test)


def test_without_a_durable_tier_a_drain_says_what_is_lost() -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(5)
        assert (await service.drain(1_000)).unsaved_pages == 5

    run(HOST_ONLY, test)


def test_close_refuses_who_waits(tmp_path: Path) -> None:
    async def main() -> None:
        service = Service(tiers(tmp_path, "hk"))
        await service.start()
        client = TestClient(service)
        await client.store(1000)
        held = await client.fetch(1000)
        assert held.granted_pages == 1000
        waiting = asyncio.ensure_future(
            service.reserve(client.session, client.namespace, prompt(900, 5), wait_ms=60_000)
        )
        await asyncio.sleep(0)
        await service.close()
        await service.close()
        with pytest.raises(UnavailableError):
            await waiting
        with pytest.raises(UnavailableError):
            service.stats()
        assert service.state == "stopped"
        service.end_session(client.session, dead=False)

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


@pytest.mark.parametrize("which", ["d", "h", "k"])
def test_close_in_the_middle_of_a_commit(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that no worker has begun fail; nothing stays open."""

    def slow(fd: int, offsets: Sequence[int], buffers: Sequence[memoryview]) -> list[Outcome]:
        time.sleep(0.05)
        return read_region(fd, offsets, buffers)

    monkeypatch.setattr(sources, "read_region", slow)

    async def main() -> None:
        service = Service(tiers(tmp_path, which, workers=1, copy_chunk_bytes=8192, bounce_bytes=16384))
        await service.start()
        client = TestClient(service)
        store = asyncio.ensure_future(client.store(400))
        await settle(lambda: service.stats().counters["copy_chunks_queued"] > 0)
        house = service._running
        await service.close()
        with pytest.raises(UnavailableError):
            await store
        assert house.copier.in_flight == 0

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


def test_a_failed_engine_serves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def test(service: Service, client: TestClient) -> None:
        told: list[int] = []
        service.on_draining.append(told.append)
        await client.store(2)
        result = await client.fetch(2)
        house = service._house
        assert house is not None
        for each in house.engine._core.namespaces.values():
            each.tree = None  # type: ignore[assignment]  # break it
        with pytest.raises(UnavailableError):
            await client.fetch(2)
        assert (service.state, told) == ("failed", [0])
        for call in (client.fetch(2), client.store(3), service.drain(10), client.read(result)):
            with pytest.raises(UnavailableError):
                await call
        with pytest.raises(UnavailableError):
            client.match(2)

    run(HOST_ONLY, test)
    assert "the last events before it" in caplog.text


def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tiers(tmp_path, "hk")):
            with pytest.raises(ConfigError, match="in use"):
                await Service(tiers(tmp_path, "dhk")).start()

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


def test_a_device_that_is_not_there_closes_the_disk_again(tmp_path: Path) -> None:
    async def main() -> None:
        for _ in range(2):
            with pytest.raises(UnsupportedError):
                await Service(tiers(tmp_path, "dhk", device="cuda")).start()

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


def test_the_same_calls_give_the_same_actions() -> None:
    digests = []

    async def main() -> None:
        async with running(
            ServiceOptions(host_bytes=1 << 20, prefault=False, digest=True), FakeClock()
        ) as service:
            client = TestClient(service)
            for salt in range(8):
                await client.store(60, salt)
                client.release(await client.fetch(60, salt))
            digests.append(service.action_digest())

    asyncio.run(main())
    asyncio.run(main())
    assert digests[0] == digests[1] != ""


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_churn_over_all_tiers_stays_right(tmp_path: Path, policy: WritePolicy) -> None:
    """More than fits, from several clients at once: what is granted is right, and nothing stays held."""

    async def test(service: Service, _: TestClient) -> None:
        clients = [TestClient(service) for _ in range(4)]

        async def work(number: int) -> int:
            client, read = clients[number], 0
            for step in range(12):
                salt = (number * 5 + step * 3) % 17
                try:
                    await client.store(20 + salt, salt)
                except ExhaustedError:
                    continue
                result: FetchResult = await client.fetch(20 + salt, salt)
                if result.lease:
                    read += await client.read(result, salt)
                    client.release(result)
            return read

        assert sum(await asyncio.gather(*map(work, range(4)))) > 500
        await settle(lambda: service.stats().counters["copies_in_flight"] == 0)
        stats = service.stats()
        assert (stats.engine.leases, stats.engine.reservations) == (0, 0)
        assert all(tier.used_bytes <= tier.capacity_bytes for tier in stats.tiers)
        assert sum(tier.corrupt_pages for tier in stats.tiers) == 0

    options = tiers(
        tmp_path, "dhk", write_policy=policy, device_bytes=1 << 19, host_bytes=1 << 20, disk_bytes=8 << 20
    )
    run(options, test)
