"""An engine's KV tensors as planes in shared memory, for the sidecar to map: ``PagedKv``.

Which axes a layer's tensor has is one of ``LAYOUTS`` of ``kernels/paged.py``. A layer is one tensor, or a pair of keys
and values; in a page its planes lie in that order, layer after layer.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hicache.device.kv import MemoryKind, PagedKv, Places, SharedMemory
from hicache.errors import HicacheError, InvalidArgumentError, UnsupportedError
from hicache.rpc.client.kv_memory import memory_at

if TYPE_CHECKING:
    from hicache.device.export import Exporter

#: Where a plane lies: something that names its allocation in this process, how others map that, and the offset in it.
Found = tuple[int, SharedMemory, int]


def paged_kv(
    layers: Sequence[Any],
    layout: str,
    *,
    page_offset: int = 0,
    planes_per_layer: int | None = None,
    exporter: Callable[[Any], Exporter] | None = None,
) -> PagedKv:
    """The paged KV of these tensors. Descriptors in it are the caller's to close (``close_memories``).

    Raises InvalidArgumentError for tensors that do not fit the layout or differ in shape, strides or dtype,
    UnsupportedError for memory that no other process can map: says why and what to do.
    """
    if not isinstance(layers, Iterable):
        raise InvalidArgumentError(f"paged KV: layers must be a list of tensors, not {type(layers).__name__}")
    by_layer = [_planes(layer, layout) for layer in layers]
    planes = [plane for of_layer in by_layer for plane in of_layer]
    if not planes:
        raise InvalidArgumentError("paged KV of no layers")
    first = planes[0]
    for plane in planes:
        if (plane.shape, plane.stride(), plane.dtype, plane.device) != (
            first.shape,
            first.stride(),
            first.dtype,
            first.device,
        ):
            raise InvalidArgumentError(
                f"planes differ: {list(plane.shape)} {plane.dtype} with strides {plane.stride()} on {plane.device},"
                f" and {list(first.shape)} {first.dtype} with strides {first.stride()} on {first.device}"
            )
    blocks, block_tokens, heads, head_size = first.shape
    table, finder = _Table(), _finder(first, exporter)
    try:
        for plane in planes:
            table.add(*finder.locate(plane))
        return PagedKv(
            memories=tuple(table.memories),
            plane_memory=tuple(table.plane_memory),
            plane_offset=tuple(table.plane_offset),
            planes_per_layer=planes_per_layer or len(by_layer[0]),
            blocks=blocks,
            block_tokens=block_tokens,
            heads=heads,
            head_size=head_size,
            element_bytes=first.element_size(),
            strides=first.stride(),
            page_offset=page_offset,
        )
    except HicacheError:
        close_memories(finder.found.values())
        raise


def _planes(layer: Any, layout: str) -> list[Any]:
    from hicache.device import kernels

    parts = layer if isinstance(layer, list | tuple) else [layer]
    for part in parts:
        if not hasattr(part, "data_ptr"):
            raise InvalidArgumentError(f"paged KV: a layer must be torch tensors, not {type(part).__name__}")
    try:
        return [plane for part in parts for plane in kernels.planes(part, layout)]
    except ValueError as error:
        raise InvalidArgumentError(f"paged KV: {error}") from None


@dataclasses.dataclass(slots=True)
class _Table:
    """Allocations, each once, and where the planes lie in them."""

    memories: list[SharedMemory] = dataclasses.field(default_factory=list)
    plane_memory: list[int] = dataclasses.field(default_factory=list)
    plane_offset: list[int] = dataclasses.field(default_factory=list)
    _index: dict[int, int] = dataclasses.field(default_factory=dict)

    def add(self, key: int, memory: SharedMemory, offset: int) -> None:
        if key not in self._index:
            self._index[key] = len(self.memories)
            self.memories.append(memory)
        self.plane_memory.append(self._index[key])
        self.plane_offset.append(offset)


class _Finder(Protocol):
    """Finds the memory of planes. ``found``: what of it was exported, by whatever names it."""

    found: dict[int, SharedMemory]

    def locate(self, plane: Any) -> Found:
        """Where a plane lies. Raises UnsupportedError."""


def _finder(plane: Any, exporter: Callable[[Any], Exporter] | None) -> _Finder:
    """What finds the memory of planes like this one."""
    if plane.device.type == "cpu":
        return _HostPlanes()
    if plane.device.type == "cuda":
        from hicache.device.export import exporter_of

        return _CudaPlanes((exporter or exporter_of)(plane))
    raise UnsupportedError(
        f"KV on {plane.device} cannot be registered", hint="CUDA tensors can, and CPU tensors in KvMemory"
    )


class _HostPlanes:
    def __init__(self) -> None:
        self.found: dict[int, SharedMemory] = {}

    def locate(self, plane: Any) -> Found:
        memory = memory_at(plane.data_ptr())
        if memory is None:
            raise UnsupportedError(
                "KV in ordinary host memory cannot be mapped by the sidecar",
                hint="cut the tensors out of client.kv_memory(size_bytes), a KvMemory",
            )
        if memory.address not in self.found:
            fd = os.dup(memory.fd)
            self.found[memory.address] = SharedMemory(MemoryKind.MEMFD, memory.size_bytes, fd=fd)
        return memory.address, self.found[memory.address], plane.data_ptr() - memory.address


class _CudaPlanes:
    def __init__(self, exporter: Exporter) -> None:
        from hicache.device.export import Allocations

        self._allocations = Allocations(exporter)
        self.found = self._allocations.found

    def locate(self, plane: Any) -> Found:
        last = sum((n - 1) * by for n, by in zip(plane.shape, plane.stride(), strict=True))
        return self._allocations.of(plane.data_ptr(), (last + 1) * plane.element_size())


def close_memories(memories: Iterable[SharedMemory]) -> None:
    """Close the descriptors among them."""
    for fd in {memory.fd for memory in memories if memory.fd >= 0}:
        os.close(fd)


def own_memories(kv: PagedKv) -> PagedKv:
    """The same paged KV with descriptors of our own, which its maker's may be closed without."""
    memories = []
    try:
        for memory in kv.memories:
            fd = os.dup(memory.fd) if memory.fd >= 0 else -1
            memories.append(dataclasses.replace(memory, fd=fd))
    except OSError as error:
        close_memories(memories)
        raise InvalidArgumentError(f"paged KV: descriptor {memory.fd} cannot be used: {error}") from error
    return dataclasses.replace(kv, memories=tuple(memories))


def places(kv: PagedKv, blocks: Any, page_tokens: int) -> Places:
    """Where pages lie: int64 ``[pages, units]``, from an engine's block ids in the order of their tokens.

    Blocks as large as a page or smaller: so many make one page that ``blocks`` has whole pages of them (any shape).
    Larger blocks: each is several pages, all of which are named, in order. Negative ids: places that are left out.
    """
    if page_tokens < 1:
        raise InvalidArgumentError(f"pages of {page_tokens} tokens")
    ids = np.asarray(blocks.cpu() if hasattr(blocks, "cpu") else blocks)
    if ids.size and ids.dtype.kind not in "iu":
        raise InvalidArgumentError(f"block ids must be integers, not {ids.dtype}")
    ids = ids.astype(np.int64).reshape(-1)
    if ids.size and int(ids.max()) >= kv.blocks:
        raise InvalidArgumentError(f"block {int(ids.max())} is not one of {kv.blocks}")
    size = kv.block_tokens
    if page_tokens % size and size % page_tokens:
        raise InvalidArgumentError(
            f"pages of {page_tokens} tokens and blocks of {size} do not divide each other"
        )
    if size <= page_tokens:
        units = page_tokens // size
        if len(ids) % units:
            raise InvalidArgumentError(
                f"{len(ids)} blocks of {size} tokens are no whole pages of {page_tokens}"
            )
        return np.where(ids < 0, -1, ids * size).reshape(-1, units)
    inside = np.arange(0, size, page_tokens, dtype=np.int64)
    return np.where(ids[:, None] < 0, -1, ids[:, None] * size + inside).reshape(-1, 1)
