"""What a store offers whose segments clients can map: the host tier's, and a device's where its pool is shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hicache.device.kv import SharedMemory
from hicache.device.segment import Indices, Sums


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


class Slots(Protocol):
    """What a store tells of its slots, to go with where they are."""

    def layout(self, segment: int) -> Layout:
        """Of an open segment."""

    def columns(self, slots: Sequence[int]) -> tuple[Sums, Sums]:
        """Recorded checksums; and how often each slot has changed, as clients see it in a header where there is one."""


class Mappable(Slots, Protocol):
    """The store's side of shared memory."""

    def fd(self, segment: int) -> int:
        """Its descriptor; the store's own."""

    def addresses(self, slots: Sequence[int], page_bytes: int) -> tuple[Indices, Sequence[object]]:
        """Where the slots begin in this process, and what keeps them mapped as long as somebody has it."""


class SharedPool(Slots, Protocol):
    """A device store's side, where its pool may be mapped by other processes: slots without counters.

    The generations of ``columns``: the store's own counts, which stand in no mapping.
    """

    def shared(self, segment: int) -> SharedMemory:
        """How the segment is mapped. A descriptor is the store's own.

        Raises UnavailableError while bytes of an earlier segment may lie in it, UnsupportedError where it cannot be.
        """

    def close_segment(self, segment: int, *, reusable: bool) -> None:
        """Give its memory back; not ``reusable``: a process may have it mapped as long as it lives."""
