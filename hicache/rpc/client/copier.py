"""Engine-driven copies, ready-made: leased pages into an engine's paged KV, and an engine's pages into a reservation.

    copier = client.copier(kv_tensors, layout="kv-nhd", page_tokens=16)
    cache = client.namespace(model="llama-3.1-8b", **copier.namespace_fields())
    with cache.fetch(tokens) as lease:
        copier.load(lease, block_numbers).wait()

What moves bytes is in ``hicache.device.copying`` and needs torch; here are leases, reservations and their memory.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from hicache.device.kv import check_apart
from hicache.errors import HicacheError, InvalidArgumentError, UnsupportedError
from hicache.rpc.client import options as settings
from hicache.rpc.client import staging as places_in
from hicache.rpc.client.arena import ArenaRegion
from hicache.rpc.client.arguments import count_of
from hicache.rpc.client.core import Core
from hicache.rpc.client.handles import LeaseBase, ReservationBase
from hicache.rpc.client.held import Lease, Reservation
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.options import Verify
from hicache.rpc.client.region import WriteRegion
from hicache.rpc.client.results import CommitResult
from hicache.rpc.client.staging import Staging

if TYPE_CHECKING:
    from hicache.device.copying import Copies
    from hicache.device.copying.jobs import LoadHandle, StoreHandle
    from hicache.device.copying.kv import EngineKv
    from hicache.device.copying.mapped import Span

Places = npt.NDArray[np.int64]


def open_engine(
    layers: Sequence[Any], *, layout: str, page_tokens: int, codec: str | None, **how: Any
) -> Copies:
    """Copies of an engine's tensors; see ``Client.copier``."""
    try:
        from hicache.device.copying import CopyOptions, open_copies
        from hicache.device.copying.kv import EngineKv

        kv = EngineKv.of(layers, layout=layout, page_tokens=page_tokens, codec=codec)
    except ImportError as error:
        raise UnsupportedError(f"a copier needs torch: {error}", hint="pip install hicache[torch]") from error
    try:
        options = CopyOptions(**how)
    except TypeError as error:
        raise InvalidArgumentError(f"copier: {error}") from None
    return open_copies(kv, options)


class CopierBase:
    """A copier without its calls. Threads may share it. Close it before the engine frees its tensors."""

    def __init__(self, core: Core, copies: Copies) -> None:
        self._core = core
        self._copies = copies
        self._stores: weakref.WeakSet[StoreBase] = weakref.WeakSet()
        self._closed = False
        core.arena.watchers.append(copies.forget)

    @property
    def kv(self) -> EngineKv:
        """The engine's planes, and what its pages look like."""
        return self._copies.kv

    @property
    def closed(self) -> bool:
        """Whether it copies no more."""
        return self._closed

    @property
    def copies(self) -> Copies:
        """What copies; for tests and measurements."""
        return self._copies

    def namespace_fields(self) -> dict[str, Any]:
        """What the namespace must say of such pages: ``page_bytes``, ``kv_dtype``, ``layout``, ``layers`` and more.

        Engines whose fields are equal share pages, whatever their tensors' layouts and block sizes; quantised pages
        have fields of their own.
        """
        return self.kv.namespace_fields()

    def places(self, blocks: Any) -> Places:
        """Where the units of pages lie whose tokens are in these blocks, in token order: int64 ``[pages, units]``."""
        return self.kv.places_of_blocks(blocks)

    def _close(self) -> None:
        """Let copies under way end, fail the others, unregister all memory. Idempotent."""
        if not self._closed:
            self._closed = True
            for store in list(self._stores):
                store.cancel()
            self._core.arena.watchers.remove(self._copies.forget)
        self._copies.close()
        for store in list(self._stores):
            store._let_go()

    def _where(self, blocks: Any, places: Any, page_bytes: int) -> Places:
        if page_bytes != self.kv.page_bytes:
            raise InvalidArgumentError(
                f"the namespace has pages of {page_bytes} bytes, this copier's have {self.kv.page_bytes}",
                hint="make the namespace with **copier.namespace_fields()",
            )
        if (blocks is None) == (places is None):
            raise InvalidArgumentError("give blocks, or places")
        return self.kv.check(places) if blocks is None else self.places(blocks)

    def _how(self, verify: Verify | str | None) -> bool:
        how = self._core.options.verify if verify is None else settings.verify(verify)
        return how is not Verify.OFF

    def _load(
        self, lease: LeaseBase, where: Places, first_page: int, layers: range | None, **how: Any
    ) -> LoadHandle:
        from hicache.device.copying.jobs import LoadHandle, LoadJob

        state, first = lease._state, count_of("first_page", first_page)
        pages = max(0, min(len(where), state.granted_pages - first))
        check_apart(where[:pages], self.kv.page_tokens // where.shape[1])
        layers = range(self.kv.layers) if layers is None else layers
        if layers.step != 1 or layers.start < 0 or layers.stop > self.kv.layers:
            raise InvalidArgumentError(f"layers {layers} are not among {self.kv.layers}")
        state.check()
        job = LoadJob(
            spans=_leased(self._core, state, first, pages),
            places=where[:pages],
            layers=layers,
            checksums=state.checksums[first : first + pages],
            verify=self._how(how["verify"]),
            number=first,
            check=state.check,
            handle=LoadHandle(layers, pages, getattr(self._copies, "hold", None)),
            after=self._copies.mark(how["stream"]),
        )
        self._copies.load(job)
        return job.handle

    def _pack(self, room: ReservationBase, where: Places, first_page: int, **how: Any) -> _Begun:
        """Begin to pack those of pages [first_page, first_page + len(where)) that are missing."""
        from hicache.device.copying.jobs import StoreHandle, StoreJob

        first, layered = count_of("first_page", first_page), bool(how["layered"])
        begin = max(first, room.present_pages)
        end = min(first + len(where), room.present_pages + room.missing_pages)
        wanted = 0 if room.ended else max(0, end - begin)
        if wanted and (where[begin - first : begin - first + wanted] < 0).any():
            raise InvalidArgumentError("a page with tokens that are not copied cannot be stored")
        staging = Staging(self._core.memory, room.page_bytes, wanted) if wanted else None
        pages = len(staging) if staging is not None else 0
        handle = StoreHandle(range(self.kv.layers), pages, layered=layered)
        job = StoreJob(
            spans=_staged(staging) if staging is not None else [],
            places=where[begin - first : begin - first + pages],
            verify=self._how(how["verify"]),
            handle=handle,
            after=None if layered else self._copies.mark(how["stream"]),
        )
        try:
            self._copies.store(job)
        except HicacheError:
            if staging is not None:
                staging.free()
            raise
        return _Begun(job, staging, begin, wanted - pages)


class _Begun:
    """What a store is made of. ``left_pages`` found no room in the client's memory."""

    def __init__(self, job: Any, staging: Staging | None, first_page: int, left_pages: int) -> None:
        self.handle: StoreHandle = job.handle
        self.sealed: bool = job.verify
        self.staging = staging
        self.first_page = first_page
        self.left_pages = left_pages


class StoreBase:
    """Pages on their way from an engine into a reservation: packed first, then committed.

    The blocks must not change until ``done``. Its memory is given back by the commit, or by ``abandon``.
    """

    def __init__(self, copier: CopierBase, room: ReservationBase, packing: _Begun) -> None:
        self._mark = copier._copies.mark
        self._room = room
        self._packing = packing
        self._handle = packing.handle
        self._adopted = 0
        copier._stores.add(self)

    @property
    def done(self) -> bool:
        """Whether the blocks may be changed."""
        return self._handle.done

    @property
    def first_page(self) -> int:
        """The first page of the prompt that is stored; those before it were there."""
        return self._packing.first_page

    @property
    def pages(self) -> int:
        """How many pages are packed."""
        return self._handle.pages

    @property
    def refused_pages(self) -> int:
        """Pages that cannot be quantised (an infinity, a NaN), once packed. They, and those behind, are not stored."""
        return int(self._handle.refused.sum()) if self._handle.done else 0

    @property
    def left_pages(self) -> int:
        """Pages that found no room in the client's own memory: store them after the commit, or raise its limit."""
        return self._packing.left_pages

    def layer_ready(self, layer: int, stream: Any = None) -> None:
        """With ``layered=True``: the engine has computed a layer, or launched what computes it on ``stream``.

        Never blocks.
        """
        self._handle.announce(layer, self._mark(stream))

    def cancel(self) -> None:
        """Stop packing soon."""
        self._handle.cancel()

    def _adopt(self) -> range:
        """Packed: the pages are the reservation's now. Those before the first that was refused."""
        handle, staging, first = self._handle, self._packing.staging, self._packing.first_page
        if staging is None or self._adopted:
            return range(first, first + self._adopted)
        refused = np.flatnonzero(handle.refused)
        good = int(refused[0]) if len(refused) else handle.pages
        for at in range(good if self._packing.sealed else 0):
            staging.seal(at, int(handle.checksums[at]))
        self._room._state.adopt(places_in.places({first + at: (staging, at) for at in range(good)}))
        self._adopted = good
        staging.free()
        return range(first, first + good)

    def _let_go(self) -> None:
        """Packing has ended: give back what was not adopted. Idempotent."""
        if self._packing.staging is not None and self._handle.done:
            self._packing.staging.free()


class Packing(StoreBase):
    """See StoreBase. At the end of a ``with`` what was not committed is abandoned."""

    _room: Reservation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until packed. Raises what it failed with, UnavailableError if it has not ended in time (and goes on)."""
        self._handle.wait(timeout_s)

    def commit(
        self, *, durable: bool = False, last: bool = True, timeout_s: float | None = None
    ) -> CommitResult:
        """Wait until packed, then make the pages matchable; as ``Reservation.commit``."""
        self._handle.wait(timeout_s)
        return self._room.commit(self._adopt(), durable=durable, last=last, timeout_s=timeout_s)

    def abandon(self) -> None:
        """Stop packing, wait until it has stopped, give back what was not committed. Idempotent."""
        self._handle.cancel()
        self._handle.wait_end()
        self._let_go()


class Copier(CopierBase):
    """Copies between leased or reserved pages and one engine's paged KV; made by ``Client.copier``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(
        self,
        lease: Lease,
        blocks: Any = None,
        *,
        places: Any = None,
        first_page: int = 0,
        layers: range | None = None,
        stream: Any = None,
        verify: Verify | str | None = None,
    ) -> LoadHandle:
        """Begin to copy granted pages from ``first_page`` on into blocks (in token order), or ``places``.

        As many pages as are granted and have whole blocks. On a GPU it comes behind what ``stream`` (None: the
        current one) was given, on a stream of its own. Raises as ``Lease.copy_into`` does, at once or from the
        handle: nothing is good before ``wait`` has returned.
        """
        where = self._where(blocks, places, lease.page_bytes)
        if lease._state.streamed and lease._state.private is None and len(lease):
            lease.views()  # read from the server, once
        return self._load(lease, where, first_page, layers, stream=stream, verify=verify)

    def store(
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
        """Begin to pack pages of the prompt from ``first_page`` on; those that are not missing are skipped.

        Behind what ``stream`` was given; ``layered``: each layer behind its ``Packing.layer_ready``. Then ``commit``.
        Raises ExhaustedError where the client's own memory has no room for a page.
        """
        where = self._where(blocks, places, reservation.page_bytes)
        packing = self._pack(reservation, where, first_page, stream=stream, layered=layered, verify=verify)
        return Packing(self, reservation, packing)

    def close(self) -> None:
        """Let copies under way end, fail the others, unregister all memory. Idempotent."""
        self._close()


def _leased(core: Core, state: LeaseState, first: int, pages: int) -> list[Span]:
    """Where leased pages lie. Raises UnsupportedError for pages that must be read from the server first."""
    from hicache.device.copying.mapped import Span

    if state.private is not None:
        return [Span(0, state.private[first : first + pages])] if pages else []
    if state.streamed and pages:
        raise UnsupportedError(
            "these pages come as a stream", hint="read them with lease.views() first, once"
        )
    found = []
    for run, page, count in state.spans(first, pages, verify=False):
        rows = run.region.rows(run.first_slot + page - run.first_page, count)
        found.append(Span(page - first, rows, run.region, functools.partial(_unlisted, core, run.region)))
    return found


def _unlisted(core: Core, region: ArenaRegion) -> bool:
    return core.arena.find(region.info.region_id) is not region


def _staged(staging: Staging) -> list[Span]:
    """Where a staging's places lie."""
    from hicache.device.copying.mapped import Span

    found, first = [], 0
    for block in staging.blocks:
        end = block.offset + block.pages * staging.page_bytes
        rows = block.region.bytes[block.offset : end].reshape(block.pages, staging.page_bytes)
        found.append(Span(first, rows, block.region, functools.partial(_discarded, block.region)))
        first += block.pages
    return found


def _discarded(region: WriteRegion) -> bool:
    return region.fd < 0
