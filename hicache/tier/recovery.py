"""Read the tree's bones back from the rows of all shards, without touching a page's body.

Rows come in the order of their keys, which are hashes. Every row is checked against its key (a key is the hash
of its parent's key and its symbol), so a rotten row is an orphan, not a wrong page. What is needed of a row is
collected in flat buffers, about 120 bytes a page; the symbols, which can be much longer, are read again when
their chain is handed out. Children find their parents by sorting (``forest``), a million in a second.

Snapshots of the shards stay open until the iteration ends, and no shard is moved meanwhile.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt

from hicache.keys import KEY_BYTES
from hicache.tier.forest import Forest, Rows, grow_forest, surplus_of
from hicache.tier.rows import (
    CHARGE_MASK,
    NAMESPACE_AT,
    PARENT_AT,
    ROW_VERSION,
    SYMBOL_AT,
    VERSION_AT,
    upgraded,
)
from hicache.tier.shelf import Look, Shard
from hicache.types import Namespace

_HEAD = np.dtype(
    [("charge", "<u8"), ("last_use_ms", "<u8"), ("hits", "<u4"), ("space", "V32"), ("parent", "V32")]
)
assert _HEAD.itemsize == SYMBOL_AT, "the flat head is a row's"
_PAGES_PER_BLOCK = 1 << 14


@dataclasses.dataclass(frozen=True, slots=True)
class RecoveredChain:
    """Consecutive pages of one namespace, up to where several continue or none does.

    ``parent`` is the index, among the chains of this namespace so far, of the chain whose last page is the
    parent of this one's first; -1 at the root; -2 stranded: the parent, ``parent_key``, is not stored.
    ``symbols`` is the pages' symbols concatenated, ``charges`` their bytes of capacity, ``last_use_ms`` and
    ``hits`` the greatest of these pages and all below them.
    """

    namespace_fingerprint: bytes
    parent: int
    symbols: bytes
    keys: list[bytes]
    charges: list[int]
    last_use_ms: int = 0
    hits: int = 0
    parent_key: bytes = b""


class _Table:
    """Rows of one namespace, flat."""

    __slots__ = ("heads", "keys", "shards")

    def __init__(self) -> None:
        self.keys = bytearray()
        self.heads = bytearray()
        self.shards: list[tuple[int, Shard]] = []  # (rows so far, the shard they are from)

    def rows(self) -> Rows:
        """As arrays. The buffers are given up."""
        keys = np.frombuffer(self.keys, dtype="V32")
        heads = np.frombuffer(self.heads, dtype=_HEAD)
        shards = np.zeros(len(keys), dtype=np.int16)
        start = 0
        for index, (end, _) in enumerate(self.shards):
            shards[start:end] = index
            start = end
        charges = heads["charge"] & np.uint64(CHARGE_MASK)
        rows = Rows(
            keys,
            heads["parent"].copy(),
            charges.astype(np.int64),
            heads["last_use_ms"].astype(np.int64),
            heads["hits"].copy(),
            shards,
        )
        self.heads = bytearray()
        return rows


class Recovery:
    """One pass over the store's contents. Iterate it once, before the first PUT: ``for chain in recovery``.

    ``orphans``, complete after the iteration: keys of rows that nobody can read, of unknown namespaces, and of
    pages that are too many for the capacity. Nothing will ever match them: delete them. ``copies``: pages that a
    crash left in a second shard.
    """

    def __init__(
        self,
        look: Callable[[], Look],
        namespaces: dict[bytes, Namespace],
        *,
        usable_bytes: int,
        on_end: Callable[[Recovery], None] = lambda _: None,
    ) -> None:
        self._look = look
        self._namespaces = namespaces
        self._usable_bytes = usable_bytes
        self._on_end = on_end
        self.orphans: list[bytes] = []
        self.copies: list[tuple[Shard, bytes]] = []
        self.surplus: list[bytes] = []

    def __iter__(self) -> Generator[RecoveredChain, None, None]:
        look = self._look()
        try:
            tables = self._scan(look)
            forests = self._grow(tables)
            self.orphans.extend(self.surplus)
            for space in list(forests):
                yield from _chains(look, space, forests.pop(space), tables.pop(space))
        finally:
            look.close()
            self._on_end(self)

    # -- the rows

    def _scan(self, look: Look) -> dict[bytes, _Table]:
        """All sound rows by namespace; snapshots of all shards are taken first, as of one moment."""
        while True:
            for shard in look.shards:
                look.txn(shard)
            if not look.outdated:
                break
            look.renew()
        tables = {space: _Table() for space in self._namespaces}
        widths = {space: SYMBOL_AT + n.symbol_bytes for space, n in self._namespaces.items()}
        for shard in look.shards:
            self._scan_shard(look.txn(shard), shard, tables, widths)
            for table in tables.values():
                table.shards.append((len(table.keys) // KEY_BYTES, shard))
        return tables

    def _scan_shard(
        self, txn: lmdb.Transaction, shard: Shard, tables: dict[bytes, _Table], widths: dict[bytes, int]
    ) -> None:
        sha256 = hashlib.sha256
        for raw_key, raw_row in txn.cursor(db=shard.db.meta):
            key, row = bytes(raw_key), bytes(raw_row)
            if len(row) <= VERSION_AT or row[VERSION_AT] != ROW_VERSION:
                row = upgraded(row)
            space = row[NAMESPACE_AT:PARENT_AT]
            if len(row) == widths.get(space) and sha256(row[PARENT_AT:]).digest() == key:
                table = tables[space]
                table.keys += key
                table.heads += row[:SYMBOL_AT]
            else:
                self.orphans.append(key)

    def _grow(self, tables: dict[bytes, _Table]) -> dict[bytes, Forest]:
        """Trees of every namespace that has pages, without copies and without what is too much."""
        forests = {}
        for space, table in tables.items():
            if not table.keys:
                continue
            rows = table.rows()
            rows, copies = rows.without_copies()
            self.copies += [(table.shards[shard][1], key) for key, shard in copies]
            forests[space] = grow_forest(rows, space)
        for space, doomed in surplus_of(forests, self._usable_bytes).items():
            rows = forests[space].rows
            self.surplus += [rows.keys[i].tobytes() for i in np.flatnonzero(doomed)]
            kept = rows.take(np.flatnonzero(~doomed))
            if len(kept):
                forests[space] = grow_forest(kept, space)
            else:
                del forests[space]
        return forests


def _chains(look: Look, space: bytes, forest: Forest, table: _Table) -> Iterator[RecoveredChain]:
    """Hand one namespace out: reachable chains first, parents before children."""
    rows, order, starts = forest.rows, forest.order, forest.starts
    txns = [(look.txn(shard), shard.db.meta) for _, shard in table.shards]
    chain, chains = 0, len(starts) - 1
    while chain < chains:
        # As many chains as fill a block, one at least: what is read at once is bounded.
        last = int(np.searchsorted(starts, starts[chain] + _PAGES_PER_BLOCK, side="right")) - 1
        last = min(max(last, chain + 1), chains)
        base = int(starts[chain])
        pages = order[base : int(starts[last])]
        keys = _split(rows.keys[pages])
        charges = rows.charges[pages].tolist()
        shards = rows.shards[pages].tolist()
        for index in range(chain, last):
            start, end = int(starts[index]) - base, int(starts[index + 1]) - base
            symbols = b"".join([_symbol(txns[shards[at]], keys[at]) for at in range(start, end)])
            parent = int(forest.parents[index])
            yield RecoveredChain(
                space,
                parent,
                symbols,
                keys[start:end],
                charges[start:end],
                int(forest.last_use_ms[index]),
                int(forest.hits[index]),
                b"" if parent != _STRANDED else rows.parents[int(pages[start])].tobytes(),
            )
        chain = last


_STRANDED = -2


def _split(keys: npt.NDArray[np.void]) -> list[bytes]:
    flat = keys.tobytes()
    return [flat[at : at + KEY_BYTES] for at in range(0, len(flat), KEY_BYTES)]


def _symbol(place: tuple[lmdb.Transaction, Any], key: bytes) -> bytes:
    """A page's symbol, from its row in the snapshot."""
    txn, meta = place
    row = bytes(txn.get(key, b"", db=meta))
    return row[SYMBOL_AT:] if row[VERSION_AT] == ROW_VERSION else upgraded(row)[SYMBOL_AT:]
