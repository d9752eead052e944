"""The operators' calls of the asyncio client."""

from __future__ import annotations

from collections.abc import Sequence

from hicache.rpc.client import administration
from hicache.rpc.client.aio_driver import Driver
from hicache.rpc.client.arguments import count_of
from hicache.rpc.client.handles import NamespaceBase
from hicache.rpc.client.prompt import Tokens
from hicache.rpc.client.results import Advice, CheckResult, EvictResult, PinResult, Stats, Tree


class Admin:
    """For the sidecar's own user, root, or a token marked so; others get DeniedError."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    async def pin(
        self,
        namespace: NamespaceBase,
        tokens: Tokens,
        tier: int | str = 0,
        *,
        ttl_ms: int = 0,
        extra_keys: Sequence[bytes] | None = None,
    ) -> PinResult:
        """Keep a prefix in a tier until ``unpin``, or for ``ttl_ms``."""
        prompt, ttl_ms = namespace._pack(tokens, extra_keys), count_of("ttl_ms", ttl_ms)
        return await self._driver.run(
            administration.pin(self._driver.core, namespace._state, prompt, tier, ttl_ms)
        )

    async def unpin(self, pin: int) -> None:
        """End a pin."""
        await self._driver.run(administration.unpin(self._driver.core, pin))

    async def evict(
        self,
        namespace: NamespaceBase,
        tokens: Tokens,
        tier: int | str | None = None,
        *,
        extra_keys: Sequence[bytes] | None = None,
    ) -> EvictResult:
        """Move a prefix and what continues it out of a tier; None: out of all of them."""
        prompt = namespace._pack(tokens, extra_keys)
        return await self._driver.run(administration.evict(self._driver.core, namespace._state, prompt, tier))

    async def clear(self, namespace: NamespaceBase | None = None) -> EvictResult:
        """Drop all that is neither leased nor pinned, of one namespace or of all."""
        state = namespace._state if namespace is not None else None
        return await self._driver.run(administration.clear(self._driver.core, state))

    async def stats(self) -> Stats:
        """The sidecar's figures."""
        return await self._driver.run(administration.stats(self._driver.core))

    async def tree(self, namespace: NamespaceBase | None = None, *, max_nodes: int = 0) -> Tree:
        """The cache's tree; ``max_nodes`` 0: the server's default."""
        state = namespace._state if namespace is not None else None
        max_nodes = count_of("max_nodes", max_nodes)
        return await self._driver.run(administration.tree(self._driver.core, state, max_nodes))

    async def check(self) -> CheckResult:
        """The engine's own invariant check; takes time in proportion to what is cached."""
        return await self._driver.run(administration.check(self._driver.core))

    async def advice(self) -> Advice:
        """What other sizes and policies would have done with the last look-ups; takes about a second."""
        return await self._driver.run(administration.advice(self._driver.core))

    async def drain(self, grace_ms: int = 10_000) -> None:
        """Stop the sidecar gracefully."""
        await self._driver.run(administration.drain(self._driver.core, count_of("grace_ms", grace_ms)))
