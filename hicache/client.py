"""The client and the words of its calls: ``from hicache.client import Client, FetchQuery, KvMemory``.

What stands here is what ``hicache.rpc.client`` offers; the asyncio client is ``hicache.aio.Client``.
"""

from __future__ import annotations

from hicache.rpc.client import *  # noqa: F403  # its __all__ is the public API, kept in one place
