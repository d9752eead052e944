"""SGLang's host pools as memory: where the bytes of a page lie, in which order they are stored, and in which memfd.

A stored page is the pool's *flat data page*: its pieces in the order of their addresses where the pool is one tensor,
else in the order in which the pool lists them. Where a page is one piece, or K and V of one size, each piece is a page
of hicache's own: then it goes straight from the pool's memory into the cache, and back with one copy.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hicache.errors import ConfigError, InvalidArgumentError
from hicache.integrations.sglang.identity import PoolFacts
from hicache.rpc.client.buffers import Bytes, readable
from hicache.rpc.client.staging import ForeignMemory

Piece = tuple[int, int]  # address, bytes
Adopt = Callable[[int, int], ForeignMemory]  # a descriptor, and how many bytes of it


@dataclasses.dataclass(frozen=True, slots=True)
class Mapped:
    """A part of the pool that is a memfd."""

    begin: int
    end: int
    memory: ForeignMemory


class HostPool:
    """One host pool. ``parts``: pages of hicache's that one page of SGLang's is stored as, ``part_bytes`` each."""

    def __init__(self, name: str, pool: Any, adopt: Adopt) -> None:
        """Raises ConfigError for a pool whose pages cannot be had."""
        self.name = name
        self._pool = pool
        self.page_tokens = int(getattr(pool, "logical_page_size", 0) or pool.page_size)
        found = self._probe()
        self.listed = found is not None  # its pages' addresses can be asked for
        sizes = [size for _, size in found] if found is not None else [self._flat_bytes()]
        self.parts = len(sizes) if len(sizes) <= 2 and len(set(sizes)) == 1 else 1
        self.page_bytes = sum(sizes)
        self.part_bytes = self.page_bytes // self.parts
        if not self.page_bytes:
            raise ConfigError(
                f"pool {name} ({type(pool).__name__}) has pages of no bytes: this kind of model is not supported"
            )
        #: Whether each part is one piece, so that it can go without being gathered.
        self.whole = found is not None and len(found) == self.parts
        self.mapped = _mapped(pool, adopt) if self.whole else []

    def close(self) -> None:
        """Let go of the pool's descriptors."""
        for each in self.mapped:
            each.memory.close()
        self.mapped = []

    def facts(self) -> PoolFacts:
        """What its pages are."""
        pool = self._pool
        order = "flat" if not self.listed else "address" if self._single else "listed"
        return PoolFacts(
            name=self.name,
            kind=type(pool).__name__,
            layout=str(getattr(pool, "layout", "")),
            dtype=str(getattr(pool, "dtype", "")).removeprefix("torch."),
            order=f"{order}{self.parts}",
            page_tokens=self.page_tokens,
            page_bytes=self.part_bytes,
            layers=_count(pool, "layer_num"),
            heads=_count(pool, "head_num"),
            head_size=_count(pool, "head_dim"),
        )

    # --- where pages lie

    def pages(self, host_indices: Any) -> list[list[Bytes]]:
        """The pieces of each page, in the order in which they are stored; writing to them writes to the pool.

        Raises InvalidArgumentError for indices that are not whole pages.
        """
        count = len(host_indices) // self.page_tokens
        if len(host_indices) != count * self.page_tokens:
            raise InvalidArgumentError(
                f"{len(host_indices)} indices are no whole pages of {self.page_tokens}"
            )
        if not count:
            return []
        addresses, sizes = self._pool.get_page_buffer_meta(host_indices)
        each = len(addresses) // count
        found = []
        for first in range(0, len(addresses), each):
            pieces = list(zip(addresses[first : first + each], sizes[first : first + each], strict=True))
            found.append([_bytes_at(*piece) for piece in self._ordered(pieces)])
        return found

    def rows(self, pieces: Sequence[Bytes]) -> list[Sequence[Bytes]]:
        """The pieces of each part of a page."""
        return [[piece] for piece in pieces] if self.parts > 1 else [pieces]

    def place(self, piece: Bytes) -> tuple[ForeignMemory, int] | None:
        """The memfd in which a piece lies, and where; None where it lies in none."""
        address = piece.ctypes.data
        for each in self.mapped:
            if each.begin <= address and address + piece.nbytes <= each.end:
                return each.memory, address - each.begin
        return None

    # --- flat pages, for pools that do not say where their pages lie

    def read_flat(self, index: int) -> Bytes:
        """A copy of a page's bytes."""
        return _tensor_bytes(self._pool.get_data_page(index, flat=True))

    def new_flat(self) -> tuple[Any, Bytes]:
        """A tensor for a page, and its bytes."""
        tensor = self._pool.get_dummy_flat_data_page()
        return tensor, _tensor_bytes(tensor)

    def write_flat(self, index: int, tensor: Any) -> None:
        """Put a page's tensor into the pool."""
        self._pool.set_from_flat_data_page(index, tensor)

    @property
    def _single(self) -> bool:
        """Whether the pool is one tensor."""
        return hasattr(getattr(self._pool, "kv_buffer", None), "data_ptr")

    def _ordered(self, pieces: list[Piece]) -> list[Piece]:
        return sorted(pieces) if self._single else pieces

    def _probe(self) -> list[Piece] | None:
        """The pieces of the first page; None where the pool cannot say."""
        import torch

        try:
            meta = self._pool.get_page_buffer_meta(torch.arange(self.page_tokens))
        except (AttributeError, ValueError, RuntimeError):  # so do SGLang's pools refuse a layout
            return None
        return list(zip(*meta, strict=True)) if meta and meta[0] else None

    def _flat_bytes(self) -> int:
        try:
            return int(_tensor_bytes(self._pool.get_dummy_flat_data_page()).nbytes)
        except (AttributeError, ValueError, RuntimeError, TypeError) as error:
            layout = getattr(self._pool, "layout", "?")
            raise ConfigError(
                f"pool {self.name} ({type(self._pool).__name__}) does not hand out its pages in layout {layout}",
                hint="use --hicache-mem-layout page_first, page_first_direct or layer_first",
            ) from error


def bytes_of(place: Any, size_bytes: Any = None) -> Bytes:
    """The memory that SGLang means: a contiguous CPU tensor, or an address and a size. Raises InvalidArgumentError."""
    if isinstance(place, int) and isinstance(size_bytes, int):
        return _bytes_at(place, size_bytes)
    return readable(place)


def _tensor_bytes(tensor: Any) -> Bytes:
    import torch

    found: Bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def _bytes_at(address: int, size_bytes: int) -> Bytes:
    memory = (ctypes.c_uint8 * size_bytes).from_address(address)
    return np.frombuffer(memoryview(memory), dtype=np.uint8)


def _count(pool: Any, name: str) -> int:
    value = getattr(pool, name, 0)
    return value if isinstance(value, int) else 0


def _mapped(pool: Any, adopt: Adopt) -> list[Mapped]:
    """The memfds of a pool, where its allocator is ``shm``."""
    allocator = getattr(pool, "allocator", None)
    found = []
    for fd, mapping in zip(getattr(allocator, "fds", ()), getattr(allocator, "mms", ()), strict=False):
        view = np.frombuffer(mapping, dtype=np.uint8)
        found.append(Mapped(view.ctypes.data, view.ctypes.data + view.nbytes, adopt(fd, view.nbytes)))
    only: Any = getattr(pool, "fd", None)
    buffer: Any = getattr(pool, "kv_buffer", None)
    if not found and isinstance(only, int) and hasattr(buffer, "data_ptr"):
        begin, size_bytes = int(buffer.data_ptr()), int(buffer.numel() * buffer.element_size())
        found.append(Mapped(begin, begin + size_bytes, adopt(only, size_bytes)))
    return found
