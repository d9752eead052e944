"""The loop over a scripted engine: order, answers, cancellation, time, failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest
from runtime_helpers import FakeClock

from hicache.engine import events
from hicache.engine.actions import (
    Action,
    Failure,
    FetchResult,
    Free,
    OperationDone,
    RenewResult,
    Reply,
    ReserveResult,
)
from hicache.engine.events import Event
from hicache.errors import ErrorCode, ExhaustedError, UnavailableError, ViolationError
from hicache.runtime.loop import EngineLoop

LEASED = FetchResult(7, 1, 1, 99, (), 0, (1,))


class Scripted:
    """Answers events as the test says; remembers them."""

    def __init__(self) -> None:
        self.seen: list[tuple[Event, int]] = []
        self.answers: dict[type, Callable[[Event], list[Action]]] = {}
        self.deadline_ms: int | None = None

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        self.seen.append((event, now_ms))
        answer = self.answers.get(type(event))
        return answer(event) if answer is not None else []

    def next_deadline_ms(self) -> int | None:
        return self.deadline_ms

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event, _ in self.seen]


class Bench:
    def __init__(self) -> None:
        self.engine = Scripted()
        self.clock = FakeClock()
        self.performed: list[Action] = []
        self.loop = EngineLoop(self.engine, self.clock, self.performed.append)

    def answer(self, kind: type, make: Callable[[int], Action]) -> None:
        self.engine.answers[kind] = lambda event: [make(event.request)]  # type: ignore[union-attr]

    async def fetch(self) -> FetchResult:
        return await self.loop.call(FetchResult, lambda request: events.Fetch(request, 5, 1, b""), 5)

    async def reserve(self) -> ReserveResult:
        return await self.loop.call(ReserveResult, lambda request: events.Reserve(request, 5, 1, b""), 5)


def run(test: Callable[[Bench], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        await test(Bench())

    asyncio.run(main())


def test_actions_are_started_in_order_and_events_wait_their_turn() -> None:
    async def test(bench: Bench) -> None:
        order: list[str] = []

        def perform(action: Action) -> None:
            assert isinstance(action, Free)
            order.append(f"start {action.tier}")
            if action.tier < 3:
                bench.loop.handle(events.CopyDone(action.tier))  # done at once
            order.append(f"started {action.tier}")

        bench.loop = EngineLoop(bench.engine, bench.clock, perform)
        bench.engine.answers[events.Tick] = lambda _: [Free(1, (), ()), Free(2, (), ())]
        bench.engine.answers[events.CopyDone] = lambda event: [Free(event.copy + 2, (), ())]  # type: ignore[union-attr]
        bench.loop.handle(events.Tick())
        assert order == [f"{word} {tier}" for tier in (1, 2, 3, 4) for word in ("start", "started")]
        assert bench.engine.kinds() == ["Tick", "CopyDone", "CopyDone"]

    run(test)


def test_thousands_of_completions_do_not_recurse() -> None:
    async def test(bench: Bench) -> None:
        left = 20_000

        def perform(_: Action) -> None:
            nonlocal left
            left -= 1
            if left:
                bench.loop.handle(events.CopyDone(1))

        bench.loop = EngineLoop(bench.engine, bench.clock, perform)
        bench.engine.answers[events.CopyDone] = lambda _: [Free(0, (), ())]
        bench.loop.handle(events.CopyDone(1))
        assert left == 0

    run(test)


def test_an_answer_reaches_who_asked() -> None:
    async def test(bench: Bench) -> None:
        bench.answer(events.Fetch, lambda request: Reply(request, LEASED))
        assert await bench.fetch() == LEASED
        assert bench.loop.open_requests == 0

    run(test)


def test_a_refusal_becomes_its_error() -> None:
    async def test(bench: Bench) -> None:
        refusal = Failure(ErrorCode.EXHAUSTED, "no room", "wait", 250)
        bench.answer(events.Fetch, lambda request: Reply(request, refusal))
        with pytest.raises(ExhaustedError, match=r"no room \(wait\)") as caught:
            await bench.fetch()
        assert caught.value.retry_after_ms == 250

    run(test)


def test_an_answer_that_nobody_waits_for_is_given_back() -> None:
    async def test(bench: Bench) -> None:
        asked = asyncio.ensure_future(bench.reserve())
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        request = bench.engine.seen[0][0].request  # type: ignore[union-attr]
        bench.engine.answers[events.Tick] = lambda _: [Reply(request, ReserveResult(31, 0, 1, 99))]
        bench.loop.handle(events.Tick())
        assert bench.engine.seen[-1][0] == events.Abort(5, 31)

    run(test)


def test_an_answer_that_came_just_before_the_cancellation_is_given_back() -> None:
    async def test(bench: Bench) -> None:
        asked = asyncio.ensure_future(bench.fetch())
        await asyncio.sleep(0)
        request = bench.engine.seen[0][0].request  # type: ignore[union-attr]
        bench.engine.answers[events.Tick] = lambda _: [Reply(request, LEASED)]
        bench.loop.handle(events.Tick())
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert bench.engine.seen[-1][0] == events.ReleaseLeases(5, (7,))

    run(test)


def test_what_cannot_be_given_back_needs_nothing() -> None:
    async def test(bench: Bench) -> None:
        asked = asyncio.ensure_future(
            bench.loop.call(RenewResult, lambda request: events.RenewLeases(request, 5, (1,), 0), 5)
        )
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        bench.engine.answers[events.Tick] = lambda _: [Reply(1, RenewResult((), 5))]
        bench.loop.handle(events.Tick())
        assert bench.engine.kinds() == ["RenewLeases", "Tick"]

    run(test)


def test_waits_for_an_operation_until_it_is_done_or_time_is_up() -> None:
    async def test(bench: Bench) -> None:
        bench.engine.answers[events.Tick] = lambda _: [OperationDone(4, 1, 0)]
        done = asyncio.ensure_future(bench.loop.wait_operation(4, 1000))
        late = asyncio.ensure_future(bench.loop.wait_operation(5, 1000))
        await asyncio.sleep(0)
        bench.loop.handle(events.Tick())
        await done
        assert not late.done()
        bench.clock.advance(999)
        await asyncio.sleep(0)
        assert not late.done()
        bench.clock.advance(1)
        await late
        assert bench.clock.armed == 0

    run(test)


def test_a_cancelled_wait_leaves_nothing() -> None:
    async def test(bench: Bench) -> None:
        waits = [asyncio.ensure_future(bench.loop.wait_operation(4, 1000)) for _ in range(2)]
        await asyncio.sleep(0)
        waits[0].cancel()
        await asyncio.gather(waits[0], return_exceptions=True)
        bench.engine.answers[events.Tick] = lambda _: [OperationDone(4, 1, 0)]
        bench.loop.handle(events.Tick())
        await waits[1]
        assert bench.clock.armed == 0

    run(test)


def test_ticks_at_the_engines_deadline() -> None:
    async def test(bench: Bench) -> None:
        start = bench.clock.time_ms

        def tick(_: Event) -> list[Action]:
            bench.engine.deadline_ms = None
            return []

        bench.engine.answers[events.Tick] = tick
        bench.engine.deadline_ms = start + 300
        bench.loop.handle(events.CopyDone(1))
        bench.engine.deadline_ms = start + 200  # an earlier one takes its place
        bench.loop.handle(events.CopyDone(2))
        bench.clock.advance(199)
        assert bench.engine.kinds() == ["CopyDone", "CopyDone"]
        bench.clock.advance(1)
        assert bench.engine.seen[-1] == (events.Tick(), start + 200)
        assert bench.clock.armed == 0
        bench.clock.advance(1000)
        assert len(bench.engine.seen) == 3

    run(test)


def test_a_deadline_in_the_past_does_not_spin() -> None:
    async def test(bench: Bench) -> None:
        bench.engine.deadline_ms = bench.clock.time_ms - 50
        bench.loop.handle(events.CopyDone(1))
        bench.clock.advance(3)
        assert bench.engine.kinds() == ["CopyDone", "Tick", "Tick", "Tick"]

    run(test)


@pytest.mark.parametrize("error", [ViolationError("broken", story=("Tick()",)), RuntimeError("a bug")])
def test_a_broken_invariant_ends_it_all(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def test(bench: Bench) -> None:
        told: list[bool] = []
        bench.loop.on_failed = lambda: told.append(True)
        waiting = asyncio.ensure_future(bench.fetch())
        operation = asyncio.ensure_future(bench.loop.wait_operation(3, 1000))
        await asyncio.sleep(0)

        def break_down(_: Event) -> list[Action]:
            raise error

        bench.engine.answers[events.Tick] = break_down
        bench.loop.handle(events.Tick())
        assert bench.loop.failed is error
        assert told == [True]
        for call in (waiting, operation, bench.fetch()):
            with pytest.raises(UnavailableError):
                await call
        seen = len(bench.engine.seen)
        bench.loop.handle(events.CopyDone(1))
        assert len(bench.engine.seen) == seen

    run(test)
    assert "the engine failed" in caplog.text
    assert str(error) in caplog.text


def test_after_close_nothing_is_served() -> None:
    async def test(bench: Bench) -> None:
        bench.engine.deadline_ms = bench.clock.time_ms + 5
        waiting = asyncio.ensure_future(bench.fetch())
        await asyncio.sleep(0)
        bench.loop.close()
        bench.loop.close()
        with pytest.raises(UnavailableError):
            await waiting
        assert bench.clock.armed == 0
        with pytest.raises(UnavailableError):
            await bench.fetch()

    run(test)
