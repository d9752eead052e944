"""Read the tree's bones back from the meta rows, without touching a page's body.

Rows come in the order of their keys, which are hashes; the chains are found again through the parent keys.
Every row is checked against its key (a key is the hash of its parent's key and its symbol), so a rotten row
is an orphan, not a wrong page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import lmdb

from hicache.keys import chain_keys
from hicache.tier.lmdb_env import Database, unpack_row
from hicache.types import Namespace, PageRecord

_Children = dict[bytes, list[bytes]]  # parent key -> keys, of one namespace


@dataclasses.dataclass(frozen=True, slots=True)
class RecoveredChain:
    """Consecutive pages of one namespace, up to where several continue or none does.

    ``parent`` is the index, among the chains of this namespace so far, of the chain whose last page is the
    parent of this one's first; -1 at the root. ``symbols`` is the pages' symbols concatenated, ``charges``
    their bytes of capacity.
    """

    namespace_fingerprint: bytes
    parent: int
    symbols: bytes
    keys: list[bytes]
    charges: list[int]
    last_use_ms: int = 0
    hits: int = 0
    parent_key: bytes = b""


class Recovery:
    """One pass over the store's contents. Iterate it once, before the first PUT: ``for chain in recovery``.

    ``orphans``, complete after the iteration: keys of stored pages that no chain reaches (their parent or
    namespace is gone, or the row is unreadable). Nothing will ever match them: delete them.
    """

    def __init__(self, database: Database, namespaces: dict[bytes, Namespace]) -> None:
        self._db = database
        self._namespaces = namespaces
        self.orphans: list[bytes] = []

    def __iter__(self) -> Iterator[RecoveredChain]:
        with self._db.env.begin(db=self._db.meta) as txn:
            forest = self._scan(txn)
            for fingerprint, children in forest.items():
                yield from _chains(txn, fingerprint, children)
                for keys in children.values():  # what the walk did not take
                    self.orphans.extend(keys)

    def _scan(self, txn: lmdb.Transaction) -> dict[bytes, _Children]:
        """Children by parent, for each namespace."""
        forest: dict[bytes, _Children] = {fingerprint: {} for fingerprint in self._namespaces}
        for raw_key, value in txn.cursor():
            key, row = bytes(raw_key), unpack_row(bytes(value))
            record = row.record if row is not None else None
            namespace = self._namespaces.get(record.namespace) if record is not None else None
            if record is None or namespace is None or not _sound(key, record, namespace):
                self.orphans.append(key)
            else:
                forest[record.namespace].setdefault(record.parent_key, []).append(key)
        return forest


def _sound(key: bytes, record: PageRecord, namespace: Namespace) -> bool:
    """Whether the row is the one this key was made of."""
    width = len(record.symbol)
    return width == namespace.symbol_bytes and chain_keys(record.parent_key, record.symbol, width) == [key]


def _chains(txn: lmdb.Transaction, fingerprint: bytes, children: _Children) -> Iterator[RecoveredChain]:
    """Walk one namespace from its root, parents first; takes what it emits out of ``children``."""
    todo = [(-1, key) for key in reversed(children.pop(fingerprint, []))]
    index = 0
    while todo:
        parent, first = todo.pop()
        keys, following = [first], children.pop(first, [])
        while len(following) == 1:
            keys.append(following[0])
            following = children.pop(following[0], [])
        yield _chain(txn, fingerprint, parent, keys)
        todo.extend((index, key) for key in reversed(following))
        index += 1


def _chain(txn: lmdb.Transaction, fingerprint: bytes, parent: int, keys: list[bytes]) -> RecoveredChain:
    symbols, charges = [], []
    for key in keys:
        row = unpack_row(bytes(txn.get(key, b"")))
        assert row is not None and row.record is not None, "the scan saw this row in the same snapshot"
        symbols.append(row.record.symbol)
        charges.append(row.charge)
    return RecoveredChain(fingerprint, parent, b"".join(symbols), keys, charges)
