"""Reports of corrupt pages: what is really bad leaves, wherever it is bad; a false report harms nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from runtime_helpers import PAGE_BYTES, TestClient, page, prompt, running, settle

from hicache.engine.actions import FetchResult
from hicache.errors import InvalidArgumentError, NotFoundError
from hicache.runtime import Service, ServiceOptions
from hicache.runtime.extents import lease_slots
from hicache.types import Ack


def options(tmp_path: Path, which: str) -> ServiceOptions:
    fields: dict[str, object] = {"prefault": False, "scrub_bytes_per_s": 0}
    if "d" in which:
        fields |= {"device": "cpu", "device_bytes": 4 << 20}
    if "h" in which:
        fields |= {"host_bytes": 4 << 20}
    if "k" in which:
        fields |= {"disk_path": str(tmp_path / "disk"), "disk_bytes": 32 << 20}
    return ServiceOptions(**fields)  # type: ignore[arg-type]


def run(options: ServiceOptions, test: Callable[[Service, TestClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(options) as service:
            await test(service, TestClient(service))

    asyncio.run(main())


def rot(service: Service, result: FetchResult, number: int, tier: int = 0) -> None:
    """Flip a bit of a leased page where it lies."""
    house = service._house
    assert house is not None
    memory = house.ports[tier].addressable
    assert memory is not None
    (view,) = memory.views([lease_slots(result)[number]])
    view[100] ^= 4


def rot_on_disk(tmp_path: Path, number: int, salt: int = 0) -> None:
    """Flip a bit of a page in the data file, which the running store has mapped."""
    hit = 0
    for data in (tmp_path / "disk").rglob("*"):
        if not data.is_file() or data.stat().st_size < PAGE_BYTES:
            continue
        raw = data.read_bytes()
        needle = page(number, salt)[1000:1100]
        at = raw.find(needle)
        while at >= 0:
            with data.open("r+b") as file:
                file.seek(at)
                file.write(bytes([raw[at] ^ 1]))
            hit += 1
            at = raw.find(needle, at + 1)
    assert hit, "the page was found in the file"


def corrupt(service: Service) -> list[int]:
    return list(service.stats().engine.counters.corrupt_pages)


def test_false_reports_change_nothing(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(10)
        other = await client.fetch(10)
        result = await client.fetch(10)
        for pages in ([], [0], [9, 3, 3, 0], list(range(10))):
            assert await service.report_corrupt(client.session, result.lease, pages) == 0
        for pages in ([10], [0, 1 << 31], [-1]):
            with pytest.raises(InvalidArgumentError):
                await service.report_corrupt(client.session, result.lease, pages)
        with pytest.raises(NotFoundError):
            await service.report_corrupt(client.session, 999, [0])
        stranger = TestClient(service)
        with pytest.raises(NotFoundError):
            await service.report_corrupt(stranger.session, result.lease, [0])
        assert corrupt(service) == [0]
        assert await client.read(other) == await client.read(result) == 10
        assert client.match(10) == 10

    run(options(tmp_path, "h"), test)


@pytest.mark.parametrize("which", ["h", "hk"])
def test_what_is_bad_leaves_and_can_be_stored_again(tmp_path: Path, which: str) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(10)
        result = await client.fetch(10)
        rot(service, result, 4)
        rot(service, result, 7)
        assert await service.report_corrupt(client.session, result.lease, [2, 4, 7, 9]) == 2
        assert corrupt(service)[0] == 2
        assert service.lease_view(client.session, result.lease).granted_pages == 4
        assert await service.report_corrupt(client.session, result.lease, [4, 7]) == 0, "told already"
        after = await client.fetch(10)  # a new lease does not keep what is to leave
        assert after.granted_pages == 4
        client.release(result)
        assert client.match(10) == 4
        client.release(after)
        await client.store(10)
        again = await client.fetch(10)
        assert await client.read(again) == 10
        assert corrupt(service)[0] == 2

    run(options(tmp_path, which), test)


def test_a_sound_copy_below_goes_on_to_serve(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(6, ack=Ack.DURABLE)
        result = await client.fetch(6)
        rot(service, result, 3)
        assert await service.report_corrupt(client.session, result.lease, [3]) == 1
        client.release(result)
        assert corrupt(service) == [1, 0]
        assert client.match(6) == 6
        healed = await client.fetch(6)
        assert healed.granted_pages == 6
        assert await client.read(healed) == 6

    run(options(tmp_path, "hk"), test)


def test_a_bad_copy_below_leaves_too(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(6, ack=Ack.DURABLE)
        result = await client.fetch(6)
        rot(service, result, 3)
        rot_on_disk(tmp_path, 3)
        assert await service.report_corrupt(client.session, result.lease, [3]) == 1
        client.release(result)
        await settle(lambda: corrupt(service) == [1, 1])
        assert client.match(6) == 3
        await client.store(6)
        again = await client.fetch(6)
        assert await client.read(again) == 6

    run(options(tmp_path, "hk"), test)


def test_pages_leased_from_disk_are_looked_at_there(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(6, ack=Ack.DURABLE)
        result = await client.fetch(6)
        assert await service.report_corrupt(client.session, result.lease, [0, 5]) == 0
        rot_on_disk(tmp_path, 5)
        assert await service.report_corrupt(client.session, result.lease, [0, 5]) == 1
        client.release(result)
        assert client.match(6) == 5

    run(options(tmp_path, "k"), test)


def test_a_lease_that_ends_while_its_pages_are_read_says_so_and_nothing_is_dropped(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(4)
        result = await client.fetch(4)
        rot(service, result, 1)
        house = service._house
        assert house is not None
        held = house.ports[0].submit
        gate: list[Callable[[], None]] = []
        house.ports[0].submit = lambda *args, **kw: gate.append(lambda: held(*args, **kw))  # type: ignore[method-assign]
        call = asyncio.ensure_future(service.report_corrupt(client.session, result.lease, [1]))
        await settle(lambda: bool(gate))
        house.ports[0].submit = held  # type: ignore[method-assign]
        client.release(result)
        gate[0]()
        with pytest.raises(NotFoundError):
            await call
        assert corrupt(service) == [0]
        assert client.match(4) == 4

    run(options(tmp_path, "h"), test)


def test_a_page_leased_by_others_ends_their_leases_before_it(tmp_path: Path) -> None:
    async def test(service: Service, client: TestClient) -> None:
        await client.store(8)
        mine, theirs = await client.fetch(8), await client.fetch(8)
        rot(service, mine, 2)
        assert await service.report_corrupt(client.session, mine.lease, [2]) == 1
        assert service.lease_view(client.session, theirs.lease).granted_pages == 2
        before = service.extents(theirs).generations[2]
        client.release(mine)
        client.release(theirs)
        port = service._house.ports[0]  # type: ignore[union-attr]
        assert port.mappable is not None
        assert int(port.mappable.columns([lease_slots(theirs)[2]])[1][0]) != int(before)
        assert client.match(8) == 2
        assert prompt(8)  # what hung below it is stranded until it is stored again
        await client.store(3)
        assert client.match(8) >= 3

    run(options(tmp_path, "h"), test)
