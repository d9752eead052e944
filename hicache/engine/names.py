"""The second storey of the engine's core: what is read off a run, its pool, its keys, what policies are told of it."""

from __future__ import annotations

import sys
from array import array

from hicache.engine.holders import NamespaceState
from hicache.engine.pools import Pool
from hicache.engine.state import State
from hicache.policy import RunInfo
from hicache.tree import Run
from hicache.types import NO_USE, SymbolKind, Use


class Names(State):
    """Answers about one run."""

    def pool(self, run: Run, tier: int) -> Pool:
        """The run's pool in a tier."""
        return namespace_of(run).pools[tier]

    def run_units(self, run: Run, tier: int) -> int:
        """Units of the pool that the run holds in a tier."""
        places = run.slots[tier]
        if places is None:
            return 0
        return sum(places) if self.tiers[tier].keyed else run.pages

    def keys(self, run: Run) -> list[bytes]:
        """The page keys of a run, computed if they were not yet."""
        namespace = namespace_of(run)
        return namespace.tree.page_keys(run, namespace.fingerprint)

    def page_ids(self, run: Run) -> list[int]:
        """The ghost ids of a run's pages: eight bytes of what names the page and everything before it.

        That is the client's hash where pages are named so, else the page key, which is computed once.
        """
        namespace = namespace_of(run)
        if namespace.spec.symbol_kind is SymbolKind.TOKENS:
            return [int.from_bytes(key[:8], "little") for key in self.keys(run)]
        return ids_of_hashes(namespace, run.tree.symbols(run))

    def info(self, run: Run) -> RunInfo:
        """What policies and admission are told of a run."""
        key = run.last_key
        use = run.use
        if type(use) is not Use:
            use = NO_USE
        return RunInfo(run.pages, run.tree.depth_pages(run), key, use.cls, use.turn, use.cost)


def ids_of_hashes(namespace: NamespaceState, symbols: bytes) -> list[int]:
    """The ghost ids of pages that are named by hashes."""
    mix = int.from_bytes(namespace.fingerprint[:8], "little")
    width = namespace.tree.symbol_bytes
    if width % 8 or sys.byteorder == "big":
        return [int.from_bytes(symbols[at : at + 8], "little") ^ mix for at in range(0, len(symbols), width)]
    return [word ^ mix for word in array("Q", symbols)[:: width // 8]]


def namespace_of(run: Run) -> NamespaceState:
    """The namespace of a run that the engine has adopted."""
    namespace = run.extra
    assert isinstance(namespace, NamespaceState)
    return namespace
