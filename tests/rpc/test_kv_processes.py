"""Paged KV of another process: the whole path, and what becomes of a process that dies in the middle of it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from kv_kit import Kv, Stepped, engine, mappings
from server_kit import House, open_fds, run, until

CHILD = Path(__file__).with_name("kv_child.py")
ROWS = [[0], [4], [8]]


@contextlib.asynccontextmanager
async def child(house: House, what: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), house.options.socket_path, what, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def word(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return (await process.stdout.readline()).decode().strip()


def test_an_engine_in_another_process(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (house, _), child(house, "whole") as process:
            assert await word(process) == "done"
            async with asyncio.timeout(10):
                assert await process.wait() == 0
            counters = house.service.stats().counters
            assert (counters["packed_pages"], counters["loaded_pages"]) == (3, 3)
            await until(lambda: not mappings("engine"))

    run(main())


def test_an_engine_that_dies_in_the_middle_of_a_load(tmp_path: Path) -> None:
    async def main() -> None:
        stepped = Stepped()
        async with engine(tmp_path, open_transfers=stepped) as (house, session):
            kv = Kv()
            kv.fill(1)
            region = await session.register(kv)
            commit = asyncio.ensure_future(session.store(region, ROWS))
            while not commit.done():
                await stepped.finish()
            maps, fds = mappings("engine"), open_fds()
            async with child(house, "loading") as process:
                assert await word(process) == "loading"
                await until(lambda: house.service.stats().counters["transfers_in_flight"] == 1)
                stepped.step()
                process.kill()
                await until(lambda: house.service.stats().engine.sessions == 1)
                assert mappings("engine") == maps + 1  # until its transfer has ended
                assert house.service.stats().counters["kv_regions"] == 1
                await stepped.finish()
                await until(lambda: mappings("engine") == maps)
                assert house.service.stats().counters["failed_loads"] == 1
            await until(lambda: open_fds() <= fds)
            kv.close()

    run(main())


def test_an_engine_that_dies_before_its_layers_are_computed(tmp_path: Path) -> None:
    async def main() -> None:
        async with engine(tmp_path) as (house, session):
            await session.reserve(1)  # the tier's segment is open from here on
            maps, fds = mappings("engine"), open_fds()
            async with child(house, "computing") as process:
                assert await word(process) == "computing"
                assert house.service.stats().counters["transfers_in_flight"] == 1
                process.kill()
                await until(lambda: house.service.stats().engine.sessions == 1)
                await until(lambda: not house.service.stats().counters["transfers_in_flight"])
            await until(lambda: mappings("engine") == maps)
            await until(lambda: open_fds() <= fds)
            stats = house.service.stats()
            assert stats.engine.counters.committed_pages == 0
            assert stats.engine.reservations == 1
            assert (await session.reserve(3)).missing_pages == 3  # half of its layers are no page

    run(main())
