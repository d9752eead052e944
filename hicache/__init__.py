"""hicache: a tiered prefix cache for the KV pages of LLM inference engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hicache.version import __version__

if TYPE_CHECKING:
    from hicache.rpc.client import Client as Client

__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> object:
    # Lazy: `import hicache` must stay cheap and must not need grpc (the pure floors run on a bare checkout).
    if name == "Client":
        from hicache.rpc.client import Client

        return Client
    raise AttributeError(f"module 'hicache' has no attribute {name!r}")
