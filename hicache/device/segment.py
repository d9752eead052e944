"""One segment of the device pool: its memory and what each slot holds.

Columns, one entry a slot, no objects. The store's lock guards the columns. The pool's bytes are guarded by
order: only the write stream writes them, and a reader that met a writer learns it from ``writes``.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hicache.sealed import SealedMemory
from hicache.types import slot_stride

Indices = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where the slots of a segment lie in its memory: side by side from the first byte on, and nothing else."""

    size_bytes: int
    page_bytes: int
    slots: int
    stride: int
    first_slot_offset: int = 0


class Columns:
    """What ``slots`` slots of ``page_bytes`` hold, ``slot_stride(page_bytes)`` apart. They start empty."""

    def __init__(self, domain: str, page_bytes: int, slots: int) -> None:
        self.domain = domain
        self.page_bytes = page_bytes
        self.slots = slots
        self.batches_in_flight = 0
        self.loans = 0  # transfers that read its slots
        self.unused: Callable[[], None] | None = None  # of a closed segment, once the last of them has ended
        self.held = np.zeros(slots, np.bool_)
        self.checksums = np.zeros(slots, np.uint64)
        self.writes = np.zeros(slots, np.uint32)  # moves on whenever the slot stops being what it was
        self.frees = np.zeros(slots, np.uint32)  # moves on with free(): a PUT sees that its slot was taken

    def empty(self, indices: Indices) -> None:
        """The slots hold nothing from now on."""
        self.held[indices] = False
        self.writes[indices] += np.uint32(1)

    def accept(self, indices: Indices, checksums: Sums) -> None:
        """The slots hold pages with these checksums from now on."""
        self.checksums[indices] = checksums
        self.held[indices] = True


class Segment(Columns):
    """A segment in ordinary memory, all zeros at first. Raises OSError or MemoryError where there is none.

    ``shared``: in memory that other processes can map, read-only; so large that it makes a whole segment.
    """

    def __init__(self, domain: str, page_bytes: int, slots: int, shared: SealedMemory | None = None) -> None:
        import torch

        super().__init__(domain, page_bytes, slots)
        self.shared = shared
        size_bytes = slots * slot_stride(page_bytes)
        memory = (
            mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if shared is None
            else shared.mapped
        )
        rows = np.frombuffer(memory, np.uint8, size_bytes).reshape(slots, slot_stride(page_bytes))
        self.pool = torch.from_numpy(rows)

    @property
    def address(self) -> int:
        """Where the first slot lies."""
        return int(self.pool.data_ptr())


class DeviceSegment(Columns):
    """A segment at an address of a device. ``clean``: no byte of an earlier one is left in its memory."""

    def __init__(self, domain: str, page_bytes: int, slots: int, *, address: int, hashable: bool) -> None:
        super().__init__(domain, page_bytes, slots)
        self.address = address
        self.hashable = hashable  # its pages are of a size that the device can hash
        self.clean = False
        self.problem = ""  # why it takes no pages
        self.handle = b""  # of its memory, for other processes
