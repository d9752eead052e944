"""Drives an engine without bytes: events in, actions out, exactly as ``hicache.runtime`` does.

What an action moves arrives at once, or when ``carry`` has carried it (``wires``: modelled links). ``handle`` queues as
the runtime's loop does: what comes while an event is handled waits its turn.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from hicache.engine import Engine, EngineOptions
from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.engine.events import Event
from hicache.engine.pools import KEYED_OVERHEAD_BYTES
from hicache.types import LARGE_ALIGN_BYTES

Carry = Callable[["act.Copy | act.CopyIn", Callable[[], None]], None]


class Shell:
    """``now_ms`` is moved by whoever has the clock. ``stored_ratio``: how much smaller a page is on a keyed tier."""

    def __init__(
        self, options: EngineOptions, *, carry: Carry | None = None, stored_ratio: float = 1.0
    ) -> None:
        self.engine = Engine(options)
        self.specs = options.tiers
        self.now_ms = 0
        self.answers: dict[int, act.Result] = {}  # of requests that nobody waits for with a call
        self.waiting: dict[int, Callable[[act.Result], None]] = {}
        self.on_operation: dict[int, Callable[[], None]] = {}
        self.requests = itertools.count(1)
        self._carry = carry
        self._stored_ratio = stored_ratio
        self._events: deque[Event] = deque()
        self._pumping = False
        self._by_kind: dict[type, Callable[..., None]] = {
            act.Reply: self._reply,
            act.CopyIn: self._copy_in,
            act.Copy: self._copy,
            act.OperationDone: self._operation_done,
            act.CloseSegment: self._close_segment,
            act.Free: _nothing,
            act.OpenSegment: _nothing,
            act.Compare: _nothing,
        }

    def handle(self, event: Event) -> None:
        """Hand in an event, and whatever follows from it at once."""
        self._events.append(event)
        if self._pumping:
            return
        self._pumping = True
        by_kind, engine, events = self._by_kind, self.engine, self._events
        try:
            while events:
                for action in engine.handle(events.popleft(), self.now_ms):
                    by_kind[type(action)](action)
        finally:
            self._pumping = False

    def pass_time(self, until_ms: int) -> None:
        """Let time pass, with a Tick wherever the engine has a deadline on the way, as the runtime's alarm gives."""
        while True:
            due_ms = self.engine.next_deadline_ms()
            if due_ms is None or (moment_ms := max(due_ms, self.now_ms + 1)) > until_ms:
                break
            self.now_ms = moment_ms
            self.handle(ev.Tick())
        self.now_ms = max(self.now_ms, until_ms)

    def stored_bytes(self, page_bytes: int) -> int:
        """What one page takes on a keyed tier."""
        raw = -(-int(page_bytes / self._stored_ratio) // LARGE_ALIGN_BYTES) * LARGE_ALIGN_BYTES
        return raw + KEYED_OVERHEAD_BYTES

    def _reply(self, reply: act.Reply) -> None:
        then = self.waiting.pop(reply.request, None)
        if then is None:
            self.answers[reply.request] = reply.result
        else:
            then(reply.result)

    def _operation_done(self, action: act.OperationDone) -> None:
        then = self.on_operation.pop(action.operation, None)
        if then is not None:
            then()

    def _close_segment(self, action: act.CloseSegment) -> None:
        self._events.append(ev.SegmentClosed(action.tier, action.segment))

    def _copy_in(self, action: act.CopyIn) -> None:
        self._start(action, len(action.pages), action.tier)

    def _copy(self, action: act.Copy) -> None:
        self._start(action, len(action.src_slots or action.keys), action.dst_tier)

    def _start(self, action: act.Copy | act.CopyIn, pages: int, target: int) -> None:
        charges = [self.stored_bytes(action.page_bytes)] * pages if self.specs[target].keyed else ()
        done = ev.CopyDone(action.copy, None, charges)
        if self._carry is None:
            self._events.append(done)
        else:
            self._carry(action, lambda: self.handle(done))


def _nothing(_action: object) -> None:
    """There are no bytes here to free, to compare, or to make room for."""
