"""From a batch to the copies it asks for. All that can be wrong with it is said here, before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from hicache.device.segment import Columns, Indices
from hicache.errors import InvalidArgumentError
from hicache.types import SLOTS_PER_SEGMENT, Batch, Op

S = TypeVar("S", bound=Columns)


@dataclasses.dataclass(frozen=True, slots=True)
class Extent(Generic[S]):
    """The part of a batch that lies in one segment, in batch order.

    ``positions``: places in the batch. ``indices``: places in the segment. ``frees``: the slots' counts of
    ``free`` at submission.
    """

    segment: S
    positions: Indices
    indices: Indices
    frees: npt.NDArray[np.uint32]

    def taken(self, chosen: npt.NDArray[np.bool_]) -> Extent[S]:
        """Some of the pages."""
        return Extent(self.segment, self.positions[chosen], self.indices[chosen], self.frees[chosen])

    def chunks(self, rows: int) -> list[Extent[S]]:
        """Pieces of at most ``rows`` pages."""
        return [
            Extent(self.segment, self.positions[i:j], self.indices[i:j], self.frees[i:j])
            for i in range(0, len(self.indices), rows)
            for j in (i + rows,)
        ]


def locate(slots: Sequence[int], segments: Mapping[int, S]) -> list[Extent[S]]:
    """Where the slots are. Raises InvalidArgumentError for one that no open segment has."""
    try:
        numbers = np.asarray(slots, np.int64).reshape(len(slots))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"slots must be integers: {error}") from error
    extents = []
    owners = numbers // SLOTS_PER_SEGMENT
    for owner in np.unique(owners).tolist():
        positions = np.flatnonzero(owners == owner)
        indices = numbers[positions] - owner * SLOTS_PER_SEGMENT
        segment = segments.get(owner)
        if segment is None:
            raise InvalidArgumentError(f"slot {numbers[positions[0]]}: segment {owner} is not open")
        if int(indices.max()) >= segment.slots:
            raise InvalidArgumentError(
                f"slot {numbers[positions[indices.argmax()]]}: segment {owner} has {segment.slots} slots"
            )
        extents.append(Extent(segment, positions, indices, segment.frees[indices]))
    return extents


def plan(batch: Batch, segments: Mapping[int, S]) -> list[Extent[S]]:
    """The extents of a batch of pages. Raises InvalidArgumentError for one that does not fit the store."""
    extents = locate(batch.slots, segments)
    if batch.op is Op.DELETE:
        return extents
    for extent in extents:
        if extent.segment.page_bytes != batch.page_bytes:
            raise InvalidArgumentError(
                f"batch {batch.id}: pages of {batch.page_bytes} bytes, slots of {extent.segment.page_bytes}"
            )
    _check_buffers(batch)
    if batch.op is Op.PUT:
        _check_put(batch, extents)
    return extents


def _check_buffers(batch: Batch) -> None:
    if len(batch.buffers) != len(batch.slots):
        raise InvalidArgumentError(
            f"batch {batch.id}: {len(batch.slots)} slots, {len(batch.buffers)} buffers"
        )
    for position, buffer in enumerate(batch.buffers):
        if buffer.nbytes != batch.page_bytes or not buffer.c_contiguous:
            raise InvalidArgumentError(
                f"batch {batch.id}: buffer {position} is not {batch.page_bytes} contiguous bytes"
            )
        if batch.op is Op.GET and buffer.readonly:
            raise InvalidArgumentError(f"batch {batch.id}: GET into read-only buffer {position}")


def _check_put(batch: Batch, extents: list[Extent[S]]) -> None:
    if batch.checksums and len(batch.checksums) != len(batch.slots):
        raise InvalidArgumentError(
            f"batch {batch.id}: {len(batch.slots)} slots, {len(batch.checksums)} checksums"
        )
    for extent in extents:
        if len(np.unique(extent.indices)) != len(extent.indices):
            raise InvalidArgumentError(f"batch {batch.id}: a slot is put twice")
