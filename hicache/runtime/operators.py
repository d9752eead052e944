"""Operators' calls."""

from __future__ import annotations

from hicache.engine import events
from hicache.engine.actions import EvictResult, PinResult
from hicache.runtime.door import Door
from hicache.runtime.loop import EngineLoop
from hicache.runtime.namespaces import NamespaceBook

EVERYWHERE = -1  # as a tier: all of them


class OperatorCalls:
    """Pin, unpin, evict, clear."""

    def __init__(self, loop: EngineLoop, namespaces: NamespaceBook, *, door: Door) -> None:
        self._loop = loop
        self._namespaces = namespaces
        self._door = door

    async def pin(self, namespace: int, prompt: bytes, tier: int, *, ttl_ms: int = 0) -> PinResult:
        """Keep a prefix in a tier, until ``unpin`` or for ``ttl_ms``."""
        self._door.admit()
        whole = self._namespaces.prompt(namespace, prompt)
        return await self._loop.call(
            PinResult, lambda request: events.Pin(request, namespace, whole, tier, ttl_ms)
        )

    async def unpin(self, pin: int) -> None:
        """Let it go; unknown pins are fine."""
        self._loop.handle(events.Unpin(pin))

    async def evict(self, namespace: int, prompt: bytes, tier: int = EVERYWHERE) -> EvictResult:
        """Make a prefix, and what hangs below it, leave a tier, or all."""
        whole = self._namespaces.prompt(namespace, prompt)
        return await self._loop.call(
            EvictResult, lambda request: events.Evict(request, namespace, whole, tier)
        )

    async def clear(self, namespace: int = 0) -> EvictResult:
        """Drop whatever nobody holds, of one namespace or (0) of all."""
        if namespace:
            self._namespaces.find(namespace)
        return await self._loop.call(EvictResult, lambda request: events.Clear(request, namespace))
