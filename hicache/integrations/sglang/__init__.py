"""hicache as SGLang's HiCache storage (``--hicache-storage-backend dynamic``); docs/SGLANG.md tells how.

``HiCacheStorageBackend`` is what SGLang loads. It imports SGLang, so it is loaded only when asked for; everything
else here works without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hicache.integrations.sglang.backend import HiCacheStorageBackend

__all__ = ["HiCacheStorageBackend"]


def __getattr__(name: str) -> Any:
    if name == "HiCacheStorageBackend":
        from hicache.integrations.sglang.backend import HiCacheStorageBackend

        return HiCacheStorageBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
