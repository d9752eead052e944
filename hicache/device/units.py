"""Units between an engine's planes in host memory and pages in host memory, with numpy alone.

One call moves the units of a chunk, whatever their addresses: a unit is an item at any byte of an array that begins at
address 0 and has no end, so that one index picks units out of any number of pages, blocks and planes. numpy leaves the
interpreter's lock while it copies. A byte passes once through a temporary, so chunks are small: they stay in the
processor's cache.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from hicache.device.driver import Addresses
from hicache.device.kv import PagedKv

#: Bytes of the temporary.
CHUNK_BYTES = 1 << 20
_ADDRESS_MAX = 1 << 47  # of a process on 64-bit machines


class _Everything:
    """All memory, as items at every byte."""

    def __init__(self, item_bytes: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (1, False),  # numpy takes 0 for nothing; addresses are counted from here
            "shape": (_ADDRESS_MAX, *shape),
            "strides": (1, *strides),
            "typestr": f"|V{item_bytes}",
        }


_FIRST = 1


@dataclasses.dataclass(frozen=True, slots=True)
class UnitView:
    """How a unit lies: in a plane, and in a page."""

    engine: npt.NDArray[np.void]
    page: npt.NDArray[np.void]

    @classmethod
    def of(cls, kv: PagedKv, unit_tokens: int) -> UnitView:
        """For units of so many tokens: neighbours without a gap are one item."""
        item_bytes = kv.element_bytes
        axes = [
            (size, stride * kv.element_bytes)
            for size, stride in zip((unit_tokens, kv.heads, kv.head_size), kv.strides[1:], strict=True)
            if size > 1
        ]
        while axes and axes[-1][1] == item_bytes:
            item_bytes *= axes.pop()[0]
        shape = tuple(size for size, _ in axes)
        dense = [item_bytes]
        for size in reversed(shape[1:]):
            dense.append(dense[-1] * size)
        return cls(
            np.asarray(_Everything(item_bytes, shape, tuple(stride for _, stride in axes))),
            np.asarray(_Everything(item_bytes, shape, tuple(reversed(dense[: len(shape)])))),
        )

    def move(self, engine: Addresses, page: Addresses, *, pack: bool) -> None:
        """Copy the units at these addresses from planes to pages (``pack``), or back."""
        if pack:
            self.page[page - _FIRST] = self.engine[engine - _FIRST]
        else:
            self.engine[engine - _FIRST] = self.page[page - _FIRST]
