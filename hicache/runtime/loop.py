"""Events in, actions out, answers to whom they belong: the one place that drives the engine.

``handle`` queues: an event that comes while another is being handled (a copy that is done at once) waits its turn, so
that actions are started in the order in which the engine gave them and nothing recurses.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar

from hicache.engine import events
from hicache.engine.actions import Action, Failure, FetchResult, OperationDone, Reply, ReserveResult, Result
from hicache.engine.events import Event
from hicache.errors import ERROR_BY_CODE, HicacheError, UnavailableError
from hicache.runtime.clock import Alarm, Clock
from hicache.runtime.workers import resolve

_log = logging.getLogger(__name__)

Answer = asyncio.Future[Result]
R = TypeVar("R")


class Decider(Protocol):
    """What the loop needs of the engine."""

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        """Take in one event."""

    def next_deadline_ms(self) -> int | None:
        """When a Tick is due."""


class EngineLoop:
    """Owns the engine's thread: every method is called on the event loop.

    ``perform`` starts an action; Reply and OperationDone are dealt with here. ``failed`` holds why the engine must not
    be used any more; then every call is refused with UnavailableError.
    """

    def __init__(self, engine: Decider, clock: Clock, perform: Callable[[Action], None]) -> None:
        self._engine = engine
        self._clock = clock
        self._perform = perform
        self._events: deque[Event] = deque()
        self._pumping = False
        self._requests = itertools.count(1)
        self._answers: dict[int, tuple[Answer, int]] = {}  # request -> (future, session)
        self._waiters: dict[int, list[asyncio.Future[None]]] = {}  # operation -> who waits
        self._alarm: Alarm | None = None
        self._alarm_ms: int | None = None
        self._closed = False
        self.failed: BaseException | None = None
        self.on_failed: Callable[[], None] = lambda: None
        self.watch: Callable[[Event], None] | None = None  # sees every event before the engine does

    @property
    def open_requests(self) -> int:
        """Calls that wait for their answer."""
        return len(self._answers)

    # --- events

    def handle(self, event: Event) -> None:
        """Hand an event to the engine and start what it asks for."""
        self._events.append(event)
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._events:
                self._step(self._events.popleft())
        finally:
            self._pumping = False
        self._arm()

    def _step(self, event: Event) -> None:
        if self.failed is not None or self._closed:
            return
        if self.watch is not None:
            self.watch(event)
        try:
            for action in self._engine.handle(event, self._clock.now_ms()):
                self._start(action)
        except Exception as error:  # noqa: BLE001 - the loop's edge; nothing is served from here on
            self._fail(error)

    def _start(self, action: Action) -> None:
        if isinstance(action, Reply):
            self._reply(action)
        elif isinstance(action, OperationDone):
            for waiter in self._waiters.pop(action.operation, ()):
                if not waiter.done():
                    waiter.set_result(None)
        else:
            self._perform(action)

    def _fail(self, error: Exception) -> None:
        _log.critical("the engine failed, nothing is served any more: %s", error, exc_info=error)
        self.failed = error
        self._events.clear()
        self._refuse_all()
        self.on_failed()

    # --- calls

    def ask(self, make: Callable[[int], Event], session: int = 0) -> Answer:
        """Hand in the event that ``make`` makes of a request number.

        The future gets the engine's answer, or a HicacheError. If it is cancelled before, what the answer grants is
        given back. Raises UnavailableError when the service has failed.
        """
        if self.failed is not None or self._closed:
            raise _gone()
        request = next(self._requests)
        answer: Answer = asyncio.get_running_loop().create_future()
        self._answers[request] = (answer, session)
        self.handle(make(request))
        return answer

    async def call(self, kind: type[R], make: Callable[[int], Event], session: int = 0) -> R:
        """``ask``, and wait for an answer of this kind. Raises HicacheError made from the engine's refusal."""
        answer = self.ask(make, session)
        try:
            result = await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self.give_back(session, answer.result())  # it came, and its caller did not live to see it
            raise
        assert isinstance(result, kind), f"expected a {kind.__name__}, got {result}"
        return result

    def _reply(self, reply: Reply) -> None:
        answer, session = self._answers.pop(reply.request)
        result = reply.result
        if answer.cancelled():
            self.give_back(session, result)
        elif isinstance(result, Failure):
            answer.set_exception(error_of(result))
        else:
            answer.set_result(result)

    def give_back(self, session: int, result: Result) -> None:
        """Nobody waits for this any more."""
        if isinstance(result, FetchResult):
            if result.lease:
                self.handle(events.ReleaseLeases(session, (result.lease,)))
            if result.reserved is not None:
                self.give_back(session, result.reserved)
        elif isinstance(result, ReserveResult) and result.reservation:
            self.handle(events.Abort(session, result.reservation))

    async def wait_operation(self, operation: int, wait_ms: int) -> None:
        """Return when an operation is done, or after ``wait_ms``. The caller has seen that it is not done yet."""
        if wait_ms <= 0:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(operation, [])
        waiters.append(done)
        alarm = self._clock.alarm(wait_ms, lambda: resolve(done, None))
        try:
            await done
        finally:
            alarm.cancel()
            waiters.remove(done)
            if not waiters and self._waiters.get(operation) is waiters:
                del self._waiters[operation]
        if self.failed is not None:
            raise _gone()

    # --- time

    def _arm(self) -> None:
        """Have the engine told of its next deadline."""
        due_ms = None
        if self.failed is None and not self._closed:
            due_ms = self._engine.next_deadline_ms()
        if due_ms == self._alarm_ms:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm, self._alarm_ms = None, due_ms
        if due_ms is not None:
            self._alarm = self._clock.alarm(max(1, due_ms - self._clock.now_ms()), self._tick)

    def _tick(self) -> None:
        self._alarm, self._alarm_ms = None, None
        self.handle(events.Tick())

    # --- the end

    def _refuse_all(self) -> None:
        answers, self._answers = self._answers, {}
        for answer, _ in answers.values():
            if not answer.done():
                answer.set_exception(_gone())
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def close(self) -> None:
        """No more events, no more ticks; who still waits is refused. Idempotent."""
        self._closed = True
        self._arm()
        self._refuse_all()


def error_of(failure: Failure) -> HicacheError:
    """The error that stands for a refusal."""
    cls = ERROR_BY_CODE[failure.code]
    return cls(failure.message, hint=failure.hint, retry_after_ms=failure.retry_after_ms)


def _gone() -> UnavailableError:
    return UnavailableError("the service has stopped", hint="see the server's log; it must be restarted")
