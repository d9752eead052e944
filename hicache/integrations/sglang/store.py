"""Pages of one host pool in the cache: look-ups, loads and stores of lists of keys.

SGLang names a page by a digest of all that precedes it, and does not say reliably what precedes it
(``prefix_keys`` come only where one JSON key asks for them, and not from every caller). So each page is a prompt of
its own, found by its key alone, by any process and in any order. What a chain would give eviction, that a page is
never dropped before those that need it, is kept up by the order of uses: every call touches its last page first, so
that the first one is always the more recently used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any

import numpy as np

from hicache.errors import CorruptError, InvalidArgumentError, NotFoundError, StaleError
from hicache.integrations.sglang.identity import symbol
from hicache.integrations.sglang.link import COPY_LANES, Deadline, Link
from hicache.integrations.sglang.pool import HostPool
from hicache.rpc.client import Lease
from hicache.rpc.client.batch import StoreAsk
from hicache.rpc.client.batching import Batches, PageSource
from hicache.rpc.client.buffers import Bytes

#: Leased or stored at once.
PART_BYTES = 64 << 20
#: So much is worth a thread of its own.
LANE_BYTES = 2 << 20

Pieces = Sequence[Bytes]
Leased = tuple[int, Lease]


@dataclasses.dataclass(slots=True)
class PoolCounts:
    """What became of this pool's pages since the start."""

    loaded_pages: int = 0
    missed_pages: int = 0
    corrupt_pages: int = 0
    stored_pages: int = 0
    present_pages: int = 0
    refused_pages: int = 0


class PoolPages:
    """The cached pages of one host pool. Any thread may call it."""

    def __init__(self, link: Link, pool: HostPool, pages: Batches) -> None:
        self.pool = pool
        self.counts = PoolCounts()
        self._link = link
        self._pages = pages

    # --- look-up

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Whether each page is cached; all False where nobody can be asked."""
        found = [False] * len(keys)
        with self._link.call() as deadline:
            matched = self._match(keys, deadline)
            found = [pages == self.pool.parts for pages in matched]
        return found

    def clear(self) -> bool:
        """Drop all of this namespace that nobody reads. Answers whether it was done."""
        done = False
        with self._link.call() as deadline:
            deadline.left_ms()
            self._link.client.admin.clear(self._pages.handle)
            done = True
        return done

    # --- loads

    def load(self, keys: Sequence[str], host_indices: Any) -> list[bool]:
        """Copy pages into the pool; False for those that are not there, or not sound."""
        if self.pool.listed:
            return self._load(keys, self.pool.pages(host_indices), None)
        tensors = [self.pool.new_flat() for _ in keys]
        indices = host_indices[:: self.pool.page_tokens].tolist()

        def put(page: int) -> None:
            self.pool.write_flat(indices[page], tensors[page][0])

        return self._load(keys, [[raw] for _, raw in tensors], put)

    def load_into(self, keys: Sequence[str], targets: Sequence[Bytes]) -> list[bool]:
        """As ``load``, into memory of a page's size each."""
        return self._load(keys, [self._cut(target) for target in targets], None)

    def _load(
        self, keys: Sequence[str], targets: Sequence[Pieces], then: Callable[[int], None] | None
    ) -> list[bool]:
        self._same_length(keys, targets)
        done = [False] * len(keys)
        with self._link.call() as deadline:
            for part in self._parts(len(keys)):
                self._load_part(part, keys, targets, done, deadline)
        if then is not None:
            for page in (page for page, sound in enumerate(done) if sound):
                then(page)
        loaded = sum(done)
        self.counts.loaded_pages += loaded
        self.counts.missed_pages += len(done) - loaded
        return done

    def _load_part(
        self,
        part: range,
        keys: Sequence[str],
        targets: Sequence[Pieces],
        done: list[bool],
        deadline: Deadline,
    ) -> None:
        backwards = part[::-1]
        leases = self._link.fetch(self._pages, [self._prompt(keys[page]) for page in backwards], deadline)
        held = [lease for lease in leases if isinstance(lease, Lease)]
        try:
            there = [
                (page, lease)
                for page, lease in zip(part, leases[::-1], strict=True)
                if isinstance(lease, Lease) and len(lease) == self.pool.parts
            ]
            self._copy_together(there, targets, done, deadline)
        finally:
            self._link.client.release(held)

    def _copy_together(
        self, there: Sequence[Leased], targets: Sequence[Pieces], done: list[bool], deadline: Deadline
    ) -> None:
        """Copy pages on a few threads; returns only when none of them writes to a target any more."""

        def copy(lane: Sequence[Leased]) -> None:
            for page, lease in lane:
                deadline.left_ms()
                done[page] = self._copy(lease, targets[page])

        lanes = min(COPY_LANES, len(there) * self.pool.page_bytes // LANE_BYTES) or 1
        others = [self._link.copiers.submit(copy, there[lane::lanes]) for lane in range(1, lanes)]
        try:
            copy(there[::lanes])
        finally:
            wait(others)
        for other in others:
            other.result()  # raises what ended its lane

    def _copy(self, lease: Lease, pieces: Pieces) -> bool:
        """One page out of the cache; False where it is not what was stored."""
        try:
            if self.pool.parts > 1:
                lease.copy_into(list(pieces), verify="on-copy")
            elif len(pieces) == 1:
                lease.copy_into(pieces[0], verify="on-copy")
            else:
                _scatter(lease, pieces)
        except CorruptError:
            self.counts.corrupt_pages += 1
            lease.report_corrupt(range(len(lease)))
            return False
        except (NotFoundError, StaleError):
            return False
        return True

    # --- stores

    def store(self, keys: Sequence[str], host_indices: Any) -> list[bool]:
        """Put pages of the pool into the cache; False for those that found no room or did not arrive whole."""
        if self.pool.listed:
            pages = self.pool.pages(host_indices)
            return self._store(keys, len(pages), lambda page: pages[page])
        indices = host_indices[:: self.pool.page_tokens].tolist()
        return self._store(keys, len(indices), lambda page: [self.pool.read_flat(indices[page])])

    def store_from(self, keys: Sequence[str], values: Sequence[Bytes]) -> list[bool]:
        """As ``store``, out of memory of a page's size each."""
        return self._store(keys, len(values), lambda page: self._cut(values[page]))

    def _store(self, keys: Sequence[str], count: int, pieces: Callable[[int], Pieces]) -> list[bool]:
        self._same_length(keys, range(count))
        done = [False] * len(keys)
        with self._link.call() as deadline:
            for part in self._parts(len(keys)):
                self._store_part(part, keys, pieces, done, deadline)
        return done

    def _store_part(
        self,
        part: range,
        keys: Sequence[str],
        pieces: Callable[[int], Pieces],
        done: list[bool],
        deadline: Deadline,
    ) -> None:
        there = self._match([keys[page] for page in part], deadline)
        missing = []
        for page, matched in zip(part, there, strict=True):
            done[page] = matched == self.pool.parts
            if not done[page]:
                missing.append(page)
        self.counts.present_pages += len(part) - len(missing)
        missing.reverse()
        stores = [(self._prompt(keys[page]), self._sources(pieces(page))) for page in missing]
        settings = self._link.settings
        ask = StoreAsk(
            min(settings.store_wait_ms, deadline.left_ms() * 3 // 4), durable=settings.ack == "durable"
        )
        for page, outcome in zip(missing, self._pages.store(stores, ask, deadline.left_s()), strict=True):
            done[page] = outcome.present_pages + outcome.stored_pages == self.pool.parts
            self.counts.stored_pages += done[page]
            self.counts.refused_pages += not done[page]

    def _sources(self, pieces: Pieces) -> list[PageSource]:
        """Where the parts of a page are: in the pool's own memfd, or to be gathered."""
        found = []
        for row in self.pool.rows(pieces):
            place = self.pool.place(row[0]) if len(row) == 1 else None
            found.append(PageSource(row) if place is None else PageSource(row, place[0], place[1]))
        return found

    # --- what all share

    def _match(self, keys: Sequence[str], deadline: Deadline) -> list[int]:
        prompts = [self._prompt(key) for key in reversed(keys)]
        return self._pages.match(prompts, deadline.left_s())[::-1]

    def _prompt(self, key: str) -> bytes:
        return symbol(key) * self.pool.parts

    def _parts(self, count: int) -> list[range]:
        each = max(1, PART_BYTES // self.pool.page_bytes)
        return [range(first, min(first + each, count)) for first in range(0, count, each)]

    def _cut(self, page: Bytes) -> Pieces:
        """A flat page as its parts. Raises InvalidArgumentError for another size."""
        if page.nbytes != self.pool.page_bytes:
            raise InvalidArgumentError(
                f"pool {self.pool.name}: {page.nbytes} bytes given, a page has {self.pool.page_bytes}"
            )
        return np.split(page, self.pool.parts) if self.pool.parts > 1 else [page]

    def _same_length(self, keys: Sequence[str], pages: Sequence[Any]) -> None:
        if len(keys) != len(pages):
            raise InvalidArgumentError(f"pool {self.pool.name}: {len(keys)} keys for {len(pages)} pages")


def _scatter(lease: Lease, pieces: Pieces) -> None:
    """Copy a page out in pieces. Raises CorruptError, NotFoundError, StaleError; the pieces are not to be used then."""
    row, at = np.frombuffer(lease.views()[0], dtype=np.uint8), 0
    for piece in pieces:
        np.copyto(piece, row[at : at + piece.nbytes])
        at += piece.nbytes
    if not lease.still_valid():
        raise NotFoundError("the lease was lost while its page was copied")
