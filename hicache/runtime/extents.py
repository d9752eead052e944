"""Where leased pages lie, as columns for clients that map the arena."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hicache.device.segment import Sums
from hicache.engine.actions import FetchResult
from hicache.runtime.ports import TierPort
from hicache.runtime.regions import RegionRegistry
from hicache.types import SLOTS_PER_SEGMENT


@dataclasses.dataclass(frozen=True, slots=True)
class ExtentColumns:
    """One entry an extent (``pages`` to ``first_slot``), pages in order from page 0; one a page (the others)."""

    pages: list[int] = dataclasses.field(default_factory=list)
    region_id: list[int] = dataclasses.field(default_factory=list)
    offset: list[int] = dataclasses.field(default_factory=list)
    first_slot: list[int] = dataclasses.field(default_factory=list)
    checksums: Sums = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))
    generations: Sums = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))


def lease_slots(result: FetchResult) -> list[int]:
    """The slots of the granted pages, in page order."""
    return [slot for piece in result.pieces for slot in piece.slots]


def extents(regions: RegionRegistry, ports: Sequence[TierPort], result: FetchResult) -> ExtentColumns:
    """The granted pages of a lease; empty where the tier that it is in cannot be mapped.

    Slots that follow each other within one segment are one extent.
    """
    if not result.granted_pages:
        return ExtentColumns()
    port = ports[result.tier]
    memory = port.mapped
    if memory is None:
        return ExtentColumns()
    # A lease has one piece, an array: it becomes numpy columns without a loop over its slots.
    slots = result.pieces[0].slots if len(result.pieces) == 1 else lease_slots(result)
    assert len(slots) == result.granted_pages, "a lease's pieces are not its granted pages"
    places = np.asarray(slots, dtype=np.int64)
    checksums, generations = memory.columns(slots)
    columns = ExtentColumns(checksums=checksums, generations=generations)
    starts = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(slots)], strict=True):
        segment, index = divmod(slots[start], SLOTS_PER_SEGMENT)
        arena = regions.arena_at(port.index, segment)
        columns.pages.append(end - start)
        columns.region_id.append(arena.region_id)
        columns.offset.append(arena.first_slot_offset + index * arena.slot_stride)
        columns.first_slot.append(index)
    return columns
