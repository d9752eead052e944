"""Slots of a device store that a transfer reads, and whether they still hold what they held when it began."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hicache.device.plan import Extent
from hicache.device.segment import Indices, Sums
from hicache.types import slot_stride

Chosen = npt.NDArray[np.bool_]


class Loan:
    """Slots, their addresses and their checksums, an entry a page.

    Nothing but memory is held back for it: a slot may be freed, overwritten, its segment closed. ``still`` tells. The
    memory of a closed segment is not used for another, which may be another tenant's, before ``end``. ``lock`` is the
    store's; the store stays open.
    """

    def __init__(
        self,
        extents: Sequence[Extent[Any]],
        pages: int,
        lock: contextlib.AbstractContextManager[object],
    ) -> None:
        self._extents = extents
        self._lock = lock
        self.addresses = np.zeros(pages, np.int64)
        self.checksums: Sums = np.zeros(pages, np.uint64)
        self._writes = np.zeros(pages, np.uint32)
        self._held = np.zeros(pages, np.bool_)
        with lock:
            for extent in extents:
                segment, at = extent.segment, extent.positions
                segment.loans += 1
                self.addresses[at] = segment.address + extent.indices * slot_stride(segment.page_bytes)
                self.checksums[at] = segment.checksums[extent.indices]
                self._writes[at] = segment.writes[extent.indices]
                self._held[at] = segment.held[extent.indices]

    @property
    def page_bytes(self) -> set[int]:
        """The sizes of its pages; more than one where segments differ."""
        return {extent.segment.page_bytes for extent in self._extents}

    def still(self) -> Chosen:
        """Whether each slot holds what it held all the time since the loan was made."""
        found = np.zeros(len(self._held), np.bool_)
        with self._lock:
            for extent in self._extents:
                same = extent.segment.writes[extent.indices] == self._writes[extent.positions]
                found[extent.positions] = self._held[extent.positions] & same
        return found

    def end(self) -> None:
        """Nothing reads the slots any more."""
        with self._lock:
            for extent in self._extents:
                extent.segment.loans -= 1
            segments = [extent.segment for extent in self._extents if not extent.segment.loans]
            unused = [segment.unused for segment in segments if segment.unused is not None]
        for call in unused:
            call()

    def empty(self, pages: Indices) -> None:
        """Pages whose bytes are not what was recorded are not held any longer, unless others took their slots."""
        with self._lock:
            for extent in self._extents:
                same = extent.segment.writes[extent.indices] == self._writes[extent.positions]
                extent.segment.empty(extent.indices[same & np.isin(extent.positions, pages)])
