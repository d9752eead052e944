"""The modelled ways that pages take: between tiers, and between a tier and the model at work on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hicache.engine import actions as act
from hicache.sim.hardware import Hardware
from hicache.sim.links import Agenda, Link
from hicache.types import TierKind


class Wires:
    """The modelled ways between the tiers and to the model, one of each, shared by all that use it."""

    def __init__(self, agenda: Agenda, hardware: Hardware, kinds: Sequence[TierKind], ratio: float) -> None:
        self._agenda = agenda
        self._hardware = hardware
        self._kinds = kinds
        self._ratio = ratio
        self.links: dict[str, Link] = {}

    def carry(self, action: act.Copy | act.CopyIn, done: Callable[[], None]) -> None:
        """One copy of the engine's."""
        if isinstance(action, act.Copy):
            pages = len(action.src_slots or action.keys)
            self.move(action.src_tier, action.dst_tier, pages * action.page_bytes, done)
        else:
            self.move(-1, action.tier, len(action.pages) * action.page_bytes, done)

    def move(self, src: int, dst: int, size_bytes: int, done: Callable[[], None]) -> int:
        """Bytes from one tier to another (-1: the model at work); what a disk takes or gives is as it is stored."""
        return self.link(src, dst).carry(self._on_wire(src, dst, size_bytes), done)

    def estimate_us(self, src: int, dst: int, size_bytes: int) -> int:
        """How long that would take on an idle link."""
        return self.link(src, dst).spec.carry_us(self._on_wire(src, dst, size_bytes))

    def link(self, src: int, dst: int) -> Link:
        """The link between two tiers."""
        name, spec = self._hardware.link(self._kind(src), self._kind(dst))
        if name not in self.links:
            self.links[name] = Link(self._agenda, spec)
        return self.links[name]

    def _kind(self, tier: int) -> TierKind | None:
        return None if tier < 0 else self._kinds[tier]

    def _on_wire(self, src: int, dst: int, size_bytes: int) -> int:
        keyed = TierKind.DISK in {self._kind(src), self._kind(dst)}
        return round(size_bytes / self._ratio) if keyed else size_bytes
