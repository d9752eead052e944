"""Replay in time: requests come, wait for a place, load what is cached, compute the rest, store it and go.

    arrival ─► place ─► Fetch ─► promotions ─► load to GPU ─► prefill ─► first token ─► decode ─┬─► release
                                 (or patience ends)                  └► Reserve ─► Commit ──────┘

A request holds its lease until its last token is out and its store is done. It waits for pages of lower tiers as long
as computing them would take, at most ``wait_ms``; what has not come by then is computed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.errors import NotFoundError, ViolationError
from hicache.sim.instant import NAMESPACE, SESSION, Prices
from hicache.sim.links import Agenda, Server
from hicache.sim.options import Arrivals, Mode, Settings, lease_tier
from hicache.sim.packed import SYMBOL_BYTES, Row
from hicache.sim.shell import Shell
from hicache.sim.tally import Tally
from hicache.sim.wires import Wires
from hicache.types import NO_USE, TierKind, Use

#: Leases are asked for so long, and renewed at half of it.
TTL_MS = 60_000


class Serving:
    """One model server with its cache. ``rows`` is read as time goes on, one request ahead."""

    def __init__(
        self, shell: Shell, wires: Wires, agenda: Agenda, *, settings: Settings, prices: Prices, tally: Tally
    ) -> None:
        self.shell = shell
        self.wires = wires
        self.agenda = agenda
        self.settings = settings
        self.prices = prices
        self.tally = tally
        self.lease_tier = lease_tier(shell.specs)
        self.on_gpu = shell.specs[self.lease_tier].kind is TierKind.DEVICE
        self.prefills = Server(agenda, settings.replicas)
        self.most_waiting = 0
        self._places = settings.running * settings.replicas
        self._running = 0
        self._queue: deque[Job] = deque()
        self._classes: list[str] = [""]
        self._rows: Iterator[Row] = iter(())
        self._mode = Mode()
        self._random = random.Random(0)  # noqa: S311 - arrivals, no secrets
        self._first_ms = -1
        self._last_us = 0
        self._mean_gap_us = 0.0

    def run(
        self, rows: Iterator[Row], classes: list[str], mode: Mode, *, seed: int, mean_gap_us: float
    ) -> None:
        """Serve every request. Raises ViolationError if nothing can happen any more while some are unserved."""
        self._rows, self._classes, self._mode = rows, classes, mode
        self._random = random.Random(seed)  # noqa: S311 - arrivals, no secrets
        self._mean_gap_us = mean_gap_us / mode.speed
        if mode.arrivals is Arrivals.BACK_TO_BACK:
            self._refill()
        else:
            self._next_arrival()
        while self._running or self.agenda.next_us is not None:
            self._step()

    def _step(self) -> None:
        """The next thing that happens: a call on the agenda, or a deadline of the engine's."""
        agenda, shell = self.agenda, self.shell
        next_us, due_ms = agenda.next_us, shell.engine.next_deadline_ms()
        if next_us is None and due_ms is None:
            raise ViolationError("requests wait, and nothing is going to happen", story=shell.engine.story())
        if due_ms is not None:
            due_ms = max(due_ms, shell.now_ms + 1)
            if next_us is None or due_ms * 1000 < next_us:
                shell.pass_time(due_ms)
                agenda.now_us = max(agenda.now_us, due_ms * 1000)
                return
        assert next_us is not None, "one of the two is there"
        shell.now_ms = max(shell.now_ms, next_us // 1000)
        agenda.step()

    # --- arrivals

    def _next_arrival(self) -> None:
        row = next(self._rows, None)
        if row is None:
            return
        self.agenda.at(self._arrival_us(row), lambda: self._arrive(row))

    def _arrival_us(self, row: Row) -> int:
        if self._first_ms < 0:
            self._first_ms = row[0]
        if self._mode.arrivals is Arrivals.POISSON:
            self._last_us += round(self._random.expovariate(1.0) * self._mean_gap_us)
            return self._last_us
        return round((row[0] - self._first_ms) * 1000 / self._mode.speed)

    def _arrive(self, row: Row) -> None:
        self._queue.append(self._job(row))
        self._next_arrival()
        self._admit()
        self.most_waiting = max(self.most_waiting, len(self._queue))

    def _admit(self) -> None:
        while self._queue and self._running < self._places:
            self._running += 1
            self._queue.popleft().begin()

    def _refill(self) -> None:
        while self._running < self._places:
            row = next(self._rows, None)
            if row is None:
                return
            self._running += 1
            self._job(row).begin()

    def _job(self, row: Row) -> Job:
        return Job(self, row, self._classes[row[4]], self.tally.number())

    def finished(self) -> None:
        """A request's place is free."""
        self._running -= 1
        if self._mode.arrivals is Arrivals.BACK_TO_BACK:
            self.agenda.at(self.agenda.now_us, self._refill)
        else:
            self._admit()


class Job:
    """One request."""

    def __init__(self, serving: Serving, row: Row, cls: str, number: int) -> None:
        _, self.input_tokens, self.output_tokens, turn, _, self.prompt = row
        self.use = Use(cls, turn) if cls or turn else NO_USE
        self.pages = len(self.prompt) // SYMBOL_BYTES
        self.number = number
        self.arrived_us = serving.agenda.now_us
        self.result = act.FetchResult(0, 0, 0, 0, (), 0, ())
        self._serving = serving
        self._lease = 0
        self._fetching = True
        self._open = 2  # the last token, and the store
        self._known_tokens = 0

    def begin(self) -> None:
        """There is a place for it: look up."""
        shell = self._serving.shell
        if not self.pages:
            self._loaded()
            return
        request = next(shell.requests)
        shell.waiting[request] = self._fetched
        shell.handle(ev.Fetch(request, SESSION, NAMESPACE, self.prompt, ttl_ms=TTL_MS, use=self.use))

    def _fetched(self, result: act.Result) -> None:
        assert isinstance(result, act.FetchResult), result
        serving, agenda = self._serving, self._serving.agenda
        self.result, self._lease = result, result.lease
        if self._lease:
            agenda.at(agenda.now_us + TTL_MS * 500, self._renew)
        if not result.operation:
            self._load()
            return
        prices = serving.prices
        first = prices.known_tokens(result.granted_pages, self.input_tokens)
        end = prices.known_tokens(result.matched_pages, self.input_tokens)
        patience_us = min(serving.settings.wait_ms * 1000, prices.prefill_us(first, end))
        serving.shell.on_operation[result.operation] = self._waited
        agenda.at(agenda.now_us + patience_us, self._waited)

    def _waited(self) -> None:
        """Everything has come, or patience is over."""
        if not self._fetching:
            return
        shell = self._serving.shell
        shell.on_operation.pop(self.result.operation, None)
        try:
            self.result = shell.engine.lease_view(SESSION, self._lease)
        except NotFoundError:
            self.result = act.FetchResult(0, self.result.matched_pages, 0, 0, (), 0, self.result.tier_pages)
        self._load()

    def _load(self) -> None:
        """Bring what was granted to the model, unless it is there."""
        self._fetching = False
        serving, granted = self._serving, self.result.granted_pages
        if serving.on_gpu or not granted:
            self._loaded()
            return
        size_bytes = granted * serving.settings.page_bytes(serving.prices.block_tokens)
        serving.wires.move(serving.lease_tier, -1, size_bytes, self._loaded)

    def _loaded(self) -> None:
        serving = self._serving
        self._known_tokens = serving.prices.known_tokens(self.result.granted_pages, self.input_tokens)
        work_us = serving.prices.prefill_us(self._known_tokens, self.input_tokens)
        serving.prefills.give(work_us, self._computed)

    def _computed(self) -> None:
        """The first token is out."""
        agenda = self._serving.agenda
        if self.number >= 0:
            self._count(agenda.now_us - self.arrived_us)
        agenda.at(agenda.now_us + self.output_tokens * self._serving.settings.token_us, self._part_done)
        if self.result.matched_pages < self.pages:
            self._store()
        else:
            self._part_done()

    def _count(self, ttft_us: int) -> None:
        tally, prices, known = self._serving.tally, self._serving.prices, self._known_tokens
        tally.late_pages += self.result.matched_pages - self.result.granted_pages
        tally.add_tiers(self.result.tier_pages)
        tally.add(
            self.number,
            self.pages,
            self.result.granted_pages,
            saved_us=prices.prefill_us(0, known),
            computed_us=prices.prefill_us(known, self.input_tokens),
            ttft_us=ttft_us,
        )

    # --- storing

    def _store(self) -> None:
        shell = self._serving.shell
        request = next(shell.requests)
        shell.waiting[request] = self._reserved
        wait_ms = self._serving.settings.store_wait_ms
        shell.handle(
            ev.Reserve(request, SESSION, NAMESPACE, self.prompt, ttl_ms=TTL_MS, wait_ms=wait_ms, use=self.use)
        )

    def _reserved(self, result: act.Result) -> None:
        if not isinstance(result, act.ReserveResult):
            self._serving.tally.refused_stores += 1
        if not isinstance(result, act.ReserveResult) or not result.reservation:
            self._part_done()
            return
        shell = self._serving.shell
        request = next(shell.requests)
        shell.waiting[request] = lambda _: self._part_done()
        pieces = ((result.present_pages, result.missing_pages),)
        shell.handle(ev.Commit(request, SESSION, result.reservation, pieces, None, last=True))

    # --- the end

    def _renew(self) -> None:
        if not self._open:
            return
        shell, agenda = self._serving.shell, self._serving.agenda
        request = next(shell.requests)
        shell.waiting[request] = lambda _: None
        shell.handle(ev.RenewLeases(request, SESSION, (self._lease,), TTL_MS))
        agenda.at(agenda.now_us + TTL_MS * 500, self._renew)

    def _part_done(self) -> None:
        """The last token is out, or the store is done: after both the lease goes, and the place."""
        self._open -= 1
        if self._open:
            return
        if self._lease:
            self._serving.shell.handle(ev.ReleaseLeases(SESSION, (self._lease,)))
        self._serving.finished()
