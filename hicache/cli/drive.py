"""One client at work: looks prompts up, verifies every byte it is given, stores what is missing, and keeps count."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hicache.cli.payload import U64, PageMaker, page_seeds
from hicache.errors import CorruptError, ExhaustedError

if TYPE_CHECKING:
    from hicache.rpc.client import Lease, NamespaceHandle
    from hicache.runtime.clock import Clock


@dataclasses.dataclass(slots=True)
class Tally:
    """What a client saw. Pages unless the name says otherwise.

    ``hits`` by the tier that served them; ``short``: matched, but not readable within the wait;
    ``latencies_ms`` by call. Tallies of several processes add up.
    """

    requests: int = 0
    asked: int = 0
    granted: int = 0
    short: int = 0
    hits: Counter[str] = dataclasses.field(default_factory=Counter)
    stored: int = 0
    present: int = 0
    refused: int = 0
    corrupt_reads: int = 0
    verified_bytes: int = 0
    written_bytes: int = 0
    wrong_bytes: int = 0
    latencies_ms: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Add another client's counts to these."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, int):
                setattr(self, field.name, mine + theirs)
        self.hits.update(other.hits)
        for call, taken in other.latencies_ms.items():
            self.latencies_ms.setdefault(call, []).extend(taken)

    @property
    def hit_ratio(self) -> float:
        """Pages granted, of those asked for."""
        return self.granted / self.asked if self.asked else 0.0

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Count, median and 99th percentile in milliseconds, by call."""
        found = {}
        for call, taken in self.latencies_ms.items():
            p50, p99 = np.percentile(taken, [50, 99])
            found[call] = {
                "count": len(taken),
                "p50_ms": round(float(p50), 3),
                "p99_ms": round(float(p99), 3),
            }
        return found

    def as_json(self) -> dict[str, object]:
        """Plain values; percentiles instead of every latency."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "latencies_ms"}
        return plain | {
            "hits": dict(self.hits),
            "hit_ratio": round(self.hit_ratio, 6),
            "latencies": self.percentiles(),
        }


class Driver:
    """Drives one namespace of one client. Pages are what ``payload`` makes of salt, place and symbols."""

    def __init__(
        self, namespace: NamespaceHandle, maker: PageMaker, clock: Clock, *, salt: str, wait_ms: int
    ) -> None:
        self.tally = Tally()
        self._namespace = namespace
        self._maker = maker
        self._clock = clock
        self._salt = salt
        self._wait_ms = wait_ms
        self._symbol_bytes = namespace.spec.symbol_bytes

    def request(self, prompt: bytes, full: bytes) -> None:
        """One request of an engine: look ``prompt`` up and read what is there, then store all of ``full``."""
        seeds = self._seeds(full)
        self.tally.requests += 1
        self.look_up(prompt, seeds)
        self._store(full, seeds)

    def look_up(self, prompt: bytes, seeds: U64 | None = None) -> int:
        """Fetch a prompt's pages and verify every byte. Returns how many pages were readable."""
        seeds = self._seeds(prompt) if seeds is None else seeds
        pages = len(prompt) // self._symbol_bytes
        self.tally.asked += pages
        if not pages:
            return 0
        with contextlib.ExitStack() as stack:
            with self._timed("fetch"):
                lease = stack.enter_context(self._namespace.fetch(prompt, wait_ms=self._wait_ms))
            granted = lease.granted_pages
            self.tally.granted += granted
            self.tally.short += lease.matched_pages - granted
            self.tally.hits.update(lease.tier_pages)
            if granted:
                self._verify(lease, seeds, granted)
        return granted

    def match(self, prompt: bytes) -> int:
        """Only ask how much is cached."""
        with self._timed("match"):
            return self._namespace.match(prompt).matched_pages

    def _verify(self, lease: Lease, seeds: U64, pages: int) -> None:
        found = np.empty((pages, self._maker.page_bytes), np.uint8)
        try:
            with self._timed("copy"):
                lease.copy_into(found)
        except CorruptError:
            self.tally.corrupt_reads += 1  # refused by its checksum: a miss, never a wrong byte
            return
        self.tally.verified_bytes += found.nbytes
        self.tally.wrong_bytes += self._maker.wrong_bytes(seeds, 0, found)

    def _store(self, full: bytes, seeds: U64) -> None:
        try:
            with self._timed("store"):
                self._reserve_and_commit(full, seeds)
        except ExhaustedError:
            self.tally.refused += 1

    def _reserve_and_commit(self, full: bytes, seeds: U64) -> None:
        with self._namespace.reserve(full, wait_ms=self._wait_ms) as reservation:
            first, missing = reservation.present_pages, reservation.missing_pages
            self.tally.present += first
            if not missing:
                return
            made = self._maker.make(seeds[first : first + missing])
            for index in range(missing):
                reservation.write(first + index, made[index])
            result = reservation.commit()
            self.tally.stored += result.stored_pages
            self.tally.present += result.already_present_pages
            self.tally.written_bytes += made.nbytes

    def _seeds(self, symbols: bytes) -> U64:
        return page_seeds(self._salt, symbols, self._symbol_bytes)

    @contextlib.contextmanager
    def _timed(self, call: str) -> Iterator[None]:
        began = self._clock.now_ns()
        yield
        self.tally.latencies_ms.setdefault(call, []).append((self._clock.now_ns() - began) / 1e6)
