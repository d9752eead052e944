"""Paged KV in the synchronous client: registered regions, and transfers, each of which has a thread of its own."""

from __future__ import annotations

import concurrent.futures
from typing import Any, Generic, Self

from hicache.errors import UnavailableError
from hicache.rpc.client.driver import Driver
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
    """An engine's KV that the sidecar copies to and from. A ``with`` closes it.

    Registered anew by itself when a session was lost and there is another one.
    """

    def __init__(self, driver: Driver, state: KvState) -> None:
        super().__init__(driver.core, state)
        self._driver = driver

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def settle(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Wait until nothing is copied to or from it: after a transfer whose ``result`` was that nobody answered.

        Stores that still wait for layers are cut short. False where it is not known in time. The next transfer
        registers it again.
        """
        return self._driver.run(self._settle(timeout_s))

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Have the sidecar let go of it, when transfers under way have ended; see ``settle``. Idempotent.

        False where the sidecar is out of reach or not done in time: if it lives, it may still copy for a while.
        """
        return True if self._state.closed else self._driver.run(self._close(timeout_s))


class Transfer(TransferBase, Generic[T]):
    """A transfer under way, in a thread of its own."""

    def __init__(self, driver: Driver, begun: Begun[T]) -> None:
        super().__init__(driver.core, begun.progress)
        self._future: concurrent.futures.Future[T] = driver.start(begun.steps)

    def result(self, timeout_s: float | None = None) -> T:
        """How it ended. Raises UnavailableError after ``timeout_s``, or what the call failed with.

        UnavailableError, StaleError: nobody answered, and the sidecar, if it lives, may still be copying:
        ``KvRegion.settle`` waits until it is not.
        """
        try:
            return self._future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            raise UnavailableError(f"the transfer has not ended after {timeout_s:g} s") from None


class Load(Transfer[Loaded], LoadBase):
    """Leased pages on their way into an engine's KV; keep the lease, and leave the blocks alone, until ``result``.

    **Layers that have arrived may be used, and what was computed with them counts once ``result`` says that every
    page arrived.**
    """

    def wait_layer(self, layer: int, timeout_s: float | None = None) -> bool:
        """Wait until a layer is there. False: the load has failed, see ``result``. Raises UnavailableError."""
        core, pause_s = self._core, LOOK_FIRST_S
        deadline_ns = None if timeout_s is None else core.now_ns() + int(timeout_s * 1e9)
        while (arrived := self._arrived(layer)) is None:
            if deadline_ns is not None and timeout_s is not None and core.now_ns() >= deadline_ns:
                raise self._late(layer, timeout_s)
            self._progress.ended.wait(pause_s)
            pause_s = min(2 * pause_s, LOOK_MOST_S)
        return arrived

    def wait_layer_on(self, stream: Any, layer: int) -> None:
        """Have a CUDA stream wait for a layer; returns at once. The stream goes on where the load fails, too.

        Where streams cannot wait for counters, or for None, waits here.
        """
        if not self._wait_on(stream, layer):
            self.wait_layer(layer)


class Store(Transfer[CommitResult], StoreBase):
    """Pages on their way out of an engine's KV; leave the blocks as they are until ``result``.

    Its result is what ``Reservation.commit`` answers. Take it before the reservation is aborted.
    """
