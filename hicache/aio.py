"""The asyncio client: ``from hicache.aio import Client``."""

from __future__ import annotations

from hicache.rpc.client.aio import Client

__all__ = ["Client"]
