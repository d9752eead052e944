"""The class that SGLang loads. Each method finds its pool, asks it, and answers in SGLang's own terms.

SGLang calls it from three threads (look-ups, loads, stores) and from its scheduler. No method raises for a sidecar
that is absent, lost or slow: the answer is a miss, or "not stored". Settings that cannot work raise ConfigError when
the backend is made or a pool registered, which fails SGLang's start with the key's name.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult
from sglang.srt.observability.metrics_collector import StorageMetrics

from hicache.errors import InvalidArgumentError
from hicache.integrations.sglang.identity import rank_facts
from hicache.integrations.sglang.link import Link
from hicache.integrations.sglang.pool import bytes_of
from hicache.integrations.sglang.pools import KV, Pools, leading
from hicache.integrations.sglang.settings import read_settings
from hicache.integrations.sglang.store import PoolPages

log = logging.getLogger(__name__)

#: Figures that wait for ``get_stats``; SGLang asks about once a second.
MAX_FIGURES = 4096
Figures = deque[tuple[int, float]]  # pages of a call, and GB/s


class HiCacheStorageBackend(HiCacheStorage):  # type: ignore[misc]  # SGLang ships no types
    """SGLang's KV pages in a hicache sidecar on this host."""

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        """``kwargs``: what SGLang's factory passes on; nothing of it is used. Raises ConfigError."""
        del kwargs
        settings = read_settings(storage_config.extra_config)
        rank = rank_facts(storage_config, settings, metadata.version("sglang"))
        self._link = Link(settings, f"sglang {rank.model} {rank.tag(replicated=False)}")
        self._pools = Pools(self._link, rank)
        self._metrics = bool(storage_config.enable_storage_metrics)
        self._loads: Figures = deque(maxlen=MAX_FIGURES)
        self._stores: Figures = deque(maxlen=MAX_FIGURES)

    # --- pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The KV pool. Raises ConfigError for one that cannot be served."""
        super().register_mem_pool_host(mem_pool_host)
        self._pools.register(KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A pool beside it, such as Mamba states. Raises ConfigError for one that cannot be served."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._pools.register(str(host_pool_name), host_pool)

    # --- pages by key

    def exists(self, key: str) -> bool:
        """Whether a page is cached."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        """How many pages from the first are cached."""
        kv = self._pools.kv
        return 0 if kv is None else leading(kv.exist(keys))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """The page's tensor, filled; None where it is not there, or not sound."""
        sizes = None if target_sizes is None else [target_sizes]
        return self.batch_get([key], [target_location], sizes)[0]

    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[Any]:
        """The pages' tensors, filled; None for those that are not there, or not sound."""
        kv, places = self._pools.kv, list(target_locations or ())
        if kv is None or len(places) != len(keys):
            return [None] * len(keys)
        try:
            targets = [bytes_of(*pair) for pair in _pairs(places, target_sizes)]
            loaded = self._timed(self._loads, kv, lambda: kv.load_into(keys, targets))
        except InvalidArgumentError as error:
            log.error("batch_get: %s", error)
            return [None] * len(keys)
        return [place if sound else None for place, sound in zip(places, loaded, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store a page; true also where it was there."""
        values = None if value is None else [value]
        places = None if target_location is None else [target_location]
        return self.batch_set([key], values, places, None if target_sizes is None else [target_sizes])

    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store pages; true where all are there now."""
        kv = self._pools.kv
        places = list(values if values is not None else target_locations or ())
        if kv is None or len(places) != len(keys):
            return False
        try:
            sources = [bytes_of(*pair) for pair in _pairs(places, target_sizes)]
            return all(self._timed(self._stores, kv, lambda: kv.store_from(keys, sources)))
        except InvalidArgumentError as error:
            log.error("batch_set: %s", error)
            return False

    # --- pages of the KV pool

    def batch_get_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Fill pages of the KV pool; false for those that are not there, or not sound."""
        return self._move(self._loads, self._pools.kv, keys, host_indices)

    def batch_set_v1(self, keys: Sequence[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Store pages of the KV pool; true also for those that were there."""
        return self._move(self._stores, self._pools.kv, keys, host_indices)

    # --- pages of all pools

    def batch_exists_v2(
        self, keys: Sequence[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """The longest prefix that every pool can restore, and all lengths that can be."""
        lengths, reach = self._pools.restorable(keys, pool_transfers or ())
        return PoolTransferResult(lengths[-1] if lengths else 0, reach, lengths)

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Fill pages of several pools."""
        return {
            each.name: self._move(
                self._loads, self._pools.find(str(each.name)), each.keys or [], each.host_indices
            )
            for each in transfers
        }

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Store pages of several pools."""
        return {
            each.name: self._move(
                self._stores, self._pools.find(str(each.name)), each.keys or [], each.host_indices
            )
            for each in transfers
        }

    # --- the rest

    def clear(self) -> bool:
        """Drop this rank's pages of this model from the cache; others' stay."""
        return self._pools.clear()

    def get_stats(self) -> StorageMetrics:
        """Pages and GB/s of the calls since it was last asked; nothing without --enable-metrics."""
        stats = StorageMetrics()
        for figures, pages, speeds in (
            (self._loads, stats.prefetch_pgs, stats.prefetch_bandwidth),
            (self._stores, stats.backup_pgs, stats.backup_bandwidth),
        ):
            while figures:
                count, speed = figures.popleft()
                pages.append(count)
                speeds.append(speed)
        return stats

    def close(self) -> None:
        """End the session; what is cached stays. Idempotent."""
        self._pools.close()
        self._link.close()

    @property
    def counts(self) -> dict[str, Any]:
        """By pool, what became of its pages since the start; and the calls that a failing sidecar spoiled."""
        return {**self._pools.counts(), "failures": self._link.failures}

    def _move(
        self, figures: Figures, pool: PoolPages | None, keys: Sequence[str], host_indices: Any
    ) -> list[bool]:
        """Load or store pages, by which figures they go into."""
        if pool is None or not _fits(pool, keys, host_indices):
            return [False] * len(keys)
        work = pool.load if figures is self._loads else pool.store
        return self._timed(figures, pool, lambda: work(keys, host_indices))

    def _timed(self, figures: Figures, pool: PoolPages, work: Any) -> list[bool]:
        """What ``work`` answers; its figures are kept for ``get_stats``."""
        began_ns = self._link.now_ns()
        done: list[bool] = work()
        if self._metrics and done:
            took_ns = max(1, self._link.now_ns() - began_ns)
            figures.append((len(done), sum(done) * pool.pool.page_bytes / took_ns))  # bytes a ns: GB/s
        return done


def _fits(pool: PoolPages, keys: Sequence[str], host_indices: Any) -> bool:
    """Whether there are as many pages as keys."""
    expected = len(keys) * pool.pool.page_tokens
    given = -1 if host_indices is None else len(host_indices)
    if given != expected:
        log.error("%d keys come with %d indices where %d belong", len(keys), given, expected)
    return given == expected


def _pairs(places: Sequence[Any], sizes: Any) -> list[tuple[Any, Any]]:
    """Each place with its size, where sizes were given."""
    return list(zip(places, sizes if sizes is not None else [None] * len(places), strict=True))
