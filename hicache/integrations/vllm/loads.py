"""One load: leased pages into blocks, copied by threads, layer by layer where a step waits for it.

A load ends exactly once: done, failed, or stopped. When ``stop`` has returned, nothing writes to its blocks any more,
so they may be given away. Pages are verified after they were copied: what rotted in the arena before the copy is seen
in what the copy read. Whatever goes wrong is told as blocks whose content must not be used, never as an exception.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Protocol

from hicache.errors import HicacheError, NotFoundError
from hicache.integrations.vllm.copying import Blocks
from hicache.integrations.vllm.layout import Bytes, Move, plan
from hicache.integrations.vllm.messages import LoadOrder

if TYPE_CHECKING:
    from hicache.rpc.client import LeaseTicket

log = logging.getLogger(__name__)

#: A load is divided among threads only into shares of at least this many bytes.
SHARE_BYTES = 16 << 20
MOST_SHARES = 4
NS_PER_S = 1_000_000_000


class PageReader(Protocol):
    """A ticket's pages, in place (``hicache.rpc.client.TicketReader``)."""

    def spans(self, first: int, count: int) -> Iterator[tuple[int, Bytes]]:
        """Stretches of pages that lie one after another: first page, and their bytes, one row a page."""

    def unsound(self, first: int, count: int) -> list[int]:
        """Pages whose checksum differs from the lease's."""

    def still_valid(self) -> bool:
        """Whether what was read until now was what was leased."""


class PageSource(Protocol):
    """Where tickets are turned into pages: a client of the sidecar."""

    def reader(self, ticket: LeaseTicket) -> PageReader:
        """The ticket's pages. May map memory first. Raises HicacheError."""


@dataclasses.dataclass(frozen=True, slots=True)
class Seat:
    """Which part of each page is this worker's."""

    rank: int
    world: int
    part_bytes: int

    def parts(self, pages: Bytes) -> Bytes:
        """This rank's columns of some pages."""
        begin = self.rank * self.part_bytes
        return pages[:, begin : begin + self.part_bytes]

    def verifies(self, page: int) -> bool:
        """Whether this rank checks that page, all parts of it."""
        return page % self.world == self.rank


@dataclasses.dataclass(frozen=True, slots=True)
class LoadResult:
    """How a load ended. ``failed_blocks`` are not to be used; ``corrupt``: pages of the ticket."""

    failed_blocks: tuple[int, ...] = ()
    corrupt: tuple[int, ...] = ()
    pages: int = 0
    bytes: int = 0
    duration_ns: int = 0

    @property
    def failed(self) -> bool:
        """Whether any block is not to be used."""
        return bool(self.failed_blocks)


@dataclasses.dataclass(frozen=True, slots=True)
class Tools:
    """What all loads of a worker share."""

    source: PageSource
    blocks: Blocks
    seat: Seat
    threads: Executor
    now_ns: Callable[[], int]
    timeout_ms: int


class _StoppedError(Exception):
    """The load was stopped; unwinds a copying thread."""


class Load:
    """One load order, from its start to its result."""

    def __init__(self, order: LoadOrder, tools: Tools) -> None:
        self.order = order
        self._tools = tools
        self._change = threading.Condition()
        self._stopped = False
        self._copying = 0  # calls that write to blocks this moment
        self._shares_left = 1
        self._shares = 1
        self._passed = [0] * len(tools.blocks.layout.layers)  # shares that have copied each layer
        self._bad: set[int] = set()
        self._failure = ""
        self._after = tools.blocks.mark()
        self._begun_ns = tools.now_ns()
        self._duration_ns = 0
        self.deadline_ns = self._begun_ns + tools.timeout_ms * 1_000_000

    def start(self) -> None:
        """Hand it to the threads."""
        self._tools.threads.submit(self._guard, self._begin)

    # --- seen from the engine's thread

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not, and nothing writes to its blocks any more."""
        return not self._shares_left or (self._stopped and not self._copying)

    def wait_layer(self, layer: int) -> None:
        """Wait until a layer is there, the load has ended, or its time is over."""
        with self._change:
            self._change.wait_for(lambda: self._passed[layer] == self._shares or self.done, self._left_s())

    def finish(self) -> LoadResult:
        """Wait until it has ended; stop it where its time is over."""
        with self._change:
            self._change.wait_for(lambda: self.done, self._left_s())
        self.stop("it took longer than load_timeout_ms")
        return self.result()

    @property
    def overdue(self) -> bool:
        """Whether its time is over."""
        return self._tools.now_ns() >= self.deadline_ns

    def stop(self, why: str) -> None:
        """End it now if it has not ended. Nothing writes to its blocks when this returns: one copy's time at most."""
        with self._change:
            if self._shares_left and not self._stopped:
                self._stopped = True
                self._failure = self._failure or why
            self._change.wait_for(lambda: not self._copying)

    def result(self) -> LoadResult:
        """How it ended."""
        assert self.done
        order, pages = self.order, self.order.pages
        if self._failure:
            log.warning("hicache: loading %d pages for %s failed: %s", pages, order.request_id, self._failure)
            return LoadResult(order.block_ids, duration_ns=self._duration_ns)
        if self._bad:
            log.warning("hicache: %d of %d pages for %s are corrupt", len(self._bad), pages, order.request_id)
        good = pages - len(self._bad)
        return LoadResult(
            failed_blocks=tuple(block for page in sorted(self._bad) for block in self._blocks_of(page)),
            corrupt=tuple(sorted(self._bad)),
            pages=good,
            bytes=good * self._tools.seat.part_bytes,
            duration_ns=self._duration_ns,
        )

    def _left_s(self) -> float:
        return max(0, self.deadline_ns - self._tools.now_ns()) / NS_PER_S

    def _blocks_of(self, page: int) -> tuple[int, ...]:
        """The ordered blocks of a page of the ticket."""
        order, each = self.order, self._tools.blocks.layout.page_blocks
        end = (page - order.first_page + 1) * each - order.skip_blocks
        return order.block_ids[max(0, end - each) : end]

    # --- in threads

    def _guard(self, work: Callable[[], None]) -> None:
        """Run a share; whatever it raises ends the load."""
        failure = ""
        try:
            work()
        except _StoppedError:
            pass
        except HicacheError as error:
            failure = str(error)
        except Exception as error:
            log.exception("hicache: loading pages for %s", self.order.request_id)
            failure = f"{type(error).__name__}: {error}"
        with self._change:
            self._failure = self._failure or failure
            self._shares_left -= 1
            if not self._shares_left:
                self._duration_ns = self._tools.now_ns() - self._begun_ns
            self._change.notify_all()

    def _begin(self) -> None:
        """Find the pages, divide the work, and do the first share of it."""
        order, tools = self.order, self._tools
        self._go_on()
        reader = tools.source.reader(order.ticket)
        spans = list(reader.spans(order.first_page, order.pages))
        rows = [tools.seat.parts(pages) for _, pages in spans]
        moves = plan(
            order.block_ids,
            [len(pages) for pages in rows],
            tools.blocks.layout.page_blocks,
            order.skip_blocks,
        )
        shares = self._divide(moves)
        with self._change:
            self._shares = self._shares_left = len(shares)
        for share in shares[1:]:
            tools.threads.submit(self._guard, functools.partial(self._copy, reader, spans, rows, share))
        self._copy(reader, spans, rows, shares[0])

    def _divide(self, moves: Sequence[Move]) -> list[Sequence[Move]]:
        count = min(
            MOST_SHARES, 1 + self.order.pages * self._tools.seat.part_bytes // SHARE_BYTES, len(moves)
        )
        ends = [len(moves) * number // count for number in range(count + 1)]
        return [moves[begin:end] for begin, end in itertools.pairwise(ends)]

    def _copy(
        self,
        reader: PageReader,
        spans: Sequence[tuple[int, Bytes]],
        rows: Sequence[Bytes],
        moves: Sequence[Move],
    ) -> None:
        """Copy a share's moves, verify their pages, and see that the lease held all the while."""
        if not reader.still_valid():
            raise NotFoundError("the lease had ended before its pages were copied")
        layers = range(len(self._passed))
        bad: set[int] = set()
        if (
            self.order.asynchronous
        ):  # a page's layers one after another, while they are in the processor's cache
            for move in moves:
                for layer in layers:
                    self._step(rows, move, layer)
                bad |= self._unsound(reader, spans, move)
        else:
            for layer in layers:
                for move in moves:
                    self._step(rows, move, layer)
                self._pass(layer)
            for move in moves:
                bad |= self._unsound(reader, spans, move)
        if not reader.still_valid():
            raise NotFoundError("the lease ended while its pages were copied")
        with self._change:
            self._bad |= bad

    def _step(self, rows: Sequence[Bytes], move: Move, layer: int) -> None:
        """One copy, unless stopped."""
        with self._change:
            self._go_on()
            self._copying += 1
        try:
            self._tools.blocks.load(rows, move, layer, self._after)
        finally:
            with self._change:
                self._copying -= 1
                self._change.notify_all()

    def _go_on(self) -> None:
        if self._stopped:
            raise _StoppedError

    def _pass(self, layer: int) -> None:
        with self._change:
            self._passed[layer] += 1
            self._change.notify_all()

    def _unsound(self, reader: PageReader, spans: Sequence[tuple[int, Bytes]], move: Move) -> set[int]:
        """Pages of a move whose checksum says no, of those that this rank checks."""
        seat, first = self._tools.seat, spans[move.span][0] + move.row
        self._go_on()
        if seat.world == 1:
            return set(reader.unsound(first, move.pages))
        mine = [page for page in range(first, first + move.pages) if seat.verifies(page)]
        return {bad for page in mine for bad in reader.unsound(page, 1)}
