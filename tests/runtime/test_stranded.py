"""A page in the middle rots: what hangs below it is stranded over restarts, and alive when it is stored again."""

from __future__ import annotations

import asyncio
from pathlib import Path

from runtime_helpers import TestClient, page, prompt, running, settle

from hicache.keys import chain_keys, fingerprint
from hicache.runtime import Service, ServiceOptions
from hicache.tier.disk import DiskStore
from hicache.types import Ack, Batch, Op

PAGES, ROTTEN = 20, 7


def options(tmp_path: Path) -> ServiceOptions:
    return ServiceOptions(
        host_bytes=8 << 20,
        disk_path=str(tmp_path / "disk"),
        disk_bytes=64 << 20,
        prefault=False,
        scrub_bytes_per_s=0,  # what rots is to be found by whom a test says
    )


def rot(folder: Path, data: bytes) -> int:
    """Flip a byte wherever a page's bytes stand in the folder's files; returns how often."""
    found = 0
    for path in folder.rglob("*"):
        content = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        at = content.find(data[: len(data) // 2])
        while at >= 0:
            content[at + 100] ^= 1
            path.write_bytes(content)
            found += 1
            at = content.find(data[: len(data) // 2], at + 1)
    return found


def disk_used(service: Service) -> int:
    return service.stats().tiers[-1].used_bytes


async def _store_all(tmp_path: Path) -> int:
    async with running(options(tmp_path)) as service:
        client = TestClient(service)
        assert (await client.store(PAGES, ack=Ack.DURABLE)).durable_pages == PAGES
        return disk_used(service)


async def _mend(tmp_path: Path, whole_bytes: int) -> None:
    """The rotten page is gone from the disk, all others are there: a restart, and the page stored again."""
    async with running(options(tmp_path)) as service:
        report = await service.recovered()
        assert (report.pages, report.orphan_pages) == (PAGES - 1, 0)
        client = TestClient(service)
        assert client.match(PAGES) == ROTTEN
        assert service.stats().counters["stranded_pages"] == PAGES - 1 - ROTTEN
        assert disk_used(service) == whole_bytes // PAGES * (PAGES - 1)
        written = service.stats().tiers[-1].bytes_in
        await client.store(ROTTEN + 1)
        assert client.match(PAGES) == PAGES
        await settle(lambda: service.stats().tiers[-1].bytes_in > written)  # the gap is mended
        await settle(lambda: service.stats().counters["copies_in_flight"] == 0)
        assert service.stats().tiers[-1].bytes_in - written == client.spec.page_bytes
        assert service.stats().counters["stranded_pages"] == 0
        assert disk_used(service) == whole_bytes
        assert await client.read(await client.fetch(PAGES)) == PAGES
    async with running(options(tmp_path)) as service:
        assert (await service.recovered()).pages == PAGES
        client = TestClient(service)
        assert client.match(PAGES) == PAGES
        assert service.stats().counters["stranded_pages"] == 0


def test_a_rotten_page_is_found_by_a_read_and_mended_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        whole_bytes = await _store_all(tmp_path)
        assert rot(tmp_path / "disk", page(ROTTEN)) == 1
        async with running(options(tmp_path)) as service:
            assert (await service.recovered()).pages == PAGES
            client = TestClient(service)
            result = await client.fetch(PAGES)
            assert await client.read(result) == ROTTEN
            client.release(result)
            await settle(lambda: client.match(PAGES) == ROTTEN)
            await service.evict(client.namespace, b"", 0)
            assert service.stats().counters["stranded_pages"] == PAGES - 1 - ROTTEN
        await _mend(tmp_path, whole_bytes)

    asyncio.run(main())


def test_a_lost_page_is_mended_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        whole_bytes = await _store_all(tmp_path)
        spec = None
        async with running(options(tmp_path)) as service:
            spec = TestClient(service).spec
        key = chain_keys(fingerprint(spec), prompt(PAGES), spec.symbol_bytes)[ROTTEN]
        store = DiskStore(str(tmp_path / "disk"), 64 << 20, lambda: None)
        store.submit(Batch(1, Op.DELETE, keys=[key]))
        store.close()
        await _mend(tmp_path, whole_bytes)

    asyncio.run(main())


def test_heat_outlives_the_process(tmp_path: Path) -> None:
    """What was used last leaves last, also after a restart."""

    async def first() -> None:
        async with running(options(tmp_path)) as service:
            client = TestClient(service)
            for salt in (1, 2, 3):
                await client.store(4, salt, ack=Ack.DURABLE)
                await asyncio.sleep(0.005)
            for salt in (2, 1, 1):
                client.release(await client.fetch(4, salt))
                await asyncio.sleep(0.005)

    async def second() -> list[int]:
        async with running(options(tmp_path)) as service:
            await service.recovered()
            client = TestClient(service)
            core = service._running.engine._core
            plan = core.namespaces[client.namespace].pools[-1].policy.begin()
            order, hits = [], {}
            while (ident := plan.next()) is not None:
                symbols = core.runs[ident].tree.prompt_to(core.runs[ident])
                salt = next(salt for salt in (1, 2, 3) if prompt(4, salt).startswith(symbols))
                order.append(salt)
                hits[salt] = core.runs[ident].hits
            plan.abort()
            assert hits == {1: 2, 2: 1, 3: 0}
            return order

    asyncio.run(first())
    assert asyncio.run(second()) == [3, 2, 1]
    assert asyncio.run(second()) == [3, 2, 1]
