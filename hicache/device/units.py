"""Units between an engine's planes in host memory and pages in host memory, with numpy alone.

One call moves the units of a chunk, whatever their addresses: a *piece* of a unit is an item at any byte of an array
that begins at the lowest address and has no end, so that one index picks pieces out of any number of pages, blocks and
planes. numpy leaves the interpreter's lock while it copies. A byte passes once through a temporary, so chunks are
small: they stay in the processor's cache.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import numpy.typing as npt

from hicache.device.driver import Addresses
from hicache.device.kv import PagedKv

#: Bytes of the temporary.
CHUNK_BYTES = 1 << 20
#: Addresses of a process on 64-bit machines are less; numpy counts an array's bytes, items that overlap included, with
#: 63 bits, so that a unit of more than a piece's bytes is moved as several.
_ADDRESS_MAX, PIECE_BYTES_MAX = 1 << 47, 1 << 15
#: A unit that cannot be cut into fewer (a head of a large prime size) would take far more memory than it has bytes.
PIECES_MAX = 1 << 14
_FIRST = 1  # numpy takes address 0 for nothing


class _Everything:
    """All memory, as items at every byte."""

    def __init__(self, item_bytes: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (_FIRST, False),
            "shape": (_ADDRESS_MAX, *shape),
            "strides": (1, *strides),
            "typestr": f"|V{item_bytes}",
        }


@dataclasses.dataclass(frozen=True, slots=True)
class UnitView:
    """How a unit lies in a plane and in a page: its pieces, and where each begins."""

    engine: npt.NDArray[np.void]
    page: npt.NDArray[np.void]
    engine_offsets: Addresses
    page_offsets: Addresses

    @classmethod
    def of(cls, kv: PagedKv, unit_tokens: int) -> UnitView:
        """For units of so many tokens: neighbours without a gap are one item. Raises ValueError for too odd ones."""
        width = kv.element_bytes
        sizes = (unit_tokens, kv.heads, kv.head_size)
        strides = [stride * width for stride in kv.strides[1:]]
        dense = [kv.heads * kv.head_size * width, kv.head_size * width, width]
        piece = _piece(sizes, width)
        count = math.prod(-(-size // step) for size, step in zip(sizes, piece, strict=True))
        if count > PIECES_MAX:
            raise ValueError(f"a unit of {sizes} tokens, heads and elements falls into {count} pieces")
        starts = [range(0, size, step) for size, step in zip(sizes, piece, strict=True)]
        every = np.array(list(itertools.product(*starts)), np.int64)
        item_bytes = width
        axes = [(n, stride) for n, stride in zip(piece, strides, strict=True) if n > 1]
        while axes and axes[-1][1] == item_bytes:
            item_bytes *= axes.pop()[0]
        shape = tuple(size for size, _ in axes)
        inner = [item_bytes * math.prod(shape[at + 1 :]) for at in range(len(shape))]
        return cls(
            np.asarray(_Everything(item_bytes, shape, tuple(stride for _, stride in axes))),
            np.asarray(_Everything(item_bytes, shape, tuple(inner))),
            every @ np.array(strides, np.int64) - _FIRST,
            every @ np.array(dense, np.int64) - _FIRST,
        )

    def move(self, engine: Addresses, page: Addresses, *, pack: bool) -> None:
        """Copy the units at these addresses from planes to pages (``pack``), or back."""
        at_engine = (engine[:, None] + self.engine_offsets).reshape(-1)
        at_page = (page[:, None] + self.page_offsets).reshape(-1)
        if pack:
            self.page[at_page] = self.engine[at_engine]
        else:
            self.engine[at_engine] = self.page[at_page]


def _piece(sizes: tuple[int, ...], width: int) -> list[int]:
    """Tokens, heads and elements of a piece: an inner axis is cut only where the outer ones are cut to one."""
    piece = list(sizes)
    for axis in range(len(piece)):
        while piece[axis] > 1 and math.prod(piece) * width > PIECE_BYTES_MAX:
            piece[axis] //= _smallest_factor(piece[axis])
    return piece


def _smallest_factor(number: int) -> int:
    return next((by for by in range(2, math.isqrt(number) + 1) if not number % by), number)
