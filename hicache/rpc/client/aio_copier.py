"""Engine-driven copies for the asyncio client: ``copier`` with ``await``. Waiting is done in threads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

from hicache.rpc.client.aio_held import Lease, Reservation
from hicache.rpc.client.copier import CopierBase, StoreBase
from hicache.rpc.client.options import Verify
from hicache.rpc.client.results import CommitResult

if TYPE_CHECKING:
    from hicache.device.copying.jobs import LoadHandle


class Load:
    """A load under way."""

    def __init__(self, handle: LoadHandle) -> None:
        self.handle = handle

    @property
    def pages(self) -> int:
        """How many are loaded."""
        return self.handle.pages

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.handle.done

    @property
    def corrupt_pages(self) -> tuple[int, ...]:
        """Pages of the lease that are not what was stored, once it has ended."""
        return self.handle.corrupt_pages

    def cancel(self) -> None:
        """End it soon, with an error."""
        self.handle.cancel()

    async def wait(self, timeout_s: float | None = None) -> None:
        """As ``LoadHandle.wait``. A caller that is cancelled leaves the copy under way."""
        await asyncio.to_thread(self.handle.wait, timeout_s)

    async def wait_layer(self, layer: int, stream: Any = None, timeout_s: float | None = None) -> None:
        """As ``LoadHandle.wait_layer``; on a GPU give the stream that is to wait: a thread's own is another."""
        await asyncio.to_thread(self.handle.wait_layer, layer, stream, timeout_s)


class Packing(StoreBase):
    """See StoreBase. At the end of an ``async with`` what was not committed is abandoned."""

    _room: Reservation

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.abandon()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Until packed. Raises what it failed with, UnavailableError if it has not ended in time (and goes on)."""
        await asyncio.to_thread(self._handle.wait, timeout_s)

    async def commit(
        self, *, durable: bool = False, last: bool = True, timeout_s: float | None = None
    ) -> CommitResult:
        """Wait until packed, then make the pages matchable; as ``Reservation.commit``."""
        await asyncio.to_thread(self._handle.wait, timeout_s)
        return await self._room.commit(self._adopt(), durable=durable, last=last, timeout_s=timeout_s)

    async def abandon(self) -> None:
        """Stop packing, wait until it has stopped, give back what was not committed. Idempotent."""
        self._handle.cancel()
        await asyncio.to_thread(self._handle.wait_end)
        self._let_go()


class Copier(CopierBase):
    """Copies between leased or reserved pages and one engine's paged KV; made by ``Client.copier``."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def load(
        self,
        lease: Lease,
        blocks: Any = None,
        *,
        places: Any = None,
        first_page: int = 0,
        layers: range | None = None,
        stream: Any = None,
        verify: Verify | str | None = None,
    ) -> Load:
        """Begin to copy granted pages into blocks; see the synchronous copier."""
        where = self._where(blocks, places, lease.page_bytes)
        if lease._state.streamed and lease._state.private is None and len(lease):
            await lease.views()  # read from the server, once
        return Load(self._load(lease, where, first_page, layers, stream=stream, verify=verify))

    async def store(
        self,
        reservation: Reservation,
        blocks: Any = None,
        *,
        places: Any = None,
        first_page: int = 0,
        stream: Any = None,
        layered: bool = False,
        verify: Verify | str | None = None,
    ) -> Packing:
        """Begin to pack pages of the prompt; see the synchronous copier."""
        where = self._where(blocks, places, reservation.page_bytes)
        packing = self._pack(reservation, where, first_page, stream=stream, layered=layered, verify=verify)
        return Packing(self, reservation, packing)

    async def close(self) -> None:
        """Let copies under way end, fail the others, unregister all memory. Idempotent."""
        await asyncio.to_thread(self._close)
