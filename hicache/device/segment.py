"""One segment of the device pool: its memory and what each slot holds.

Columns, one entry a slot, no objects. The store's lock guards the columns. The pool's bytes are guarded by
order: only the write stream writes them, and a reader that met a writer learns it from ``writes``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hicache.types import slot_stride

Indices = npt.NDArray[np.int64]
Sums = npt.NDArray[np.uint64]


class Columns:
    """What ``slots`` slots of ``page_bytes`` hold, ``slot_stride(page_bytes)`` apart. They start empty."""

    def __init__(self, domain: str, page_bytes: int, slots: int) -> None:
        self.domain = domain
        self.page_bytes = page_bytes
        self.slots = slots
        self.batches_in_flight = 0
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
    """A segment in ordinary memory. Raises RuntimeError where there is none (torch's error)."""

    def __init__(self, domain: str, page_bytes: int, slots: int) -> None:
        import torch

        super().__init__(domain, page_bytes, slots)
        self.pool = torch.empty((slots, slot_stride(page_bytes)), dtype=torch.uint8)

    @property
    def address(self) -> int:
        """Where the first slot lies."""
        return int(self.pool.data_ptr())


class DeviceSegment(Columns):
    """A segment at an address of a device."""

    def __init__(self, domain: str, page_bytes: int, slots: int, *, address: int, hashable: bool) -> None:
        super().__init__(domain, page_bytes, slots)
        self.address = address
        self.hashable = hashable  # its pages are of a size that the device can hash
