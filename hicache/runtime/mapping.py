"""What a store offers whose segments clients can map (the host tier's does)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Layout(Protocol):
    """Where the slots of one segment lie: ``slots`` generation counters at offset 0, then the slots."""

    @property
    def size_bytes(self) -> int:
        """Of the whole mapping."""

    @property
    def page_bytes(self) -> int:
        """Of one page."""

    @property
    def slots(self) -> int:
        """How many."""

    @property
    def first_slot_offset(self) -> int:
        """In bytes."""

    @property
    def stride(self) -> int:
        """From slot to slot, in bytes."""


class Mappable(Protocol):
    """The store's side of shared memory."""

    def layout(self, segment: int) -> Layout:
        """Of an open segment."""

    def fd(self, segment: int) -> int:
        """Its descriptor; the store's own."""

    def checksums(self, slots: Sequence[int]) -> list[int]:
        """Recorded checksums."""

    def generations(self, slots: Sequence[int]) -> list[int]:
        """As clients see them in the segment's header."""
