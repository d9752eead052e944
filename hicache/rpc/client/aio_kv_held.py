"""Paged KV in the asyncio client: registered regions, and transfers, each of which is a task."""

from __future__ import annotations

import asyncio
from typing import Any, Generic, Self

from hicache.errors import UnavailableError
from hicache.rpc.client.aio_driver import Driver
from hicache.rpc.client.kv import KvState, Loaded
from hicache.rpc.client.kv_handles import (
    CLOSE_TIMEOUT_S,
    LOOK_FIRST_S,
    LOOK_MOST_S,
    Begun,
    KvRegionBase,
    LoadBase,
    StoreBase,
    TransferBase,
)
from hicache.rpc.client.results import CommitResult
from hicache.rpc.client.steps import T


class KvRegion(KvRegionBase):
    """An engine's KV that the sidecar copies to and from. An ``async with`` closes it.

    Registered anew by itself when a session was lost and there is another one.
    """

    def __init__(self, driver: Driver, state: KvState) -> None:
        super().__init__(driver.core, state)
        self._driver = driver

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def settle(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Wait until nothing is copied to or from it: after a transfer whose ``result`` was that nobody answered.

        Stores that still wait for layers are cut short. False where it is not known in time. The next transfer
        registers it again.
        """
        return await self._driver.run(self._settle(timeout_s))

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Have the sidecar let go of it, when transfers under way have ended; see ``settle``. Idempotent.

        False where the sidecar is out of reach or not done in time: if it lives, it may still copy for a while.
        """
        return True if self._state.closed else await self._driver.run(self._close(timeout_s))


class Transfer(TransferBase, Generic[T]):
    """A transfer under way, in a task of its own: a caller that is cancelled leaves it running."""

    def __init__(self, driver: Driver, begun: Begun[T]) -> None:
        super().__init__(driver.core, begun.progress)
        self._task: asyncio.Task[T] = driver.start(begun.steps)
        # steps that were never begun end nothing by themselves
        self._task.add_done_callback(lambda _: begun.progress.end(good=False, settled=False))

    async def result(self, timeout_s: float | None = None) -> T:
        """How it ended. Raises UnavailableError after ``timeout_s``, or what the call failed with.

        UnavailableError, StaleError: nobody answered, and the sidecar, if it lives, may still be copying:
        ``KvRegion.settle`` waits until it is not.
        """
        await asyncio.wait([self._task], timeout=timeout_s)
        if not self._task.done():
            raise UnavailableError(f"the transfer has not ended after {timeout_s:g} s")
        if self._task.cancelled():
            raise UnavailableError("the client was closed before the transfer ended")
        return self._task.result()


class Load(Transfer[Loaded], LoadBase):
    """Leased pages on their way into an engine's KV; keep the lease, and leave the blocks alone, until ``result``.

    **Layers that have arrived may be used, and what was computed with them counts once ``result`` says that every
    page arrived.**
    """

    async def wait_layer(self, layer: int, timeout_s: float | None = None) -> bool:
        """Wait until a layer is there. False: the load has failed, see ``result``. Raises UnavailableError."""
        core, pause_s = self._core, LOOK_FIRST_S
        deadline_ns = None if timeout_s is None else core.now_ns() + int(timeout_s * 1e9)
        while (arrived := self._arrived(layer)) is None:
            if deadline_ns is not None and timeout_s is not None and core.now_ns() >= deadline_ns:
                raise self._late(layer, timeout_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_MOST_S)
        return arrived

    async def wait_layer_on(self, stream: Any, layer: int) -> None:
        """Have a CUDA stream wait for a layer; returns at once. The stream goes on where the load fails, too.

        Where streams cannot wait for counters, or for None, waits here.
        """
        if not self._wait_on(stream, layer):
            await self.wait_layer(layer)


class Store(Transfer[CommitResult], StoreBase):
    """Pages on their way out of an engine's KV; leave the blocks as they are until ``result``.

    Its result is what ``Reservation.commit`` answers. Take it before the reservation is aborted.
    """
