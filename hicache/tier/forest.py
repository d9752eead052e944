"""Trees from rows that know their parents only by key: pure, vectorised, no objects per page.

Two tools: a join of keys by their first eight bytes (equal prefixes are told apart by the whole key), and
pointer doubling, which carries a value along paths of any length in a logarithmic number of passes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.void]  # dtype V32
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ROOT, STRANDED = -1, -2


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Pages of one namespace, as columns."""

    keys: Keys
    parents: Keys
    charges: Ints
    last_use_ms: Ints
    hits: npt.NDArray[np.uint32]
    shards: npt.NDArray[np.int16]
    symbols: npt.NDArray[np.void] | None = None  # where they are short; else they are read again

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, which: Ints) -> Rows:
        """These rows only."""
        return Rows(
            self.keys[which],
            self.parents[which],
            self.charges[which],
            self.last_use_ms[which],
            self.hits[which],
            self.shards[which],
            None if self.symbols is None else self.symbols[which],
        )

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """Some rows after the others. ``parts`` is emptied column by column, so that little is held twice."""
        columns: list[Any] = []
        split = [[getattr(part, field.name) for field in dataclasses.fields(Rows)] for part in parts]
        parts.clear()
        for at in range(len(split[0])):
            column = [part[at] for part in split]
            columns.append(None if column[0] is None else np.concatenate(column))
            for part in split:
                part[at] = None
        return Rows(*columns)

    def without_copies(self) -> tuple[Rows, list[tuple[bytes, int]]]:
        """Each page once; of every copy left out its key and its shard."""
        order = np.argsort(_prefixes(self.keys), kind="stable")
        sorted_prefixes = _prefixes(self.keys)[order]
        if not (sorted_prefixes[1:] == sorted_prefixes[:-1]).any():
            return self, []
        seen: set[bytes] = set()
        twins = np.zeros(len(self), dtype=bool)
        same = sorted_prefixes[1:] == sorted_prefixes[:-1]
        near = np.zeros(len(self), dtype=bool)
        near[1:] |= same
        near[:-1] |= same
        copies = []
        for at in order[near]:
            key = self.keys[at].tobytes()
            if key in seen:
                twins[at] = True
                copies.append((key, int(self.shards[at])))
            seen.add(key)
        return self.take(np.flatnonzero(~twins)), copies


@dataclasses.dataclass(frozen=True, slots=True)
class Forest:
    """Pages as chains: chain ``c`` is ``order[starts[c]:starts[c + 1]]``, a chain's parent stands before it.

    ``parents``: index of a chain, ROOT, or STRANDED; stranded chains and what hangs on them come last.
    ``last_use_ms``, ``hits`` of a chain: the greatest of its pages and of all below. ``heat_ms``, ``depth`` and
    ``stranded`` are per page.
    """

    rows: Rows
    order: Ints
    starts: Ints
    parents: Ints
    last_use_ms: Ints
    hits: Ints
    heat_ms: Ints
    depth: Ints
    stranded: Bools


def grow_forest(rows: Rows, seed: bytes) -> Forest:
    """The trees of one namespace. ``seed``: the parent key of first pages."""
    count = len(rows)
    parent = _join(rows)
    is_first = _equal_to(rows.parents, seed)
    tops = np.flatnonzero(parent < 0)
    depth, top = _climb(parent)
    stranded = ~is_first[top]
    assert len(tops), "keys are hashes: nothing is its own ancestor"
    heat_ms = _max_below(rows.last_use_ms.copy(), parent)
    hits = _max_below(rows.hits.astype(np.int64), parent)

    children = np.bincount(parent[parent >= 0], minlength=count)
    is_head = (parent < 0) | (children[parent] != 1)
    heads = np.flatnonzero(is_head)
    up = np.where(is_head, np.arange(count), parent)
    head = _follow(up)
    # chains: reachable before stranded, nearer to the root before farther
    rank_order = np.lexsort((depth[heads], stranded[heads]))
    ranked = heads[rank_order]
    rank = np.empty(count, dtype=np.int64)
    rank[ranked] = np.arange(len(ranked))
    order = np.lexsort((depth, rank[head]))
    lengths = np.bincount(rank[head], minlength=len(ranked))
    starts = np.concatenate(([0], np.cumsum(lengths)))
    above = parent[ranked]
    chain_parents = np.where(above >= 0, rank[head[above]], np.where(is_first[ranked], ROOT, STRANDED))
    return Forest(rows, order, starts, chain_parents, heat_ms[ranked], hits[ranked], heat_ms, depth, stranded)


def surplus_of(forests: dict[bytes, Forest], usable_bytes: int) -> dict[bytes, Bools]:
    """Which pages are too many: stranded ones, then the coldest, leaves before what they hang on."""
    total = sum(int(forest.rows.charges.sum()) for forest in forests.values())
    if total <= usable_bytes:
        return {}
    spaces = list(forests)
    charges = np.concatenate([forests[s].rows.charges for s in spaces])
    keys = (
        np.concatenate([-forests[s].depth for s in spaces]),
        np.concatenate([forests[s].heat_ms for s in spaces]),
        np.concatenate([~forests[s].stranded for s in spaces]),
    )
    order = np.lexsort(keys)  # a descendant is never warmer than its ancestors, and deeper
    freed = np.cumsum(charges[order])
    needed = int(np.searchsorted(freed, total - usable_bytes)) + 1
    doomed = np.zeros(len(charges), dtype=bool)
    doomed[order[:needed]] = True
    ends = np.cumsum([len(forests[s].rows) for s in spaces])
    parts = np.split(doomed, ends[:-1])
    return {space: part for space, part in zip(spaces, parts, strict=True) if part.any()}


def _prefixes(keys: Keys) -> npt.NDArray[np.uint64]:
    """The first eight bytes as a number."""
    words: npt.NDArray[np.uint64] = np.ascontiguousarray(keys).view("<u8").reshape(-1, 4)[:, 0]
    return words


def _equal(a: Keys, b: Keys) -> Bools:
    left = np.ascontiguousarray(a).view("<u8").reshape(-1, 4)
    right = np.ascontiguousarray(b).view("<u8").reshape(-1, 4)
    same: Bools = (left == right).all(axis=1)
    return same


def _equal_to(keys: Keys, one: bytes) -> Bools:
    words = np.ascontiguousarray(keys).view("<u8").reshape(-1, 4)
    same: Bools = (words == np.frombuffer(one, dtype="<u8")).all(axis=1)
    return same


def _join(rows: Rows) -> Ints:
    """Index of each row's parent, -1 where it is not among them."""
    own, wanted = _prefixes(rows.keys), _prefixes(rows.parents)
    order = np.argsort(own, kind="stable")
    sorted_own = own[order]
    found = np.full(len(rows), -1, dtype=np.int64)
    at = np.searchsorted(sorted_own, wanted)
    open_rows = np.arange(len(rows))
    while len(open_rows):  # once, unless different keys begin alike
        inside = at[open_rows] < len(rows)
        open_rows = open_rows[inside]
        alike = sorted_own[at[open_rows]] == wanted[open_rows]
        open_rows = open_rows[alike]
        candidates = order[at[open_rows]]
        hit = _equal(rows.keys[candidates], rows.parents[open_rows])
        found[open_rows[hit]] = candidates[hit]
        open_rows = open_rows[~hit]
        at[open_rows] += 1
    return found


def _climb(parent: Ints) -> tuple[Ints, Ints]:
    """Pages above each page, and the topmost of these."""
    up = np.where(parent >= 0, parent, np.arange(len(parent)))
    depth = (parent >= 0).astype(np.int64)
    while True:
        further = depth[up]
        if not further.any():
            return depth, up
        depth += further
        up = up[up]


def _follow(up: Ints) -> Ints:
    """Where a path of pointers ends."""
    while True:
        further = up[up]
        if (further == up).all():
            return up
        up = further


def _max_below(value: Ints, parent: Ints) -> Ints:
    """The greatest value of each page and all below it. Changes ``value``."""
    ancestor = parent.copy()
    active = np.flatnonzero(ancestor >= 0)
    while len(active):
        # the values as they were before this pass, so that each pass doubles the reach
        np.maximum.at(value, ancestor[active], value[active])
        further = np.full(len(parent), -1, dtype=np.int64)
        further[active] = ancestor[ancestor[active]]
        ancestor = further
        active = active[ancestor[active] >= 0]
    return value
