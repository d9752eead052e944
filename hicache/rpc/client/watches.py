"""Watches as iterators, for both clients."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from hicache.rpc.client.watch import EventBatch, WatchAsk, WatchState

if TYPE_CHECKING:
    from hicache.rpc.client import aio_driver, driver


class Watch:
    """Batches of events, one thread's. ``close``, from any thread, ends the iteration."""

    def __init__(self, owner: driver.Driver, ask: WatchAsk) -> None:
        self._driver = owner
        self._state = WatchState(owner.core, ask)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> EventBatch:
        batch = self._driver.run(self._state.batch())
        if batch is None:
            raise StopIteration
        return batch

    def close(self) -> None:
        """No more batches. Idempotent."""
        self._driver.run(self._state.end())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncWatch:
    """Batches of events, one task's. ``close`` ends the iteration."""

    def __init__(self, owner: aio_driver.Driver, ask: WatchAsk) -> None:
        self._driver = owner
        self._state = WatchState(owner.core, ask)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> EventBatch:
        batch = await self._driver.run(self._state.batch())
        if batch is None:
            raise StopAsyncIteration
        return batch

    async def close(self) -> None:
        """No more batches. Idempotent."""
        await self._driver.run(self._state.end())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.close()
