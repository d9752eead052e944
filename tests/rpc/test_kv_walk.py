"""Many sessions store out of and load into paged KV while pages are evicted under them: no wrong page is ever served.

The transfers are stepped between everything else, so that leases end, slots are used again and regions go in the
middle of copies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter
from pathlib import Path

import grpc
import numpy as np
import pytest
from kv_kit import BLOCK_TOKENS, BLOCKS, LAYERS, PLANES, TOKEN_BYTES, Counters, Engine, Kv, Stepped, engine
from server_kit import PAGE_BYTES, PAGE_TOKENS, House, run, tokens

from hicache.device.kv import FAILED
from hicache.rpc.pb import cache_pb2, region_pb2

PROMPTS, PAGES, WALKERS = 24, 8, 6
PLACES = BLOCKS * BLOCK_TOKENS // PAGE_TOKENS


def content(prompt: int, page: int) -> np.ndarray:
    data = np.random.default_rng((prompt, page)).integers(0, 256, PAGE_BYTES, np.uint8)
    return data.reshape(PLANES, PAGE_TOKENS, TOKEN_BYTES)


def symbols(prompt: int) -> bytes:
    return (prompt + 1).to_bytes(4, "little") + tokens(PAGE_TOKENS * PAGES)[4:]


class Walker:
    """One session with one KV; what it does next is drawn."""

    def __init__(self, session: Engine, seed: int) -> None:
        self.session = session
        self.random = random.Random(seed)
        self.kv = Kv()
        self.region = 0
        self.timeline = 0
        self.plain = -1
        self.plain_region = 0
        self.counters: Counters | None = None
        self.seen: Counter[str] = Counter()

    async def walk(self, steps: int) -> None:
        self.timeline, self.counters = await self.session.timeline()
        self.plain = os.memfd_create("plain")
        os.ftruncate(self.plain, PAGES * PAGE_BYTES)
        request = region_pb2.RegisterRequest(
            session_id=self.session.id, fd_token=await self.session.put(self.plain)
        )
        self.plain_region = (await self.session.client.region.Register(request)).region_id
        for _ in range(steps):
            if not self.region or self.random.random() < 0.05:
                if self.region:
                    await self.session.unregister(self.region)
                self.region = await self.session.register(self.kv)
            prompt = self.random.randrange(PROMPTS)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self.store(prompt)
            await self.load(prompt)
        self.counters.close()
        os.close(self.plain)

    def rows(self, pages: int) -> list[list[int]]:
        return [[PAGE_TOKENS * place] for place in self.random.sample(range(PLACES), pages)]

    async def store(self, prompt: int) -> None:
        cache = self.session.client.cache
        reserved = await cache.Reserve(
            cache_pb2.ReserveRequest(
                session_id=self.session.id,
                namespace_id=self.session.namespace,
                prompt=symbols(prompt),
                wait_ms=200,
            )
        )
        if not reserved.reservation_id:
            return
        first, rows = reserved.present_pages, self.rows(reserved.missing_pages)
        if self.random.random() < 0.5:
            await self.store_plainly(prompt, reserved)
            return
        fields = {"first_page": [first], "pages": [len(rows)]}
        layered = self.random.random() < 0.5
        assert self.counters is not None
        if layered:
            fields |= {"timeline_id": self.timeline, "counter": 0}
            self.counters.set(0, 0)
        else:
            self.fill(prompt, first, rows, range(PLANES))
        commit = asyncio.ensure_future(
            self.session.commit(self.region, reserved.reservation_id, rows, **fields)
        )
        if not layered:
            self.seen["stored"] += (await commit).stored_pages
            return
        for layer in range(LAYERS):
            await asyncio.sleep(0)
            self.fill(prompt, first, rows, range(2 * layer, 2 * layer + 2))
            self.counters.set(0, FAILED if self.random.random() < 0.02 else layer + 1)
        self.seen["stored"] += (await commit).stored_pages

    async def store_plainly(self, prompt: int, reserved: cache_pb2.ReserveResponse) -> None:
        """By workers, which wait for no transfer: they overtake the loads that are under way."""
        first, pages = reserved.present_pages, reserved.missing_pages
        for at in range(pages):
            os.pwrite(self.plain, content(prompt, first + at).tobytes(), at * PAGE_BYTES)
        answer = await self.session.client.cache.Commit(
            cache_pb2.CommitRequest(
                session_id=self.session.id,
                reservation_id=reserved.reservation_id,
                first_page=[first],
                pages=[pages],
                region_id=[self.plain_region],
                offset=[0],
                last=True,
            )
        )
        self.seen["stored"] += answer.stored_pages

    def fill(self, prompt: int, first: int, rows: list[list[int]], planes: range) -> None:
        chosen = slice(planes.start, planes.stop)
        for at, (place,) in enumerate(rows):
            self.kv.planes[chosen, place : place + PAGE_TOKENS] = content(prompt, first + at)[chosen]

    async def load(self, prompt: int) -> None:
        cache = self.session.client.cache
        lease = await cache.Fetch(
            cache_pb2.FetchRequest(
                session_id=self.session.id,
                namespace_id=self.session.namespace,
                prompt=symbols(prompt),
                ttl_ms=self.random.choice([0, 0, 2]),
            )
        )
        if not lease.granted_pages:
            self.seen["missed"] += 1
            return
        rows = self.rows(lease.granted_pages)
        verify = self.random.random() < 0.5
        load = asyncio.ensure_future(
            self.session.load(
                lease.lease_id,
                self.region,
                rows,
                timeline_id=self.timeline,
                counter=1,
                unverified=not verify,
            )
        )
        if self.random.random() < 0.6:
            await asyncio.sleep(self.random.random() * 0.02)
            await self.session.release(lease.lease_id)
        try:
            answer = await load
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND, error.details()
            self.seen["gone"] += 1
            return
        bad = {*answer.missing_pages, *answer.corrupt_pages}
        assert answer.loaded_pages == len(rows) - len(bad)
        for page, (place,) in enumerate(rows):
            if page not in bad:
                got = self.kv.planes[:, place : place + PAGE_TOKENS]
                assert (got == content(prompt, page)).all(), "a wrong page was served"
        assert self.counters is not None
        assert self.counters.get(1) == (FAILED if bad else LAYERS)
        self.seen["loaded"] += answer.loaded_pages
        self.seen["bad"] += len(bad)
        if not bad:
            await self.session.release(lease.lease_id)


async def pump(stepped: Stepped, seed: int) -> None:
    drawn = random.Random(seed)
    while True:
        if drawn.random() < 0.3:
            stepped.step()
        await asyncio.sleep(0 if drawn.random() < 0.8 else 0.001)


async def walk(house: House, stepped: Stepped, *, seed: int, steps: int) -> Counter[str]:
    walkers = [Walker(await Engine.attach(house.client), seed + at) for at in range(WALKERS)]
    pumping = asyncio.ensure_future(pump(stepped, seed))
    try:
        await asyncio.gather(*(walker.walk(steps) for walker in walkers))
    finally:
        pumping.cancel()
    await stepped.finish()
    for walker in walkers:
        walker.kv.close()
    return sum((walker.seen for walker in walkers), Counter())


@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
@pytest.mark.parametrize("seed", [1, 1000])
def test_no_wrong_page_whatever_happens(tmp_path: Path, seed: int, steps: int) -> None:
    async def main() -> None:
        stepped = Stepped()
        small = {"host_bytes": 1 << 18, "host_segment_bytes": 1 << 17, "expiry_grace_ms": 0}
        patient = {"keep_alive_ms": 600_000}  # nobody here sends any
        async with engine(tmp_path, open_transfers=stepped, server=patient, **small) as (house, _):
            seen = await walk(house, stepped, seed=seed, steps=steps)
            counters = house.service.stats().counters
            assert seen["loaded"] > 2 * WALKERS
            assert seen["bad"] > 0
            assert seen["stored"] > 2 * WALKERS
            if steps > 100:
                print(dict(seen), {name: counters[name] for name in ("loads", "failed_loads", "kv_commits")})
                assert sum(house.service.stats().engine.counters.dropped_pages) > 0
            assert counters["transfers_in_flight"] == 0

    run(main())
