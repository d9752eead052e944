"""A disk that fails, is slow, comes back and fails again: the service goes on, and so does its disk tier later."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from runtime_helpers import TestClient, running, settle

from hicache.runtime import Service, ServiceOptions, stores, watch
from hicache.tier.disk import DiskStore
from hicache.types import Ack, Batch, Completion, Notify, Op, Outcome

CHANGES = {Op.PUT, Op.DELETE, Op.PROBE}


class Flaky:
    """A disk store whose medium fails when the test says so. ``slow``: what is put waits until that is over."""

    def __init__(self, store: DiskStore, notify: Notify) -> None:
        self._store = store
        self._notify = notify
        self._failed: list[Completion] = []
        self._waiting: list[Batch] = []
        self.broken: set[Op] = set()
        self.slow = False
        self.seen: list[Op] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def submit(self, batch: Batch) -> None:
        self.seen.append(batch.op)
        if batch.op in self.broken:
            pages = len(batch.keys) or 1
            self._failed.append(
                Completion(
                    batch.id, (Outcome.FAULT,) * pages, (0,) * pages, (0,) * pages, "the medium says no"
                )
            )
            self._notify()
        elif self.slow and batch.op in CHANGES:
            self._waiting.append(batch)
        else:
            self._store.submit(batch)

    def go_on(self) -> None:
        """The medium is fast again."""
        self.slow = False
        waiting, self._waiting = self._waiting, []
        for batch in waiting:
            self._store.submit(batch)

    def poll(self) -> list[Completion]:
        failed, self._failed = self._failed, []
        return failed + self._store.poll()

    def close(self) -> None:
        self.go_on()
        self._store.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_MS", 20)
    monkeypatch.setattr(watch, "LONGEST_MS", 80)


@contextlib.asynccontextmanager
async def serving(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    broken: set[Op] = frozenset(),
    **more: object,  # type: ignore[assignment]
) -> AsyncIterator[tuple[Service, Flaky]]:
    made: list[Flaky] = []
    whole = stores._open_disk

    def flaky(options: ServiceOptions, notify: Notify, wall_ms: Callable[[], int]) -> Flaky:
        made.append(Flaky(whole(options, notify, wall_ms), notify))
        made[-1].broken = set(broken)
        return made[-1]

    monkeypatch.setattr(stores, "_open_disk", flaky)
    fields = {
        "host_bytes": 8 << 20,
        "disk_path": str(tmp_path / "disk"),
        "disk_bytes": 64 << 20,
        "prefault": False,
    }
    try:
        async with running(ServiceOptions(**(fields | more))) as service:  # type: ignore[arg-type]
            yield service, made[0]
    finally:
        monkeypatch.setattr(stores, "_open_disk", whole)


def disk(service: Service) -> tuple[str, str]:
    found = service.stats().tiers[-1]
    return found.state, found.reason


def test_a_durable_commit_on_a_broken_disk_is_answered_and_the_disk_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with serving(tmp_path, monkeypatch) as (service, store):
            await service.recovered()
            client = TestClient(service)
            assert (await client.store(4, 1, ack=Ack.DURABLE)).durable_pages == 4
            store.broken = set(CHANGES)
            assert (await client.store(6, 2, ack=Ack.DURABLE)).durable_pages == 0
            assert disk(service) == ("read-only", "the medium says no")
            assert client.match(6, 2) == 6
            assert client.match(4, 1) == 4
            await service.clear(client.namespace)  # what goes now is owed to the medium
            assert client.match(4, 1) == 0
            await settle(lambda: service.stats().counters["disk_degraded_ms"] > 30)
            assert store.seen.count(Op.PROBE) >= 1
            store.broken.clear()
            await settle(lambda: disk(service) == ("ok", ""))
            assert service.stats().counters["disk_degraded_ms"] == 0
            assert (await client.store(8, 3, ack=Ack.DURABLE)).durable_pages == 8
        async with serving(tmp_path, monkeypatch) as (service, _):
            report = await service.recovered()
            assert report.pages == 8  # what was cleared meanwhile has been deleted

    asyncio.run(main())


def test_a_disk_that_cannot_be_read_is_off_until_a_read_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with serving(tmp_path, monkeypatch) as (service, store):
            await service.recovered()
            client = TestClient(service)
            for salt in range(5):
                await client.store(2, salt, ack=Ack.DURABLE)
            await service.evict(client.namespace, b"", 0)
            store.broken = {Op.GET}
            for salt in range(4):
                client.release(await client.fetch(2, salt))
            await settle(lambda: disk(service)[0] == "off")
            assert client.match(2, 4) == 0
            probes = store.seen.count(Op.PROBE)
            await settle(lambda: store.seen.count(Op.PROBE) > probes + 1)
            assert disk(service)[0] == "off"  # it can be written, and that is not enough
            store.broken.clear()
            await settle(lambda: disk(service)[0] == "ok")
            assert (await client.store(3, 9, ack=Ack.DURABLE)).durable_pages == 3
            assert client.match(3, 9) == 3

    asyncio.run(main())


@pytest.mark.parametrize("broken", [{Op.PUT}, set(CHANGES), {Op.PUT, Op.GET}])
def test_a_disk_broken_from_the_start_is_recovered_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: set[Op]
) -> None:
    async def main() -> None:
        async with serving(tmp_path, monkeypatch) as (service, _):
            await service.recovered()
            await TestClient(service).store(40, 1, ack=Ack.DURABLE)
        async with serving(tmp_path, monkeypatch, broken=broken) as (service, store):
            client = TestClient(service)
            assert (await client.store(5, 2, ack=Ack.DURABLE)).durable_pages == 0
            assert (await service.recovered()).pages == 40
            assert client.match(40, 1) == 40
            store.broken.clear()
            await settle(lambda: disk(service)[0] == "ok")
            assert (await client.store(6, 2, ack=Ack.DURABLE)).durable_pages == 1
            assert await client.read(await client.fetch(40, 1), 1) == 40

    asyncio.run(main())


def test_a_drain_to_a_broken_disk_says_what_was_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with serving(tmp_path, monkeypatch, broken=set(CHANGES)) as (service, _):
            await service.recovered()
            await TestClient(service).store(30, 1)
            assert (await service.drain(10_000)).unsaved_pages == 30

    asyncio.run(main())


def test_a_slow_disk_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to it are bounded; the host tier serves; what would wait is dropped where the caller wants that."""

    async def main() -> None:
        async with serving(tmp_path, monkeypatch, host_bytes=1 << 20) as (service, store):
            await service.recovered()
            client = TestClient(service)
            store.slow = True
            durable = asyncio.ensure_future(client.store(2, 99, ack=Ack.DURABLE))
            await settle(lambda: service.stats().counters["disk_oldest_batch_ms"] > 20)
            assert disk(service)[0] == "ok"
            page_bytes = client.spec.page_bytes
            stored = 0
            while stored * page_bytes < 3 << 20:
                answer = await client.store(64, stored, wait_ms=20)
                assert answer.stored_pages == 64
                result = await client.fetch(8, stored)
                assert await client.read(result, stored) == 8
                client.release(result)
                stored += 64
            assert not durable.done()
            store.go_on()
            assert (await durable).durable_pages == 2
            await settle(lambda: service.stats().counters["disk_oldest_batch_ms"] == 0)

    asyncio.run(main())


def test_flapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever fails when, what is read is what was stored; in the end the disk is well and what it says is so."""

    async def main(rng: random.Random) -> None:
        kept: dict[int, int] = {}
        async with serving(tmp_path, monkeypatch, host_bytes=1 << 20) as (service, store):
            client = TestClient(service)
            for _ in range(120):
                if rng.random() < 0.2:
                    store.broken = set(rng.sample(sorted(Op, key=str), rng.randint(0, 3))) - {Op.FLUSH}
                salt, pages = rng.randint(0, 30), rng.randint(1, 12)
                if rng.random() < 0.6:
                    with contextlib.suppress(Exception):
                        await client.store(pages, salt, ack=rng.choice(list(Ack)), wait_ms=50)
                else:
                    result = await client.fetch(pages, salt, wait_ms=200)
                    if result.lease:
                        await client.read(result, salt)
                        client.release(result)
                if rng.random() < 0.3:
                    await asyncio.sleep(0.01)
                service.check()
            store.broken.clear()
            await settle(lambda: disk(service)[0] == "ok")
            for salt in range(100, 104):
                if (await client.store(5, salt, ack=Ack.DURABLE)).durable_pages == 5:
                    kept[salt] = 5
            assert len(kept) == 4
        async with serving(tmp_path, monkeypatch) as (service, _):
            await service.recovered()
            client = TestClient(service)
            for salt, pages in kept.items():
                assert client.match(pages, salt) == pages
                assert await client.read(await client.fetch(pages, salt), salt) == pages

    asyncio.run(main(random.Random(seed)))
