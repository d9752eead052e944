"""A burst of evictions out of the device tier: queued, bounded, drained; and the turns in which that is done."""

from __future__ import annotations

import asyncio

from runtime_helpers import TestClient, namespace, running, settle

from hicache.runtime import ServiceOptions
from hicache.runtime.turns import AT_ONCE_NS, CALM_NS, TURN_NS, Backlog, Turn, Turns
from hicache.types import WritePolicy

PAGES, PROMPT, PAGE_BYTES = 10_000, 250, 64


def test_ten_thousand_evictions_drain() -> None:
    """As many pages again as the device tier holds, all at once: each makes one leave, by a copy to the host tier."""
    size = PAGES * PAGE_BYTES
    options = ServiceOptions(
        device="cpu",
        device_bytes=-(-size // 4096) * 4096,
        host_bytes=4 * size,
        write_policy=WritePolicy.BACK,
        prefault=False,
        free_low_fraction=0.0,
    )

    async def main() -> None:
        async with running(options) as service:
            house = service._house
            assert house is not None
            client = TestClient(service, spec=namespace(page_bytes=PAGE_BYTES))
            salts = range(2 * PAGES // PROMPT)
            first, second = salts[: len(salts) // 2], salts[len(salts) // 2 :]
            for salt in first:
                await client.store(PROMPT, salt)
            most = 0
            waits = [asyncio.ensure_future(client.store(PROMPT, salt, wait_ms=30_000)) for salt in second]

            def drained() -> bool:
                nonlocal most
                most = max(most, house.copier.in_flight)
                return all(wait.done() for wait in waits) and not house.copier.in_flight

            await settle(drained, 30)
            for wait in waits:
                wait.result()
            counters = house.engine.stats().counters
            assert counters.evicted_pages[0] > 0.9 * PAGES
            assert not counters.failed_copy_pages[1]
            assert not counters.dropped_pages[0]
            assert most <= options.max_copies + len(second)
            assert [client.match(PROMPT, salt) for salt in salts] == [PROMPT] * len(salts)
            for salt in (0, second[0]):
                lease = await client.fetch(PROMPT, salt)
                assert await client.read(lease, salt) == PROMPT
                client.release(lease)

    asyncio.run(asyncio.wait_for(main(), 60))


class Time:
    """Moves on with every look."""

    def __init__(self, step_ns: int) -> None:
        self.step_ns = step_ns
        self.now = 0

    def __call__(self) -> int:
        self.now += self.step_ns
        return self.now


def test_a_turn_ends_and_the_next_goes_on_with_another_source() -> None:
    left = {"a": 3, "b": 3}
    taken: list[str] = []

    def source(name: str):  # type: ignore[no-untyped-def]
        def poll(turn: Turn) -> int:
            while left[name]:
                left[name] -= 1
                taken.append(name)
                if turn.over():
                    break
            return 0

        return poll

    rung: list[bool] = []
    turns = Turns([source("a"), source("b")], Time(TURN_NS + 1), lambda: rung.append(True))
    turns.take()
    assert (taken, len(rung)) == (["a"], 1)
    for _ in range(5):
        turns.take()
    assert taken == ["a", "b"] * 3
    slow = Turns([source("a"), source("b")], Time(0), lambda: rung.append(True))
    left.update(a=2, b=2)
    rung.clear()
    slow.take()
    assert taken[6:] == ["a", "a", "b", "b"]
    assert not rung


def test_a_backlog_keeps_its_order_and_does_little_at_once() -> None:
    rung: list[bool] = []
    done: list[int] = []
    clock = Time(0)
    backlog = Backlog(lambda: rung.append(True), clock)

    def add(number: int, after_ns: int) -> None:
        clock.now += after_ns
        backlog.add(lambda: done.append(number))

    for number in range(3):
        add(number, AT_ONCE_NS // 3)
    assert (len(rung), done) == (0, [0, 1, 2])
    for number in range(3, 7):
        add(number, AT_ONCE_NS)
    assert (len(rung), done) == (4, [0, 1, 2])
    assert backlog.poll(Turn(Time(TURN_NS + 1))) == 1
    add(7, CALM_NS)  # behind what waits
    assert backlog.poll() == 4
    assert done == [*range(8)]
    add(8, CALM_NS)
    assert done[-1] == 8
    assert not backlog.poll()


def test_a_call_that_adds_more_keeps_the_order() -> None:
    done: list[str] = []
    backlog = Backlog(lambda: None, Time(0))

    def first() -> None:
        backlog.add(lambda: done.append("second"))
        done.append("first")

    backlog.add(first)
    assert sorted(done) == ["first", "second"]
