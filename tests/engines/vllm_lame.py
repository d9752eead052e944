"""A connector whose second rank can map no staging memory, as where a container hides other processes' descriptors."""

from __future__ import annotations

from typing import Any

from hicache.errors import StaleError
from hicache.integrations.vllm.connector import HiCacheConnector


class LameConnector(HiCacheConnector):
    """As it is, but for rank 1."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        if self._worker._rank == 1:
            self._worker._maps.rows = refuse


def refuse(*_: object) -> None:
    raise StaleError("no staging memory here")
