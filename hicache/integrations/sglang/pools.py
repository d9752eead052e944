"""All host pools of one rank: the KV pool and those beside it, each with its own pages in the cache."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hicache.errors import InvalidArgumentError
from hicache.integrations.sglang.identity import PoolFacts, RankFacts, namespace_fields
from hicache.integrations.sglang.link import Link
from hicache.integrations.sglang.pool import HostPool
from hicache.integrations.sglang.store import PoolCounts, PoolPages
from hicache.rpc.client.batching import Batches

log = logging.getLogger(__name__)

KV = "kv"
ALL_PAGES, TRAILING_PAGES = "all_pages", "trailing_pages"


class Pools:
    """The pools of one rank. Registered by SGLang's main thread; used from three others."""

    def __init__(self, link: Link, rank: RankFacts) -> None:
        self._link = link
        self._rank = rank
        self._lock = threading.Lock()
        self._pages: dict[str, PoolPages] = {}
        self._known: dict[str, Any] = {}
        self._kv: PoolFacts | None = None

    @property
    def kv(self) -> PoolPages | None:
        """The KV pool; None before SGLang has registered it."""
        return self._pages.get(KV)

    def find(self, name: str) -> PoolPages | None:
        """The pool of that name; None where it was never registered."""
        return self._pages.get(name)

    def register(self, name: str, pool: Any) -> None:
        """Take a pool, once; again where SGLang made it anew. Raises ConfigError for one that cannot be served."""
        with self._lock:
            if self._known.get(name) is pool:
                return
            host = HostPool(name, pool, self._link.client.adopt_memory)
            facts = host.facts()
            kv = facts if name == KV else self._kv
            if kv is None:
                raise InvalidArgumentError(f"pool {name} was registered before the KV pool")
            fields = namespace_fields(self._rank, facts, kv, self._link.settings)
            batches = Batches(self._link.client, self._link.client.namespace(**fields))
            before = self._pages.get(name)
            self._pages[name] = PoolPages(self._link, host, batches)
            self._known[name] = pool
            if name == KV:
                self._kv = facts
            if before is not None:
                before.pool.close()
        how = "in place" if host.mapped else "by copying"
        log.info("hicache: pool %s, pages of %d bytes, stored %s (%s)", name, host.page_bytes, how, facts)

    def close(self) -> None:
        """Let go of the pools."""
        with self._lock:
            for pages in self._pages.values():
                pages.pool.close()
            self._pages.clear()
            self._known.clear()

    def clear(self) -> bool:
        """Drop what these pools have in the cache. Answers whether all of it could be."""
        return all([pages.clear() for pages in list(self._pages.values())])

    def counts(self) -> Mapping[str, PoolCounts]:
        """By pool, what became of its pages."""
        return {name: pages.counts for name, pages in self._pages.items()}

    # --- which prefixes can be had with all pools

    def restorable(self, keys: Sequence[str], transfers: Sequence[Any]) -> tuple[list[int], dict[str, int]]:
        """The prefix lengths, in pages, that every pool can restore; and how far each pool reaches by itself.

        A transfer's ``hit_policy``: ``all_pages`` (every page of the prefix), or ``trailing_pages`` (the last
        ``len(transfer.keys)`` of it). Raises InvalidArgumentError for another.
        """
        reach: dict[str, int] = {}
        kv_pages = leading(self._exist(KV, keys))
        if kv_pages:
            reach[KV] = kv_pages
        left = set(range(1, kv_pages + 1))
        for transfer in transfers:
            if not left:
                break
            found = set(self._prefixes(transfer, keys[:kv_pages]))
            if found:
                reach[str(transfer.name)] = max(found)
            left &= found
        return sorted(left), reach

    def _prefixes(self, transfer: Any, keys: Sequence[str]) -> Iterator[int]:
        """The prefix lengths that one pool can restore."""
        policy = getattr(transfer.hit_policy, "value", transfer.hit_policy)  # SGLang: an Enum of strings
        there = self._exist(str(transfer.name), keys)
        if policy == ALL_PAGES:
            yield from range(1, leading(there) + 1)
        elif policy == TRAILING_PAGES:
            trailing = max(1, len(transfer.keys or ()))
            for pages in range(1, len(keys) + 1):
                if all(there[max(0, pages - trailing) : pages]):
                    yield pages
        else:
            raise InvalidArgumentError(f"pool {transfer.name}: hit policy {policy!r} is not supported")

    def _exist(self, name: str, keys: Sequence[str]) -> list[bool]:
        pages = self.find(name)
        return [False] * len(keys) if pages is None else pages.exist(keys)


def leading(flags: Sequence[bool]) -> int:
    """How many are true from the start."""
    return next((index for index, flag in enumerate(flags) if not flag), len(flags))
