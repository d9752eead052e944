"""One segment of host memory: one memfd, mapped writable by us, then sealed against everybody else (``sealed.py``).

A segment's memory is given back by closing it; it is never handed to another domain or slot size.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from hicache.errors import ExhaustedError, InvalidArgumentError
from hicache.sealed import SealedMemory
from hicache.types import TierSpec, segment_header_bytes, slot_stride

#: Width of a generation counter: little-endian u64 at the start of the segment, one a slot.
GENERATION_BYTES = 8

Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentLayout:
    """What a client needs to read a segment: ``slots`` generation counters at offset 0, then the slots."""

    segment: int
    domain: str
    size_bytes: int
    page_bytes: int
    slots: int
    first_slot_offset: int
    stride: int


class Memory:
    """Sealed memory and our view of it, which lives as long as anything views ``bytes``."""

    __slots__ = ("_memory", "bytes", "populated", "size_bytes")

    def __init__(self, size_bytes: int) -> None:
        """Raises ExhaustedError when the system has no file descriptor or memory for it."""
        try:
            self._memory = SealedMemory("hicache-host", size_bytes)
        except OSError as exc:
            raise _exhausted(size_bytes, exc) from exc
        self.bytes: Bytes = np.frombuffer(self._memory.mapped, dtype=np.uint8)
        self.size_bytes = size_bytes
        self.populated = False

    @property
    def fd(self) -> int:
        """What clients are given; -1 once closed."""
        return self._memory.fd

    def close(self) -> None:
        """Close the descriptor and drop our mapping; it goes when the last view of it does. Idempotent."""
        self._memory.close()
        self.bytes = np.empty(0, dtype=np.uint8)


def _exhausted(size_bytes: int, exc: OSError) -> ExhaustedError:
    return ExhaustedError(
        f"no host memory segment of {size_bytes} bytes: {exc}",
        hint="lower the host capacity, or raise the limit of memory or of open files (two a segment)",
    )


class Segment:
    """Slots of one size in one memory. Bookkeeping is three arrays; there are no objects per slot."""

    __slots__ = ("checksums", "generations", "layout", "memory", "sealed")

    def __init__(self, memory: Memory, layout: SegmentLayout) -> None:
        self.memory = memory
        self.layout = layout
        header = memory.bytes[: layout.slots * GENERATION_BYTES]
        self.generations: npt.NDArray[np.uint64] = header.view(np.dtype("<u8"))
        self.generations[:] = 1
        self.checksums: npt.NDArray[np.uint64] = np.zeros(layout.slots, dtype=np.uint64)
        self.sealed: npt.NDArray[np.uint8] = np.zeros(layout.slots, dtype=np.uint8)

    def page(self, index: int) -> Bytes:
        """Writable bytes of one slot, ``page_bytes`` long."""
        start = self.layout.first_slot_offset + index * self.layout.stride
        return self.memory.bytes[start : start + self.layout.page_bytes]

    def seal(self, index: int, checksum: int) -> None:
        """The slot holds a page with this checksum."""
        self.checksums[index] = checksum
        self.sealed[index] = 1

    def free(self, index: int) -> bool:
        """Empty the slot and move its generation on; says whether it held a page."""
        held = bool(self.sealed[index])
        self.sealed[index] = 0
        self.generations[index] += np.uint64(1)
        return held


def plan_layout(spec: TierSpec, segment: int, domain: str, page_bytes: int, slots: int) -> SegmentLayout:
    """Where the slots of a segment lie. Raises InvalidArgumentError when they do not fit."""
    if spec.header_bytes_per_slot != GENERATION_BYTES:
        raise InvalidArgumentError(f"tier {spec.name}: header_bytes_per_slot must be {GENERATION_BYTES}")
    if page_bytes < 1 or slots < 1:
        raise InvalidArgumentError(
            f"segment {segment}: page_bytes {page_bytes} and slots {slots} must be positive"
        )
    first, stride = segment_header_bytes(spec, slots), slot_stride(page_bytes)
    if first + slots * stride > spec.segment_bytes:
        raise InvalidArgumentError(
            f"segment {segment}: {slots} slots of {page_bytes} bytes do not fit in {spec.segment_bytes}"
        )
    return SegmentLayout(segment, domain, spec.segment_bytes, page_bytes, slots, first, stride)
