"""What a store offers whose segments clients can map: the host tier's, and a device's where its pool is shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hicache.device.kv import SharedMemory


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


class SharedPool(Protocol):
    """A device store's side, where its pool may be mapped by other processes: slots without counters."""

    def layout(self, segment: int) -> Layout:
        """Of an open segment; ``first_slot_offset`` is where its slots begin in the memory."""

    def memory(self, segment: int) -> SharedMemory:
        """How the segment is mapped. A descriptor is the store's own."""


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
