"""The engine: events in, actions out. No clock, no I/O, no threads.

Theory of operation: ``handle`` gives the event to its room (leases, reservations, copies, ...), which changes state
through ``core``; then ``_pump`` lets those who wait go on with whatever that event has freed; then the actions are
handed to the shell in the order in which they are to be started. Completions come back as events.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Any

from hicache.engine import (
    admin,
    commits,
    copies,
    doors,
    heat,
    leases,
    operator_pins,
    reclaim,
    recovery,
    reservations,
    room,
    savers,
    sessions,
    story,
    timers,
    views,
)
from hicache.engine import check as checking
from hicache.engine import events as ev
from hicache.engine.actions import Action, FetchResult
from hicache.engine.core import Core
from hicache.engine.holders import LeaseStage, NamespaceState
from hicache.engine.options import EngineOptions
from hicache.errors import NotFoundError, ViolationError

#: Each round lets waiters go on with what the round before has freed; more rounds wait for the next event.
MAX_ROUNDS = 4
#: What a broken invariant shows itself as, besides ViolationError.
BROKEN = (AssertionError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError)


class Engine:
    """Decides what is kept where. One owner thread."""

    def __init__(self, options: EngineOptions) -> None:
        self._core = Core(options)
        self._story: deque[story.Memory] = deque(maxlen=options.story_events)
        self._digest = hashlib.sha256() if options.digest else None

    @property
    def options(self) -> EngineOptions:
        """What it was built with."""
        return self._core.options

    def handle(self, event: ev.Event, now_ms: int) -> list[Action]:
        """Take in one event.

        Args:
            event: what happened.
            now_ms: the shell's clock, never going back.

        Returns:
            What the shell is to start, in this order.

        Raises:
            ViolationError: an invariant is broken. The engine must not be used any further.
        """
        core = self._core
        core.now_ms = now_ms
        self._story.append(story.remember(event))
        core.out = []
        try:
            if core.timers and core.timers[0][0] <= now_ms:
                timers.fire(core)
            kind = type(event)
            look = doors.DOORS.get(kind)
            if look is None or look(core, event):
                _HANDLERS[kind](core, event)
            if core.returned:
                recovery.revive(core)
            if core.room_changed or core.backlog_grew:
                self._pump()
        except BROKEN as error:
            raise ViolationError(f"{type(error).__name__}: {error}", story=self.story()) from error
        except ViolationError as error:
            raise ViolationError(error.message, story=self.story()) from error
        if self._digest is not None:
            for action in core.out:
                self._digest.update(repr(action).encode())
        return core.out

    def _pump(self) -> None:
        """Let those who wait go on."""
        core = self._core
        for _ in range(MAX_ROUNDS):
            if not (core.room_changed or core.backlog_grew):
                break
            core.room_changed = False
            for pool in core.pools.values():
                if pool.leaving >= 0 or pool.waiters or pool.wanting:
                    _retry(core)
                    break
            if core.savers:
                for saver in list(core.savers.values()):
                    savers.advance(core, saver)
            core.backlog_grew = False
            if core.backlog:
                savers.work_backlog(core)
            if len(core.tiers) > 1:
                for pool in core.pools.values():
                    room.copy_down_cold(core, pool)

    # --- reads

    def next_deadline_ms(self) -> int | None:
        """When a Tick is due at the latest; None if nothing is."""
        return timers.next_deadline_ms(self._core)

    def match(self, namespace: int, prompt: bytes) -> views.MatchView:
        """How much of a prompt is cached, and where. Changes nothing. Raises NotFoundError for an unknown namespace."""
        return views.match(self._namespace(namespace), prompt)

    def lease_view(self, session: int, lease: int) -> FetchResult:
        """A lease as it stands now. Raises NotFoundError if it expired, was released or is another's."""
        found = self._core.leases.get(lease)
        if found is None or found.session != session or found.stage is not LeaseStage.LIVE:
            raise NotFoundError(f"lease {lease} expired, was released or never was", hint="fetch again")
        return leases.view(self._core, found)

    def lease_prompt(self, session: int, lease: int) -> tuple[int, bytes]:
        """The namespace and the symbols of a lease's pages. Raises NotFoundError as ``lease_view``."""
        self.lease_view(session, lease)
        found = self._core.leases[lease]
        prompt = found.namespace.tree.prompt_to(found.runs[-1]) if found.runs else b""
        return found.namespace.id, prompt

    def page_places(self, namespace: int, prompt: bytes) -> list[views.PagePlace]:
        """The tiers in which the last page of a prompt is. Raises NotFoundError for an unknown namespace."""
        return views.page_places(self._core, self._namespace(namespace), prompt)

    def operation_view(self, session: int, operation: int) -> views.OperationView:
        """How an operation stands. Raises NotFoundError if it is unknown, or long finished."""
        found = self._core.operations.get(operation)
        if found is None or found.session != session:
            raise NotFoundError(f"operation {operation} is unknown or finished long ago")
        return views.OperationView(found.done, found.moved_pages, found.failed_pages, found.lease)

    def heat(self, limit: int) -> list[heat.Heat]:
        """Runs of the durable tier used since they were last told, about ``limit`` of them, which forgets them."""
        return heat.take(self._core, limit)

    def stats(self) -> views.EngineStats:
        """Occupancy and counters. O(runs)."""
        return views.stats(self._core)

    def tree_view(self, namespace: int = 0, max_nodes: int = 1000) -> tuple[list[views.NodeView], int]:
        """The trees for people to look at; ``namespace`` 0: all. Raises NotFoundError for an unknown one."""
        chosen = [self._namespace(namespace)] if namespace else list(self._core.namespaces.values())
        return views.tree_view(self._core, chosen, max_nodes)

    def _namespace(self, number: int) -> NamespaceState:
        found = self._core.namespaces.get(number)
        if found is None:
            raise NotFoundError(f"namespace {number} is not open", hint="open it first")
        return found

    def check(self) -> None:
        """Recompute every invariant. O(everything); raises ViolationError with the story."""
        try:
            checking.check(self._core)
        except ViolationError as error:
            raise ViolationError(error.message, story=self.story()) from error

    def action_digest(self) -> str:
        """SHA-256 over all actions so far, in order; empty unless ``options.digest``."""
        return self._digest.hexdigest() if self._digest is not None else ""

    def story(self) -> tuple[str, ...]:
        """The last events, oldest first, without content."""
        return tuple(story.tell(memory) for memory in self._story)


def _retry(core: Core) -> None:
    """Segments that are given up, reservations that wait for room, and promotions, in this order."""
    pools = core.pools.values()
    for pool in pools:
        if pool.leaving >= 0:
            reclaim.advance(core, pool)
    for pool in pools:
        while pool.waiters and reservations.try_grant(core, pool.waiters[0], last_try=False):
            pool.waiters.popleft()
    for pool in pools:
        if pool.wanting:
            leases.advance_some(core, pool)


def _copy_done(core: Core, event: ev.CopyDone) -> None:
    if event.copy in core.ingests:
        commits.finish(core, event)
        core.room_changed = True
    else:
        copies.finish(core, event)


def _tick(core: Core, _event: ev.Tick) -> None:
    core.room_changed = core.room_changed or bool(core.savers)


_HANDLERS: dict[type, Callable[[Core, Any], None]] = {
    ev.SessionOpened: sessions.open_session,
    ev.SessionSuspended: sessions.suspend,
    ev.SessionResumed: sessions.resume,
    ev.SessionEnded: sessions.ended,
    ev.NamespaceOpened: sessions.open_namespace,
    ev.Touch: leases.touch,
    ev.Fetch: leases.fetch,
    ev.Prefetch: leases.prefetch,
    ev.CancelOperation: leases.cancel,
    ev.Reserve: reservations.reserve,
    ev.Commit: commits.commit,
    ev.Abort: commits.abort,
    ev.RenewLeases: leases.renew,
    ev.ReleaseLeases: leases.release,
    ev.Pin: operator_pins.pin,
    ev.Unpin: operator_pins.unpin,
    ev.Evict: admin.evict,
    ev.Clear: admin.clear,
    ev.CopyDone: _copy_done,
    ev.SegmentClosed: reclaim.segment_closed,
    ev.PageCorrupt: admin.page_corrupt,
    ev.PagesLost: admin.pages_lost,
    ev.TierLatched: admin.tier_latched,
    ev.TierRestored: admin.tier_restored,
    ev.Recovering: recovery.recovering,
    ev.Recovered: recovery.recovered,
    ev.Drain: savers.drain,
    ev.Tick: _tick,
}
