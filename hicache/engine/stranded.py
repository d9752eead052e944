"""Pages on the durable tier that cannot be reached: the page before them is not stored, what stands above unknown.

They come with a recovery. Nobody can match them; they are counted and charged, are the first to go when their pool
needs room, and come back to life when the page before them is in the tree again (``recovery.revive``).

A ledger of chains by the key of the page before the first. A page key names everything before it too, so that one
table serves all namespaces. Chains come after the chain that they hang below, and leave in the reverse order.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hicache.keys import KEY_BYTES

if TYPE_CHECKING:
    from hicache.engine.core import Core
    from hicache.engine.holders import NamespaceState
    from hicache.engine.pools import Pool


@dataclasses.dataclass(slots=True, eq=False)
class StrandedChain:
    """Consecutive pages of one history. Columns are packed: there may be many chains for long."""

    namespace: NamespaceState
    symbols: bytes
    keys: bytes  # joined
    charges: array[int]
    tick: int
    hits: int
    number: int = -1  # among the chains of its recovery, while that goes on
    sibling: StrandedChain | None = None  # the next one after the same page

    @property
    def pages(self) -> int:
        """How many."""
        return len(self.charges)

    def key_list(self) -> list[bytes]:
        """The keys, one a page."""
        return [self.keys[at : at + KEY_BYTES] for at in range(0, len(self.keys), KEY_BYTES)]


class Stranded:
    """The ledger. ``pages`` and ``units`` (of capacity) are of all chains in it."""

    def __init__(self) -> None:
        self._after: dict[bytes, StrandedChain] = {}  # by the key of the page before the first
        self._namespaces: dict[int, int] = {}  # pages, by namespace
        self.pages = 0
        self.units = 0

    def __iter__(self) -> Iterator[tuple[bytes, StrandedChain]]:
        """Every chain with the key that it waits for."""
        for key, chain in self._after.items():
            each: StrandedChain | None = chain
            while each is not None:
                yield key, each
                each = each.sibling

    def has(self, namespace: int) -> bool:
        """Whether any of a namespace's pages are here. O(1)."""
        return namespace in self._namespaces

    def add(self, parent_key: bytes, chain: StrandedChain) -> None:
        """Keep a chain aside. O(pages)."""
        chain.sibling = self._after.get(parent_key)
        self._after[parent_key] = chain
        self._count(chain, chain.pages, sum(chain.charges))

    def take(self, parent_key: bytes, *, starting: bytes = b"") -> list[StrandedChain]:
        """The chains that follow this page, whose keys begin with these: no longer in the ledger. O(them)."""
        found: list[StrandedChain] = []
        stay: list[StrandedChain] = []
        each = self._after.pop(parent_key, None)
        while each is not None:
            (found if each.keys.startswith(starting) else stay).append(each)
            each = each.sibling
        for chain in found:
            self._count(chain, -chain.pages, -sum(chain.charges))
            chain.sibling = None
        if stay:
            self._after[parent_key] = stay[0]
            for before, after in zip(stay, [*stay[1:], None], strict=True):
                before.sibling = after
        return found

    def trim(self, units: int) -> tuple[list[bytes], int]:
        """Take pages off the end of the last chain until they hold ``units`` or it is empty; there must be one.

        Returns the keys of those pages, and the units that they held.
        """
        parent_key, chain = next(reversed(self._after.items()))
        count = freed = 0
        while count < chain.pages and freed < units:
            count += 1
            freed += chain.charges[-count]
        keys = chain.key_list()[-count:]
        self._count(chain, -count, -freed)
        if count < chain.pages:
            width = len(chain.symbols) // chain.pages
            chain.symbols = chain.symbols[: -count * width]
            chain.keys = chain.keys[: -count * KEY_BYTES]
            del chain.charges[-count:]
        elif chain.sibling is not None:
            self._after[parent_key] = chain.sibling
        else:
            del self._after[parent_key]
        return keys, freed

    def forget_numbers(self, namespace: int) -> None:
        """A namespace's recovery is over: nobody asks by number any more, and each is an object of 32 bytes."""
        if self.has(namespace):
            for _, chain in self:
                if chain.namespace.id == namespace:
                    chain.number = -1

    def drop(self, namespace: int) -> list[StrandedChain]:
        """The chains of a namespace (0: of all), which leave the ledger. O(chains)."""
        dropped: list[StrandedChain] = []
        if not namespace or self.has(namespace):
            for key in list(self._after):
                if not namespace or self._after[key].namespace.id == namespace:
                    dropped += self.take(key)
        return dropped

    def _count(self, chain: StrandedChain, pages: int, units: int) -> None:
        number = chain.namespace.id
        self.pages += pages
        self.units += units
        left = self._namespaces.get(number, 0) + pages
        if left:
            self._namespaces[number] = left
        else:
            del self._namespaces[number]


def arriving(core: Core, tier: int) -> set[bytes]:
    """Keys that are being written to a tier: these pages have been stored anew, and stay. O(pages under way)."""
    found = {key for _, ingest in core.ingests.values() for key in ingest.keys}
    for job in core.copies.values():
        if job.dst == tier:
            found.update(key for run in job.runs for key in core.keys(run))
    return found


def delete(core: Core, keys: list[bytes]) -> None:
    """Have stranded pages deleted, but for those of which a new copy is on its way: that one replaces the old."""
    under_way = arriving(core, core.durable_tier)
    gone = [key for key in keys if key not in under_way]
    if gone:
        core.free_keys(core.durable_tier, gone)


def give_room(core: Core, pool: Pool, units: int) -> bool:
    """Give up stranded pages until the pool has so many units; whether it has."""
    while units > pool.available and core.stranded.pages:
        keys, freed = core.stranded.trim(units - pool.available)
        pool.used -= freed
        delete(core, keys)
        core.counters.dropped_pages[pool.tier] += len(keys)
        core.room_changed = True
    return units <= pool.available
