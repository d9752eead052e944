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
from collections.abc import Callable, Generator, Iterator, Sequence
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

_FIELDS = [("charge", "<u8"), ("last_use_ms", "<u8"), ("hits", "<u4"), ("space", "V32"), ("parent", "V32")]
assert np.dtype(_FIELDS).itemsize == SYMBOL_AT, "the flat head is a row's"
#: Symbols up to this size are kept from the first reading: reading a row again costs two microseconds.
_SHORT_SYMBOL_BYTES = 64
_PACK_BYTES = 2 << 20  # of keys
_PAGES_PER_BLOCK = 1 << 14
_ROWS_PER_REPORT = 4096


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
    """Rows of one namespace: bytes as they come, packed into columns every so often."""

    __slots__ = ("_head", "_packed", "heads", "kept_bytes", "keys", "shard", "width")

    def __init__(self, symbol_bytes: int) -> None:
        self.width = SYMBOL_AT + symbol_bytes
        short = symbol_bytes <= _SHORT_SYMBOL_BYTES
        self._head = np.dtype([*_FIELDS, ("symbol", f"V{symbol_bytes}")] if short else _FIELDS)
        self.kept_bytes = self._head.itemsize
        self._packed: list[Rows] = []
        self.keys = bytearray()
        self.heads = bytearray()
        self.shard = 0  # index, among the shards looked at, of the one that the bytes are from

    def pack(self) -> None:
        """Turn the bytes into columns."""
        if not self.keys:
            return
        heads = np.frombuffer(self.heads, dtype=self._head)
        self._packed.append(
            Rows(
                np.frombuffer(self.keys, dtype="V32"),
                heads["parent"].copy(),
                (heads["charge"] & np.uint64(CHARGE_MASK)).astype(np.int64),
                heads["last_use_ms"].astype(np.int64),
                heads["hits"].copy(),
                np.full(len(heads), self.shard, dtype=np.int16),
                heads["symbol"].copy() if self.kept_bytes == self.width else None,
            )
        )
        self.keys, self.heads = bytearray(), bytearray()

    def rows(self) -> Rows | None:
        """All of them, once; None when there are none."""
        packed, self._packed = self._packed, []
        return Rows.joined(packed) if packed else None


class Recovery:
    """One pass over the store's contents. Iterate it once, before the first PUT: ``for chain in recovery``.

    ``orphans``, complete after the iteration: keys of rows that nobody can read, of unknown namespaces, and of
    pages that are too many for the capacity. Nothing will ever match them: delete them. ``copies``: pages that a
    crash left in a second shard. ``read_rows`` of ``total_rows``: how far it is before the first chain, which comes
    when all rows are read.
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
        self.read_rows = self.total_rows = 0

    def __iter__(self) -> Generator[RecoveredChain, None, None]:
        look = self._look()
        try:
            tables = self._scan(look)
            forests = self._grow(tables, look.shards)
            for space in list(forests):
                yield from _chains(look, space, forests.pop(space))
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
        self.total_rows = sum(look.txn(shard).stat(shard.db.meta)["entries"] for shard in look.shards)
        tables = {space: _Table(n.symbol_bytes) for space, n in self._namespaces.items()}
        for index, shard in enumerate(look.shards):
            for table in tables.values():
                table.shard = index
            self._scan_shard(look.txn(shard), shard, tables)
            for table in tables.values():
                table.pack()
        return tables

    def _scan_shard(self, txn: lmdb.Transaction, shard: Shard, tables: dict[bytes, _Table]) -> None:
        sha256 = hashlib.sha256
        before = self.read_rows
        for number, (raw_key, raw_row) in enumerate(txn.cursor(db=shard.db.meta)):
            if not number % _ROWS_PER_REPORT:
                self.read_rows = before + number
            key, row = bytes(raw_key), bytes(raw_row)
            if len(row) <= VERSION_AT or row[VERSION_AT] != ROW_VERSION:
                row = upgraded(row)
            table = tables.get(row[NAMESPACE_AT:PARENT_AT])
            if table is not None and len(row) == table.width and sha256(row[PARENT_AT:]).digest() == key:
                table.keys += key
                table.heads += row[: table.kept_bytes]
                if len(table.keys) >= _PACK_BYTES:
                    table.pack()
            else:
                self.orphans.append(key)
        self.read_rows = before + txn.stat(shard.db.meta)["entries"]

    def _grow(self, tables: dict[bytes, _Table], shards: Sequence[Shard]) -> dict[bytes, Forest]:
        """Trees of every namespace that has pages, without copies and without what is too much."""
        forests = {}
        for space, table in tables.items():
            rows = table.rows()
            if rows is not None:
                rows, copies = rows.without_copies()
                self.copies += [(shards[shard], key) for key, shard in copies]
                forests[space] = grow_forest(rows, space)
            del rows
        for space, doomed in surplus_of(forests, self._usable_bytes).items():
            rows = forests[space].rows
            self.orphans += [rows.keys[i].tobytes() for i in np.flatnonzero(doomed)]
            kept = rows.take(np.flatnonzero(~doomed))
            if len(kept):
                forests[space] = grow_forest(kept, space)
            else:
                del forests[space]
        return forests


def _chains(look: Look, space: bytes, forest: Forest) -> Iterator[RecoveredChain]:
    """Hand one namespace out: reachable chains first, parents before children."""
    rows, order, starts = forest.rows, forest.order, forest.starts
    txns = [(look.txn(shard), shard.db.meta) for shard in look.shards]
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
        flat = rows.symbols[pages].tobytes() if rows.symbols is not None else b""
        width = len(flat) // len(pages)
        for index in range(chain, last):
            start, end = int(starts[index]) - base, int(starts[index + 1]) - base
            symbols = flat[start * width : end * width] or b"".join(
                [_symbol(txns[shards[at]], keys[at]) for at in range(start, end)]
            )
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
