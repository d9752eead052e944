"""How fast promotions are, what a Fetch says of the rest, and prefetch at look-up, over real stores."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from runtime_helpers import PAGE_BYTES, TestClient, prompt, running, settle

from hicache.runtime import Service, ServiceOptions
from hicache.runtime.pace import Pace
from hicache.types import Ack

MS = 1_000_000


def options(tmp_path: Path) -> ServiceOptions:
    return ServiceOptions(
        host_bytes=4 << 20, disk_path=str(tmp_path / "disk"), disk_bytes=32 << 20, prefault=False
    )


async def only_on_disk(service: Service, client: TestClient, pages: int) -> None:
    await client.store(pages, ack=Ack.DURABLE)
    await service.evict(client.namespace, prompt(pages), 0)
    assert service.match(client.namespace, prompt(pages)).run_tier == [1]


def test_pace_is_bytes_by_time_at_work() -> None:
    """Copies side by side share the time; idle time does not count."""
    pace = Pace()
    assert pace.wait_ms(1000) == 0
    pace.begin(1_000_000, 0)
    pace.begin(1_000_000, 0)
    pace.end(1_000_000, 1_000_000, 50 * MS)
    assert pace.bytes_per_s == 20e6
    pace.end(1_000_000, 1_000_000, 100 * MS)
    assert pace.bytes_per_s == 20e6
    pace.begin(4_000_000, 10_000 * MS)
    assert pace.wait_ms(1_000_000) == 200, "what is under way comes first"
    pace.end(4_000_000, 4_000_000, 10_100 * MS)
    assert 20e6 < pace.bytes_per_s < 40e6
    assert pace.wait_ms(1) == 1


def test_copies_that_fail_are_no_pace() -> None:
    """Nothing moved: nothing is measured, and nothing is under way."""
    pace = Pace()
    pace.begin(1000, 0)
    pace.end(1000, 0, 5 * MS)
    assert (pace.bytes_per_s, pace.in_flight_bytes, pace.wait_ms(1000)) == (0.0, 0, 0)


@given(
    st.lists(
        st.tuples(st.integers(1, 1 << 24), st.integers(1, 500 * MS), st.integers(0, 500 * MS)), min_size=1
    )
)
def test_pace_stays_between_the_slowest_and_the_fastest_period(copies: list[tuple[int, int, int]]) -> None:
    """One copy after the other, with pauses: a mean of their rates."""
    pace, now = Pace(), 0
    for size, duration, pause in copies:
        now += pause
        pace.begin(size, now)
        now += duration
        pace.end(size, size, now)
    rates = [size * 1e9 / duration for size, duration, _ in copies]
    assert min(rates) * 0.999 <= pace.bytes_per_s <= max(rates) * 1.001
    assert pace.in_flight_bytes == 0


def test_a_fetch_says_what_is_missing_and_how_long_it_may_take(tmp_path: Path) -> None:
    """Nothing before a promotion was measured; then the rest by the measured pace; nothing once all is there."""

    async def main() -> None:
        async with running(options(tmp_path)) as service:
            client = TestClient(service)
            await only_on_disk(service, client, 100)
            result = await client.fetch(100, wait_ms=0)
            assert service.pending(result) == (100, 0)
            await service.wait_operation(client.session, result.operation, 5_000)
            whole = service.lease_view(client.session, result.lease)
            assert service.pending(whole) == (0, 0)
            client.release(whole)
            await service.evict(client.namespace, prompt(100), 0)
            again = await client.fetch(100, wait_ms=0)
            pages, wait_ms = service.pending(again)
            assert (pages, wait_ms > 0) == (100, True)
            assert again.page_bytes == PAGE_BYTES

    asyncio.run(main())


def test_a_look_up_with_prefetch_brings_pages_up(tmp_path: Path) -> None:
    """A Fetch that does not wait has them then; the counters say so."""

    async def main() -> None:
        async with running(options(tmp_path)) as service:
            client = TestClient(service)
            await only_on_disk(service, client, 50)
            assert service.match(client.namespace, prompt(50), prefetch=True).run_tier == [1]
            await settle(lambda: service.match(client.namespace, prompt(50)).run_tier == [0])
            result = await client.fetch(50, wait_ms=0)
            assert result.granted_pages == 50
            counters = service.stats().counters
            assert (counters["prefetched_pages"], counters["used_prefetched_pages"]) == (50, 50)

    asyncio.run(main())


def test_a_service_that_closes_amid_promotions_ends_them(tmp_path: Path) -> None:
    """What the disk has read still finds the host's slots; nothing is lost or raised."""

    async def main() -> None:
        for _ in range(5):
            async with running(options(tmp_path)) as service:
                await service.recovered()
                client = TestClient(service)
                await client.store(100, ack=Ack.DURABLE)
                await service.evict(client.namespace, prompt(100), 0)
                result = await client.fetch(100, wait_ms=0)
                assert result.operation

    asyncio.run(main())
