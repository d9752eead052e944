"""What the asyncio client hands out and takes back: the synchronous handles with ``await``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hicache.rpc.client import buffers, in_place
from hicache.rpc.client.aio_driver import Driver
from hicache.rpc.client.aio_kv_held import KvRegion, Load, Store
from hicache.rpc.client.arguments import refuse_torch_views
from hicache.rpc.client.calls import CommitAsk
from hicache.rpc.client.handles import LeaseBase, ReservationBase
from hicache.rpc.client.kv_handles import begin_load, begin_store
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.options import Verify
from hicache.rpc.client.reservation import ReservationState
from hicache.rpc.client.results import CommitResult, OperationResult, StoreResult
from hicache.rpc.client.storing import Pages


class Lease(LeaseBase):
    """Pages lent for reading; given back once, by ``release`` or at the end of an ``async with``.

    What its views and arrays show is good only while ``still_valid()``; copies are checked before they are returned.
    """

    def __init__(self, driver: Driver, state: LeaseState) -> None:
        super().__init__(driver.core, state)
        self._driver = driver

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.release()

    async def views(self) -> list[memoryview]:
        """A read-only view of each granted page, in place where it is mapped.

        Raises NotFoundError or StaleError for a lease that is over, CorruptError where ``verify`` is "always".
        """
        return await self._driver.run(self._views())

    async def numpy(self, dtype: npt.DTypeLike = np.uint8) -> list[npt.NDArray[Any]]:
        """As ``views``, as read-only one-dimensional arrays."""
        return buffers.as_arrays(await self.views(), dtype)

    async def torch(self, dtype: Any = None, *, copy: bool = True) -> Any:
        """A checked copy of all granted pages: a CPU tensor of shape (pages, elements of a page)."""
        refuse_torch_views(copy=copy)
        tensor, rows = buffers.new_tensor(len(self), self.page_bytes, dtype)
        await self.copy_into(rows)
        return tensor

    async def tensors(self) -> list[Any]:
        """Pages in the device tier's pool on a GPU, in place: uint8 tensors (pages, page_bytes), in page order.

        One for pages that follow each other there. Nobody may write to them; what was computed with them counts only
        if ``still_valid()`` holds once the GPU is done. Raises UnsupportedError where the pages are elsewhere, or the
        sidecar does not share its pool (--share-device); and as ``views`` does.
        """
        return await self._driver.run(in_place.tensors(self._core, self._state))

    async def copy_into(
        self, into: Any, first: int = 0, count: int | None = None, *, verify: Verify | str | None = None
    ) -> int:
        """Copy pages from ``first`` on into one big buffer, or one buffer a page. Answers how many.

        Raises NotFoundError (the lease expired meanwhile), StaleError (its session is gone) or CorruptError; the
        buffers then hold nothing to be used.
        """
        return await self._driver.run(self._copy(into, first, count, verify))

    async def load(
        self,
        kv: KvRegion,
        places: Any,
        *,
        first_page: int = 0,
        first_layer: int = 0,
        layers: int | None = None,
        layered: bool = False,
        verify: bool = True,
        timeout_s: float | None = None,
    ) -> Load:
        """Have the sidecar copy pages, from ``first_page`` on, into an engine's KV; returns when it has been begun.

        ``places``: of ``KvRegion.places``, one row a page. ``layered``: layers can be waited for one by one. Of the
        pages, layers [first_layer, first_layer + layers). Several may run at once, in different blocks. Raises
        InvalidArgumentError, UnsupportedError (says what to do instead), and as ``views`` does.
        """
        ask, how = (places, first_page, first_layer, layers, verify), (layered, timeout_s)
        begun = await self._driver.run(begin_load(self._core, self._state, kv, ask, how))
        return Load(self._driver, begun)

    async def renew(self, ttl_ms: int = 0) -> None:
        """Keep it for ``ttl_ms`` from now (0: the server's default). Raises NotFoundError if it is lost."""
        await self._driver.run(self._renew(ttl_ms))

    async def wait(self, wait_ms: int) -> OperationResult:
        """Wait for pages that are on their way; more of them may be granted afterwards."""
        return await self._driver.run(self._wait(wait_ms))

    async def report_corrupt(self, pages: Iterable[int]) -> int:
        """Have the sidecar look at pages again whose checksums said no; answers how many were really bad.

        Those leave every tier whose copy is bad, and this lease ends before the first of them. Of the others nothing
        happens. Raises NotFoundError or StaleError where the lease is gone.
        """
        return await self._driver.run(self._report_corrupt(pages))

    async def release(self) -> None:
        """Give the pages back. Idempotent; never raises for a server that is gone."""
        if not self._state.over:
            await self._driver.run(self._release())


class Reservation(ReservationBase):
    """Room for missing pages. An ``async with`` aborts what was not committed."""

    def __init__(self, driver: Driver, state: ReservationState) -> None:
        super().__init__(driver.core, state)
        self._driver = driver

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.abort()

    async def write(self, page: int, data: Any) -> None:
        """Copy a page's bytes (buffer, array or CPU tensor) into its buffer."""
        await self._driver.run(self._write(page, data))

    async def commit(
        self,
        pages: Iterable[int] | None = None,
        *,
        durable: bool = False,
        last: bool = True,
        verify: bool = True,
        timeout_s: float | None = None,
    ) -> CommitResult:
        """Make prepared pages matchable (``durable``: and safe from a crash); None: all that are prepared.

        ``last=False`` keeps the reservation for more. ``verify`` sends checksums, which the server compares with its
        own copy.
        """
        return await self._driver.run(self._commit(pages, timeout_s, CommitAsk(durable, last, verify)))

    async def store(self, pages: Pages, *, durable: bool = False) -> StoreResult:
        """Write and commit all missing pages, in parts of bounded size.

        ``pages`` is a sequence with one buffer for every page of the prompt, or a function ``(page, view)`` that
        fills the view.
        """
        ask = CommitAsk(durable=durable, last=True, verify=True)
        return await self._driver.run(self._store(pages, ask))

    async def store_kv(
        self,
        kv: KvRegion,
        places: Any,
        *,
        first_page: int | None = None,
        layered: bool = False,
        wait_ms: int = 0,
        durable: bool = False,
        last: bool = True,
    ) -> Store:
        """Have the sidecar commit pages out of an engine's KV, as ``commit`` does; returns when it has been begun.

        ``places``: of ``KvRegion.places``, one row a page, from ``first_page`` on (None: the first that was not written
        yet). ``layered``: the sidecar takes each layer when ``Store.layer_done`` says so, and waits ``wait_ms`` in all
        for that (0: the reservation's time). Raises InvalidArgumentError, UnsupportedError, NotFoundError.
        """
        ask, how = (places, first_page, wait_ms), (layered, durable, last)
        begun = await self._driver.run(begin_store(self._core, self._state, kv, ask, how))
        return Store(self._driver, begun)

    async def abort(self) -> None:
        """Give back what was not committed. Idempotent; never raises for a server that is gone."""
        if not self._state.ended:
            await self._driver.run(self._abort())
