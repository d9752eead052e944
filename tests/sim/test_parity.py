"""One trace through both shells: the runtime's service over stores that are done at once, and the simulator.

Both are given the same events at the same times; the digests of all actions of the two engines must be equal.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sim_kit import MODEL, SETTINGS, TOKENS, capacity, cell, chat, packed, world_of

from hicache.engine.pools import KEYED_OVERHEAD_BYTES
from hicache.errors import HicacheError
from hicache.runtime import Service, ServiceOptions, house
from hicache.runtime.clock import Clock
from hicache.runtime.ports import TierPort
from hicache.runtime.sources import PageSource
from hicache.runtime.stores import Stores
from hicache.runtime.turns import CALM_NS
from hicache.sim.cell import World
from hicache.sim.packed import PackedTrace
from hicache.types import Ack, Batch, Completion, Namespace, Op, Outcome, SymbolKind, TierKind, TierSpec, Use

PAGE_BYTES = MODEL.token_bytes * TOKENS


class StillClock(Clock):
    """Stands still between requests; alarms ring as it is moved."""

    def __init__(self) -> None:
        self.time_ms = 0
        self._alarms: list[tuple[int, int, Any]] = []
        self._order = itertools.count()

    def now_ms(self) -> int:
        return self.time_ms

    def now_ns(self) -> int:
        return self.time_ms * CALM_NS  # copies start at once

    def alarm(self, delay_ms: int, call: Callable[[], None]) -> Any:
        handle = asyncio.get_running_loop().call_later(86_400, call)  # cancelled by time or by its owner
        heapq.heappush(self._alarms, (self.time_ms + delay_ms, next(self._order), (handle, call)))
        return handle

    def move(self, until_ms: int) -> None:
        while self._alarms and self._alarms[0][0] <= until_ms:
            due_ms, _, (handle, call) = heapq.heappop(self._alarms)
            if not handle.cancelled():
                handle.cancel()
                self.time_ms = max(self.time_ms, due_ms)
                call()
        self.time_ms = max(self.time_ms, until_ms)


class InstantStore:
    """Keeps nothing: what is asked for is done when it is asked for, in that order over all stores."""

    def __init__(self, spec: TierSpec, ring: Callable[[], None]) -> None:
        self.spec = spec
        self._ring = ring
        self._done: list[Completion] = []
        self._page = memoryview(bytearray(PAGE_BYTES))

    def submit(self, batch: Batch) -> None:
        pages = len(batch.keys or batch.slots or ())
        charges: Sequence[int] = ()
        if self.spec.keyed and batch.op is Op.PUT:
            charges = [-(-batch.page_bytes // 4096) * 4096 + KEYED_OVERHEAD_BYTES] * pages
        self._done.append(Completion(batch.id, [Outcome.OK] * pages, [0] * pages, charges))
        self._ring()

    def poll(self) -> list[Completion]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Nothing to give back."""

    # --- memory that can be addressed

    def open_segment(self, segment: int, domain: str, page_bytes: int, slots: int) -> None:
        """There is nothing to open."""

    close_segment = free = seal = lambda self, *_: None

    def views(self, slots: Sequence[int]) -> list[memoryview]:
        return [self._page for _ in slots]

    def checksums(self, slots: Sequence[int]) -> list[int]:
        return [0 for _ in slots]


class Nothing:
    """The pages of a commit: as many as are asked for, and no bytes."""

    def __repr__(self) -> str:
        return "PageSource()"

    def hold(self) -> None:
        """Nothing to hold."""

    release = hold

    def read(self, pages: Sequence[int], buffers: Sequence[memoryview]) -> list[Outcome]:
        return [Outcome.OK] * len(pages)

    def expected(self, page: int) -> int | None:
        return None


async def through_the_service(
    trace: PackedTrace, specs: tuple[TierSpec, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, int]:
    """The digest of the service's actions, and its hits."""
    options = ServiceOptions(host_bytes=1 << 20, prefault=False, digest=True)
    ports: list[TierPort] = []

    def open_stores(_: ServiceOptions, ring: Callable[[], None], *_clocks: Callable[[], int]) -> Stores:
        for index, spec in enumerate(specs):
            store = InstantStore(spec, ring)
            ports.append(TierPort(index, spec, store, addressable=None if spec.keyed else store))  # type: ignore[arg-type]
        return Stores(tuple(ports), None)

    monkeypatch.setattr(house, "open_stores", open_stores)
    clock = StillClock()
    service = Service(options, clock=clock)
    await service.start()
    try:
        session = service.open_session("default", "parity")
        assert session == 1
        spec = Namespace(MODEL.name, TOKENS, PAGE_BYTES, symbol_kind=SymbolKind.HASHES, symbol_hash_bytes=16)
        number, _ = service.open_namespace(spec)
        for at_ms, _, _, turn, cls, prompt in trace:
            clock.move(at_ms)
            await one_request(service, (session, number), prompt, {"cls": trace.classes[cls], "turn": turn})
        service.check()
        stats = service.stats()
        return service.action_digest(), sum(stats.engine.counters.hit_pages)
    finally:
        await service.close()


async def one_request(service: Service, whose: tuple[int, int], prompt: bytes, use: dict[str, Any]) -> None:
    """What an engine does for one prompt, as the simulator has it; every copy is done before the next request."""
    found = await service.fetch(*whose, prompt, wait_ms=60_000, use=Use(**use))
    await quiet(service)
    if found.matched_pages < len(prompt) // 16:
        try:
            room = await service.reserve(*whose, prompt, use=Use(**use))
        except HicacheError:
            room = None
        await quiet(service)
        if room is not None and room.reservation:
            pieces = [(room.present_pages, room.missing_pages)]
            source: PageSource = Nothing()
            commit = service.commit.__self__._commit  # type: ignore[attr-defined]  # with a source of our own
            await commit(whose[0], room.reservation, pieces, (source, Ack.VISIBLE, True))
    if found.lease:
        service.release(whose[0], [found.lease])
    await quiet(service)


async def quiet(service: Service) -> None:
    """Return when no copy is under way."""
    running = service._running
    while running.copier.in_flight or running.loop.open_requests:
        await asyncio.sleep(0)


def through_the_simulator(trace: PackedTrace, world: World) -> tuple[str, int]:
    world.run()
    return world.shell.engine.action_digest(), sum(world.result()["hits_by_tier"])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "room", [{"host": 40}, {"host": 400}, {"host": 40, "disk": 90}, {"host": 40, "disk": 900}]
)
def test_both_shells_take_the_same_actions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: dict[str, int]
) -> None:
    with packed(tmp_path, chat(21, 250)) as trace:
        world = world_of(trace, cell(capacity(**room)), digest=True)
        options = world.shell.engine.options
        monkeypatch.setattr(ServiceOptions, "engine_options", lambda *_: options)
        expected = through_the_simulator(trace, world)
        found = asyncio.run(through_the_service(trace, options.tiers, monkeypatch))
        assert options.tiers[0].kind is TierKind.HOST
    assert found == expected
    assert expected[0]
    assert expected[1] > 100


def test_other_actions_give_another_digest(tmp_path: Path) -> None:
    """The digest tells replays apart that differ in a single page of room."""
    with packed(tmp_path, chat(21, 250)) as trace:
        digests = {
            through_the_simulator(trace, world_of(trace, cell(capacity(host=pages)), digest=True))[0]
            for pages in (40, 41)
        }
    assert len(digests) == 2
    assert SETTINGS.digest is False
