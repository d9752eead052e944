"""Carries out what the engine asks for: copies, frees and segments. Started in the order given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hicache.engine import events
from hicache.engine.actions import Action, CloseSegment, Compare, Copy, CopyIn, Free, OpenSegment
from hicache.engine.events import Event
from hicache.runtime.copier import Copier
from hicache.runtime.ports import TierPort
from hicache.runtime.regions import RegionRegistry
from hicache.types import Op


class Performer:
    """``handle`` takes what comes back: it queues, so that it may be called at any time.

    ``soon`` starts copies between tiers, in their order: one event may ask for many.
    """

    def __init__(
        self,
        ports: Sequence[TierPort],
        copier: Copier,
        regions: RegionRegistry,
        handle: Callable[[Event], None],
        soon: Callable[[Callable[[], None]], None],
    ) -> None:
        self._ports = ports
        self._copier = copier
        self._regions = regions
        self._handle = handle
        self._soon = soon
        self.differing_pages = 0  # committed again with other bytes than those that were kept
        self._by_kind: dict[type, Callable[..., None]] = {
            Copy: self._copy,
            CopyIn: self._copy_in,
            Compare: self._compare,
            Free: self._free,
            OpenSegment: self._open_segment,
            CloseSegment: self._close_segment,
        }
        for port in ports:
            port.on_latched = self._latched
            port.on_restored = self._restored
            port.on_lost = self._lost
            port.on_opened = self._opened
        self.on_tier: Callable[[str, bool], None] = lambda _name, _well: None

    def hand_on(self, kind: type, call: Callable[..., None]) -> None:
        """Leave actions of a kind to somebody else."""
        self._by_kind[kind] = call

    def perform(self, action: Action) -> None:
        """Start one action."""
        self._by_kind[type(action)](action)

    def _copy(self, action: Copy) -> None:
        self._soon(lambda: self._start(action))

    def _start(self, action: Copy) -> None:
        self._ports[action.dst_tier].reopen(action.dst_slots)
        self._copier.copy(action)

    def _copy_in(self, action: CopyIn) -> None:
        self._ports[action.tier].reopen(action.slots)
        self._copier.copy_in(action)

    def _compare(self, action: Compare) -> None:
        store = self._ports[action.tier].mappable
        if store is not None:  # other stores keep their checksums to themselves
            (new, _), (kept, _) = store.columns(action.slots), store.columns(action.held)
            self.differing_pages += int((new != kept).sum())

    def _free(self, action: Free) -> None:
        port = self._ports[action.tier]
        if port.spec.keyed:
            port.submit(Op.DELETE, lambda _: None, keys=action.keys)
        else:
            port.free(action.slots)

    def _open_segment(self, action: OpenSegment) -> None:
        port = self._ports[action.tier]
        port.open_segment(action.segment, action.domain, action.page_bytes, action.slots)

    def _opened(self, port: TierPort, segment: int, domain: str) -> None:
        if port.mappable is not None:
            self._regions.arena_opened(port.index, segment, domain, port.mappable)
        elif port.shared is not None:
            self._regions.pool_opened(port.index, segment, domain, port.shared)

    def _close_segment(self, action: CloseSegment) -> None:
        # Only when no session maps it is its memory given back: until then it counts against the tier's capacity.
        port, segment = self._ports[action.tier], action.segment

        def closed() -> None:
            self._handle(events.SegmentClosed(port.index, segment))

        self._regions.arena_retired(
            port.index, segment, lambda sure: port.close_segment(segment, closed, reusable=sure)
        )

    def _latched(self, port: TierPort) -> None:
        self._handle(events.TierLatched(port.index, port.health.readable))
        self.on_tier(port.spec.name, False)  # noqa: FBT003

    def _lost(self, port: TierPort, keys: list[bytes]) -> None:
        self._handle(events.PagesLost(port.index, keys))

    def _restored(self, port: TierPort) -> None:
        self._handle(events.TierRestored(port.index))
        self.on_tier(port.spec.name, True)  # noqa: FBT003
