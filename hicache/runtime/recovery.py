"""Bringing a durable tier's pages back at start, while serving goes on.

A thread reads chains off the store; the loop hands them to the engine in events of bounded size. Until the end, what
would change the store is held back (``TierPort.hold_writes``), so that what was read is what is there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import logging
from collections.abc import Callable, Generator, Iterator
from typing import Protocol, TypeVar

from hicache.engine.events import Recovered, Recovering
from hicache.runtime.ports import TierPort
from hicache.types import Op

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: How much one event brings, so that the loop is busy with it for a millisecond or two: a page counts 1, a chain as
#: much as CHAIN_PAGES of them.
PAGES_PER_EVENT = 1024
CHAIN_PAGES = 8
#: Events after which what has come is taken out of the garbage collector's sight: it would look through all of it
#: again and again, for tenths of a second. Runs and nodes are freed by their counts.
EVENTS_PER_FREEZE = 64
PAGES_PER_LOG_LINE = 250_000
#: Parts read at one go: on a busy machine each change from the loop's thread to the reader's and back may wait for a
#: time slice of somebody else's.
PARTS_PER_READ = 16
STRANDED = -2  # the parent of a chain whose parent is not stored
ORPHANS_PER_BATCH = 4096


class Chain(Protocol):
    """Consecutive pages of one namespace; see ``tier.recovery.RecoveredChain``."""

    @property
    def namespace_fingerprint(self) -> bytes:
        """Whose they are."""

    @property
    def parent(self) -> int:
        """Number, among the namespace's chains, of the one before; -1 at the root, -2 if it is not stored."""

    @property
    def symbols(self) -> bytes:
        """The pages' symbols, concatenated."""

    @property
    def keys(self) -> list[bytes]:
        """One a page."""

    @property
    def charges(self) -> list[int]:
        """Bytes of capacity, one a page."""

    # A store may say more: of the whole, ``read_rows`` of ``total_rows``; of a chain, ``last_use_ms`` (wall clock, 0
    # unknown), ``hits``, and ``parent_key`` of a chain whose ``parent`` is -2: the page before it is not stored.


class Chains(Protocol):
    """One pass over a store; ``orphans`` is complete after it."""

    orphans: list[bytes]

    def __iter__(self) -> Iterator[Chain]:
        """Chains, namespace by namespace, parents first."""


@dataclasses.dataclass(slots=True)
class RecoveryReport:
    """What came back."""

    pages: int = 0
    chains: int = 0
    orphan_pages: int = 0
    done: bool = False
    error: str = ""
    read_pages: int = 0  # whose rows have been read, which is done before the first comes back
    total_pages: int = 0


@dataclasses.dataclass(slots=True)
class _Part:
    """Chains of one namespace on their way into one event."""

    fingerprint: bytes
    parents: list[int] = dataclasses.field(default_factory=list)
    symbols: list[bytes] = dataclasses.field(default_factory=list)
    keys: list[list[bytes]] = dataclasses.field(default_factory=list)
    charges: list[list[int]] = dataclasses.field(default_factory=list)
    last_use_ms: list[int] = dataclasses.field(default_factory=list)
    hits: list[int] = dataclasses.field(default_factory=list)
    parent_keys: list[bytes] = dataclasses.field(default_factory=list)
    pages: int = 0
    last: bool = False

    def add(self, chain: Chain, parent: int, start: int) -> None:
        """A piece of a chain, from page ``start`` on."""
        end = min(start + PAGES_PER_EVENT, len(chain.keys))
        width = len(chain.symbols) // len(chain.keys)
        self.parents.append(parent)
        self.symbols.append(chain.symbols[start * width : end * width])
        self.keys.append(chain.keys[start:end])
        self.charges.append(chain.charges[start:end])
        self.last_use_ms.append(getattr(chain, "last_use_ms", 0))
        self.hits.append(getattr(chain, "hits", 0))
        self.parent_keys.append(getattr(chain, "parent_key", b"") if parent == STRANDED else b"")
        self.pages += end - start

    @property
    def full(self) -> bool:
        return self.pages + CHAIN_PAGES * len(self.keys) >= PAGES_PER_EVENT


def parts(chains: Iterator[Chain]) -> Generator[_Part, None, None]:
    """Chains in parts of about ``PAGES_PER_EVENT`` pages; longer chains are cut, and numbered anew for that."""
    for fingerprint, group in itertools.groupby(chains, key=lambda chain: chain.namespace_fingerprint):
        ends: list[int] = []  # the store's number of a chain -> the number of its last piece
        count = 0
        part = _Part(fingerprint)
        for chain in group:
            parent = ends[chain.parent] if chain.parent >= 0 else chain.parent
            for start in range(0, len(chain.keys), PAGES_PER_EVENT):
                part.add(chain, parent, start)
                parent = count
                count += 1
                if part.full:
                    yield part
                    part = _Part(fingerprint)
            ends.append(parent)
        part.last = True
        yield part


def _read_some(stream: Iterator[_Part], into: list[_Part]) -> bool:
    """Read some parts, which stay there whatever comes next; whether there are more."""
    for part in stream:
        into.append(part)  # what was read before an error counts
        if len(into) == PARTS_PER_READ:
            return True
    return False


class Recoverer:
    """Reads one store and hands what it holds to the engine.

    ``namespace``: the engine's number of a stored namespace. ``clock_ms``: a wall clock's time in the engine's clock.
    Whatever fails is told in ``report``; what was not read stays on the medium, unknown, until the next start.
    """

    def __init__(
        self,
        read: Callable[[], Chains],
        port: TierPort,
        *,
        namespace: Callable[[bytes], int],
        handle: Callable[[Recovered | Recovering], None],
        clock_ms: Callable[[int], int] = lambda wall_ms: wall_ms,
    ) -> None:
        self._read = read
        self._port = port
        self._namespace = namespace
        self._handle = handle
        self._clock_ms = clock_ms
        self._stopping = False
        self._events = 0
        # Of ordinary priority: it holds the interpreter's lock most of the time, and a thread that is put aside
        # while it holds that keeps the loop waiting for as long.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "hicache-recovery")
        self._chains: Chains | None = None
        self._report = RecoveryReport()

    @property
    def report(self) -> RecoveryReport:
        """How it stands."""
        self._report.read_pages = getattr(self._chains, "read_rows", 0)
        self._report.total_pages = getattr(self._chains, "total_rows", 0)
        return self._report

    def stop(self) -> None:
        """Read no further; ``run`` returns soon."""
        self._stopping = True

    async def run(self) -> None:
        """Recover; then delete orphans and let writes through. Raises nothing for what the store does."""
        self._handle(Recovering(self._port.index, going=True))
        try:
            chains = self._chains = await self._in_thread(self._read)
            if chains is not None and await self._hand_on(iter(chains)):
                _delete(self._port, chains.orphans)
                self.report.orphan_pages = len(chains.orphans)
        finally:
            self._handle(Recovering(self._port.index, going=False))
            self._thread.shutdown(wait=True)
            self._port.release_writes()
            self.report.done = True
        _log.info(
            "tier %s: %d pages recovered, %d orphans deleted",
            self._port.spec.name,
            self.report.pages,
            self.report.orphan_pages,
        )

    async def _hand_on(self, chains: Iterator[Chain]) -> bool:
        """Whether everything was read."""
        stream = parts(chains)
        open_namespace = b""  # of which the engine still expects chains
        while not self._stopping:
            read: list[_Part] = []
            going_on = await self._in_thread(functools.partial(_read_some, stream, read))
            for part in read:
                self._hand(part)
                open_namespace = b"" if part.last else part.fingerprint
                await asyncio.sleep(0)  # calls first
            if going_on is None:
                break
            if not going_on:
                return True
        if open_namespace:
            self._hand(_Part(open_namespace, last=True))
        await self._in_thread(stream.close)  # ends the store's transaction
        return False

    def _hand(self, part: _Part) -> None:
        number = self._namespace(part.fingerprint)
        last_use_ms = [self._clock_ms(wall_ms) for wall_ms in part.last_use_ms]
        self._handle(
            Recovered(
                number,
                self._port.index,
                part.parents,
                part.symbols,
                part.keys,
                part.charges,
                part.last,
                last_use_ms,
                part.hits,
                part.parent_keys,
            )
        )
        self._events += 1
        if self._events % EVENTS_PER_FREEZE == 0:
            gc.freeze()
        report = self.report
        told = report.pages // PAGES_PER_LOG_LINE
        report.pages += part.pages
        report.chains += len(part.parents)
        if report.pages // PAGES_PER_LOG_LINE > told:
            _log.info(
                "tier %s: %d of %d pages are back", self._port.spec.name, report.pages, report.total_pages
            )

    async def _in_thread(self, work: Callable[[], T]) -> T | None:
        """The result; None where the store failed, which is noted."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        await asyncio.wait([future])
        error = future.exception()
        if error is None:
            return future.result()
        _log.error("recovery of tier %s stopped: %r", self._port.spec.name, error)
        self.report.error = f"{type(error).__name__}: {error}"
        return None


def _delete(port: TierPort, orphans: list[bytes]) -> None:
    """Delete what nothing will ever match. Before the writes that were held: one of them may store such a page."""
    for start in range(0, len(orphans), ORPHANS_PER_BATCH):
        port.submit_now(Op.DELETE, orphans[start : start + ORPHANS_PER_BATCH])
