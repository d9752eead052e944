"""What the synchronous and the asyncio handles of paged KV share: everything but the running of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from hicache.device.kv import PagedKv, Places, check_apart
from hicache.errors import InvalidArgumentError, NotFoundError, UnavailableError, UnsupportedError
from hicache.rpc.client import kv_flows, kv_tensors
from hicache.rpc.client.arguments import count_of
from hicache.rpc.client.core import Core
from hicache.rpc.client.kv import KvState, Loaded, Progress
from hicache.rpc.client.kv_calls import LoadAsk, StoreAsk
from hicache.rpc.client.lease import LeaseState
from hicache.rpc.client.reservation import ReservationState
from hicache.rpc.client.results import CommitResult
from hicache.rpc.client.steps import Steps, T

if TYPE_CHECKING:
    from hicache.device.fences import Fences

#: How long ``KvRegion.close`` waits for copies that are under way.
CLOSE_TIMEOUT_S = 30.0
#: Pauses between two looks at a counter: from this, doubled, to this.
LOOK_FIRST_S, LOOK_MOST_S = 20e-6, 1e-3


def kv_state(
    layers: Sequence[Any] | PagedKv, layout: str | None, page_offset: int, planes_per_layer: int | None
) -> KvState:
    """What an engine gave, with descriptors of our own. Raises InvalidArgumentError, UnsupportedError."""
    if isinstance(layers, PagedKv):
        if layout is not None or page_offset or planes_per_layer is not None:
            raise InvalidArgumentError("a PagedKv says its layout itself")
        return KvState(kv_tensors.own_memories(layers))
    if layout is None:
        raise InvalidArgumentError("register_kv needs the layout of the tensors", hint='such as "kv-nhd"')
    kv = kv_tensors.paged_kv(layers, layout, page_offset=page_offset, planes_per_layer=planes_per_layer)
    return KvState(kv, list(layers))


class KvRegionBase:
    """An engine's KV that the sidecar copies to and from, without its calls.

    Registered anew by itself when a session was lost and there is another one.
    """

    def __init__(self, core: Core, state: KvState) -> None:
        self._core = core
        self._state = state

    @property
    def kv(self) -> PagedKv:
        """How it lies in memory."""
        return self._state.kv

    @property
    def layers(self) -> int:
        """How many."""
        return self._state.kv.layers

    @property
    def closed(self) -> bool:
        """Whether it can be used no more."""
        return self._state.closed

    def places(self, blocks: Any, page_tokens: int) -> Places:
        """Where pages lie, for ``load`` and ``store_kv``: int64 ``[pages, units]``, from the engine's block ids.

        The ids are in the order of their tokens; negative ones are left out. Blocks as large as a page or smaller make
        whole pages together; a larger block is several pages, all of which are named. Raises InvalidArgumentError.
        """
        return kv_tensors.places(self._state.kv, blocks, page_tokens)

    def _settle(self, timeout_s: float) -> Steps[bool]:
        return kv_flows.unregister(self._core, self._state, timeout_s)

    def _close(self, timeout_s: float) -> Steps[bool]:
        self._state.closed = True
        sure = yield from kv_flows.unregister(self._core, self._state, timeout_s)
        self._state.close()
        return sure


class TransferBase:
    """A transfer under way, without its calls. Any thread may ask."""

    def __init__(self, core: Core, progress: Progress) -> None:
        self._core = core
        self._progress = progress

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._progress.ended.is_set()

    @property
    def failed(self) -> bool:
        """Whether it has failed, as far as is known: ``result`` says how."""
        return self._progress.failed

    def _fenced(
        self, stream: Any, layer: int, queue: Callable[[Fences, int, int], Callable[[], bool]]
    ) -> bool:
        """Queue something with a layer's counter; False where it must be done here. True where it is over."""
        place, counter = self._progress.place(layer), self._progress.counter
        if counter is None or stream is None or self.done:
            return self.done
        try:
            fences = self._core.fences()
            fences.admit(counter.timeline.address, counter.timeline.values.nbytes, counter.timeline)
            return counter.hold(lambda: queue(fences, counter.address, place)) or self.done
        except UnsupportedError:
            return False


class LoadBase(TransferBase):
    """Leased pages on their way into an engine's KV, without its calls."""

    @property
    def layers_done(self) -> int:
        """Layers that have arrived, from the first one loaded (without ``layered``: all at once). 0: failed."""
        return self._progress.done_layers

    def _arrived(self, layer: int) -> bool | None:
        """Whether a layer is there (True), never will be (False), or is waited for."""
        if self._progress.done_layers >= self._progress.place(layer):
            return True
        return False if self._progress.failed else None

    def _wait_on(self, stream: Any, layer: int) -> bool:
        """Whether the stream waits by itself now, or need not."""
        return self._fenced(stream, layer, lambda fences, *counter: fences.wait(stream, *counter))

    def _late(self, layer: int, timeout_s: float) -> UnavailableError:
        return UnavailableError(f"layer {layer} has not arrived after {timeout_s:g} s")


class StoreBase(TransferBase):
    """Pages on their way out of an engine's KV, without its calls."""

    def layer_done(self, layer: int) -> None:
        """This layer, and all before it, are computed and may be read. Nothing happens where the store has ended."""
        value = self._progress.place(layer)
        if self._progress.counter is not None:
            self._progress.counter.raise_to(value)

    def layer_done_on(self, stream: Any, layer: int) -> None:
        """As ``layer_done``, once the CUDA stream has come so far; returns at once.

        Where streams cannot write to counters, waits for the stream here. None: there is no stream, it is done.
        """
        if self._progress.counter is None:
            return
        if not self._fenced(stream, layer, lambda fences, *counter: fences.write(stream, *counter)):
            if stream is not None:
                stream.synchronize()
            self.layer_done(layer)


# --- beginnings: what is asked, checked; the route; then the transfer itself


@dataclasses.dataclass(frozen=True)
class Begun(Generic[T]):
    """A transfer that is ready to run."""

    progress: Progress
    steps: Steps[T]


def _places(given: Any) -> Places:
    places = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
    if places.ndim != 2 or places.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"places must be integers [pages, units], not {places.dtype} {list(places.shape)}",
            hint="make them with KvRegion.places",
        )
    return np.ascontiguousarray(places, dtype=np.int64)


def begin_load(
    core: Core,
    lease: LeaseState,
    region: KvRegionBase,
    ask: tuple[Any, int, int, int | None, bool],
    how: tuple[bool, float | None],
) -> Steps[Begun[Loaded]]:
    """``ask``: places, first_page, first_layer, layers, verify. ``how``: layered, timeout_s."""
    given, first_page, first_layer, layers, verify = ask
    layered, timeout_s = how
    lease.check()
    _check_region(core, region)
    places, first_layer = _places(given), count_of("first_layer", first_layer)
    lease.pages_from(count_of("first_page", first_page), len(places))
    check_apart(places, 1)  # the server knows how long units are, and looks again
    count = region.layers - first_layer if layers is None else count_of("layers", layers)
    if count < 1 or first_layer + count > region.layers:
        raise InvalidArgumentError(
            f"layers [{first_layer}, {first_layer + count}) are not in a KV of {region.layers}"
        )
    if not len(places):
        progress = Progress(first_layer, count, None)
        progress.end(good=True, settled=True)
        return Begun(progress, _answer(Loaded(0)))
    way = yield from kv_flows.route(core, region._state, lease.terms.incarnation, counted=layered)
    progress = Progress(first_layer, count, way.counter, awaited=True)
    asked = LoadAsk(places, first_page, first_layer, count, verify)
    return Begun(progress, kv_flows.load(core, lease, way, (asked, timeout_s), progress))


def begin_store(
    core: Core,
    state: ReservationState,
    region: KvRegionBase,
    ask: tuple[Any, int | None, int],
    how: tuple[bool, bool, bool],
) -> Steps[Begun[CommitResult]]:
    """``ask``: places, first_page, wait_ms. ``how``: layered, durable, last."""
    given, first_page, wait_ms = ask
    layered, durable, last = how
    _check_region(core, region)
    places, wait_ms = _places(given), count_of("wait_ms", wait_ms)
    if state.ended and state.reservation:
        raise NotFoundError("the reservation has ended")
    first = (state.first_open or 0) if first_page is None else first_page
    if not state.reservation or not (len(places) or last):
        progress = Progress(0, region.layers, None)
        progress.end(good=True, settled=True)
        return Begun(progress, _answer(CommitResult()))
    missing = state.present_pages + state.missing_pages - first
    if len(places) > missing:
        raise InvalidArgumentError(
            f"places name {len(places)} pages from page {first} on, where {max(missing, 0)} are missing",
            hint="name the missing ones only: those before reservation.present_pages are stored",
        )
    counted = layered and bool(len(places))
    way = yield from kv_flows.route(core, region._state, state.incarnation, counted=counted)
    progress = Progress(0, region.layers, way.counter)
    try:
        state.claim(first, len(places))
    except (InvalidArgumentError, NotFoundError):
        progress.end(good=False, settled=True)
        raise
    asked = StoreAsk(places, first, durable, last, wait_ms)
    return Begun(progress, kv_flows.store(core, state, way, asked, progress))


def _answer(answer: T) -> Steps[T]:
    yield from ()
    return answer


def _check_region(core: Core, region: KvRegionBase) -> None:
    if not isinstance(region, KvRegionBase):
        raise InvalidArgumentError(
            f"a KV region is asked for, not {type(region).__name__}", hint="register_kv makes one"
        )
    if region._core is not core:
        raise InvalidArgumentError("the KV region is another client's")
