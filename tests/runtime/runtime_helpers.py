"""What the tests of this room share: a clock that stands still, pages that tell which they are, a client."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import xxhash

from hicache.engine.actions import FetchResult
from hicache.runtime import Service, ServiceOptions
from hicache.runtime.clock import Clock
from hicache.types import Ack, Namespace

PAGE_TOKENS = 4
PAGE_BYTES = 4096


class FakeAlarm:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class FakeClock(Clock):
    """Time passes when a test says so."""

    def __init__(self) -> None:
        self.time_ms = 1_000_000
        self._alarms: list[tuple[int, int, FakeAlarm]] = []
        self._order = itertools.count()

    def now_ms(self) -> int:
        return self.time_ms

    def now_ns(self) -> int:
        return self.time_ms * 1_000_000

    def alarm(self, delay_ms: int, call: Callable[[], None]) -> FakeAlarm:
        alarm = FakeAlarm(call)
        heapq.heappush(self._alarms, (self.time_ms + delay_ms, next(self._order), alarm))
        return alarm

    @property
    def armed(self) -> int:
        return sum(alarm.call is not None for _, _, alarm in self._alarms)

    def advance(self, ms: int) -> None:
        until = self.time_ms + ms
        while self._alarms and self._alarms[0][0] <= until:
            due, _, alarm = heapq.heappop(self._alarms)
            self.time_ms = max(self.time_ms, due)
            call, alarm.call = alarm.call, None
            if call is not None:
                call()
        self.time_ms = until


def namespace(**changes: Any) -> Namespace:
    fields: dict[str, Any] = {"model": "m", "page_tokens": PAGE_TOKENS, "page_bytes": PAGE_BYTES}
    return Namespace(**(fields | changes))


def prompt(pages: int, salt: int = 0) -> bytes:
    """Token ids of whole pages; prompts of one salt share their prefix."""
    ids = itertools.chain.from_iterable(((salt << 16) + page, 1, 2, 3) for page in range(pages))
    return b"".join(number.to_bytes(4, "little") for number in ids)


def page(number: int, salt: int = 0, size: int = PAGE_BYTES) -> bytes:
    """The bytes of one page, reproducible and incompressible."""
    return random.Random(f"{salt}/{number}").randbytes(size)


def checksum(data: bytes) -> int:
    return int(xxhash.xxh3_64_intdigest(data))


def memfd(data: bytes) -> int:
    fd = os.memfd_create("hicache-test", os.MFD_CLOEXEC)
    os.write(fd, data)
    return fd


def open_fds() -> set[str]:
    return {each.name for each in Path("/proc/self/fd").iterdir()}


async def settle(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something is so."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come to that"
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(options: ServiceOptions, clock: Clock | None = None) -> AsyncIterator[Service]:
    """A started service, closed afterwards, its engine's invariants checked."""
    service = Service(options, clock=clock)
    await service.start()
    try:
        yield service
        if service.state != "failed":
            service.check()
    finally:
        await service.close()


class TestClient:
    """A session with one region for its pages."""

    __test__ = False

    def __init__(self, service: Service, *, spec: Namespace | None = None, tenant: str = "default") -> None:
        self.service = service
        self.spec = spec if spec is not None else namespace(tenant=tenant)
        self.session = service.open_session(tenant, "test")
        self.namespace, self.fingerprint = service.open_namespace(self.spec)

    async def store(self, pages: int, salt: int = 0, *, ack: Ack = Ack.VISIBLE, wait_ms: int = 5_000) -> Any:
        """Store a prompt of so many pages, whatever of it is missing."""
        reserved = await self.service.reserve(
            self.session, self.namespace, prompt(pages, salt), wait_ms=wait_ms
        )
        if not reserved.reservation:
            return reserved
        first = reserved.present_pages
        numbers = range(first, first + reserved.missing_pages)
        datas = [page(number, salt, self.spec.page_bytes) for number in numbers]
        info = self.service.regions.register(self.session, memfd(b"".join(datas)))
        try:
            return await self.service.commit(
                self.session,
                reserved.reservation,
                [(first, len(numbers))],
                [(info.region_id, 0)],
                checksums=[checksum(data) for data in datas],
                ack=ack,
                last=True,
            )
        finally:
            self.service.regions.unregister(self.session, info.region_id)

    async def fetch(self, pages: int, salt: int = 0, *, wait_ms: int = 5_000, **more: Any) -> FetchResult:
        return await self.service.fetch(
            self.session, self.namespace, prompt(pages, salt), wait_ms=wait_ms, **more
        )

    async def read(self, result: FetchResult, salt: int = 0) -> int:
        """Read all granted pages as bytes and compare them; returns how many."""
        count = 0
        async for data, found in self.service.read_pages(self.session, result.lease, 0, 0):
            expected = page(count, salt, self.spec.page_bytes)
            assert bytes(data) == expected
            assert found == checksum(expected)
            count += 1
        return count

    def match(self, pages: int, salt: int = 0) -> int:
        return self.service.match(self.namespace, prompt(pages, salt)).pages

    def release(self, result: FetchResult) -> None:
        self.service.release(self.session, [result.lease])
