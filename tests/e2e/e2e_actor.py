"""A client that knows what every page must hold. Imported by the tests and by the worker processes: keep it light."""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any

import numpy as np

import hicache
from hicache.cli.payload import U64, PageMaker, page_seeds
from hicache.errors import CorruptError, ExhaustedError, HicacheError
from hicache.rpc.client import Lease, NamespaceHandle

PAGE_TOKENS = 8
PAGE_BYTES = 16 << 10
SYMBOL_BYTES = PAGE_TOKENS * 4
SHARED_PAGES = 3  # of every talk, the first pages are those of its group
GROUPS = 5


@functools.cache
def tokens_of(talk: int) -> bytes:
    """The tokens of a talk, long enough for any test; talks of one group begin alike."""
    shared = np.random.default_rng([1, talk % GROUPS]).integers(0, 1 << 30, SHARED_PAGES * PAGE_TOKENS)
    own = np.random.default_rng([2, talk]).integers(0, 1 << 30, 1024 * PAGE_TOKENS)
    return np.concatenate([shared, own]).astype("<i4").tobytes()


def prompt(talk: int, pages: int) -> bytes:
    """The first pages of a talk."""
    return tokens_of(talk)[: pages * SYMBOL_BYTES]


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What one look-up found; ``corrupt``: refused by a checksum, which is a miss."""

    matched: int
    granted: int
    wrong_bytes: int
    corrupt: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Storing:
    """What one store did. Pages; ``durable`` counts those that were acknowledged as such, from the first on."""

    stored: int
    present: int
    durable: int


class Actor:
    """One client, one namespace, pages made of ``salt`` and tokens. ``fields`` and ``options`` go to the client."""

    def __init__(
        self,
        target: str,
        *,
        salt: str = "e2e",
        page_bytes: int = PAGE_BYTES,
        fields: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.client = hicache.Client(target, **options)
        self.salt = salt
        named = {"model": "e2e", "salt": salt, "page_tokens": PAGE_TOKENS, "page_bytes": page_bytes}
        self.ns: NamespaceHandle = self.client.namespace(**(named | (fields or {})))
        self.maker = PageMaker(page_bytes)

    def __enter__(self) -> Actor:
        self.client.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def seeds(self, tokens: bytes) -> U64:
        return page_seeds(self.salt, tokens, self.ns.spec.symbol_bytes)

    # --- storing

    def store(self, talk: int, pages: int, *, durable: bool = False, wait_ms: int = 10_000) -> Storing:
        """Store a talk up to that many pages, in as many parts as the server wants. Raises what the client raises."""
        tokens, stored, present, sure = prompt(talk, pages), 0, -1, 0
        seeds = self.seeds(tokens)
        while True:
            with self.ns.reserve(tokens, wait_ms=wait_ms) as room:
                present = room.present_pages if present < 0 else present
                first, missing = room.present_pages, room.missing_pages
                if not missing:
                    break
                made = self.maker.make(seeds[first : first + missing])
                for at in range(missing):
                    room.write(first + at, made[at])
                done = room.commit(durable=durable)
                stored += done.stored_pages
                if (
                    durable and done.durable_pages == missing
                ):  # and so is what is above: the disk tier has no holes
                    sure = first + missing
        return Storing(stored, present, sure)

    # --- reading

    def read(self, talk: int, pages: int, *, wait_ms: int = 10_000, verify: str = "on-copy") -> Reading:
        """Lease what is cached of a talk and compare every byte."""
        tokens = prompt(talk, pages)
        with self.ns.fetch(tokens, wait_ms=wait_ms) as lease:
            return self.look(lease, talk, verify=verify)

    def look(self, lease: Lease, talk: int, *, verify: str = "on-copy") -> Reading:
        """Copy a lease's pages out and compare every byte. Raises what the copy raises, but for corruption."""
        granted = lease.granted_pages
        found = np.empty((granted, lease.page_bytes), np.uint8)
        try:
            lease.copy_into(found, verify=verify)
        except CorruptError:
            return Reading(lease.matched_pages, granted, 0, corrupt=True)
        wrong = self.wrong(talk, found) if granted else 0
        return Reading(lease.matched_pages, granted, wrong, corrupt=False)

    def wrong(self, talk: int, found: Any) -> int:
        """How many bytes of a talk's first pages are not what they should be."""
        return self.maker.wrong_bytes(self.seeds(prompt(talk, len(found))), 0, found)

    def matched(self, talk: int, pages: int) -> int:
        return self.ns.match(prompt(talk, pages)).matched_pages

    # --- a mix of both

    def work(self, turns: int, seed: int, first_talk: int, talks: int = 6, most: int = 24) -> dict[str, int]:
        """Read and grow talks at random; errors of any kind are the caller's to see."""
        rng = np.random.default_rng([3, seed])
        lengths: dict[int, int] = {}
        tally = dict.fromkeys(("reads", "granted", "wrong", "corrupt", "stored", "refused"), 0)
        for _ in range(turns):
            talk = first_talk + int(rng.integers(talks))
            pages = lengths.get(talk, SHARED_PAGES) + int(rng.integers(1, 4))
            lengths[talk] = pages if pages <= most else SHARED_PAGES
            seen = self.read(talk, pages)
            tally["reads"] += 1
            tally["granted"] += seen.granted
            tally["wrong"] += seen.wrong_bytes
            tally["corrupt"] += seen.corrupt
            try:
                tally["stored"] += self.store(talk, pages).stored
            except ExhaustedError:
                tally["refused"] += 1
        return tally


class LoadThread:
    """Stores and reads in a thread, keeps on through errors that the client declares, and remembers what it was told.

    ``durable``: by talk, how many pages were acknowledged as durable. ``stored``: talks that may be there.
    """

    def __init__(self, actor: Actor, seed: int, first_talk: int, *, durable: bool = True) -> None:
        self.durable: dict[int, int] = {}
        self.tried: dict[int, int] = {}
        self.errors: dict[str, int] = {}
        self.wrong_bytes = 0
        self.turns = 0
        self.crash: BaseException | None = None
        self._actor, self._ask = actor, durable
        self._rng = np.random.default_rng([4, seed])
        self._next_talk = first_talk
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LoadThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the load thread hangs"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except HicacheError as error:
                name = type(error).__name__
                self.errors[name] = self.errors.get(name, 0) + 1
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                self.crash = error
                return
            self.turns += 1

    def _turn(self) -> None:
        talk, pages = self._next_talk, int(self._rng.integers(4, 14))
        self._next_talk += 1
        self.tried[talk] = pages
        done = self._actor.store(talk, pages, durable=self._ask, wait_ms=1_000)
        # what was there before is the group's: acknowledged by whoever stored it
        if self._ask and done.present + done.stored == pages and done.durable:
            self.durable[talk] = done.durable
        old = int(self._rng.choice(list(self.tried)))
        self.wrong_bytes += self._actor.read(old, self.tried[old], wait_ms=1_000).wrong_bytes
