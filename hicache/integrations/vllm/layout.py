"""Where a block's bytes lie in an engine's KV tensors, whatever the order of their dimensions.

A layer's tensor has one dimension of blocks; the rest is the block's own. Its bytes are described by strides alone:
``blocks`` blocks, each of some outer dimensions and contiguous pieces below them. So one strided view a layer serves
blocks that are contiguous, blocks split into several pieces (keys and values apart, heads outermost), blocks that a
kernel sees as several smaller ones, and blocks of several layers packed together. A part of a page is layer by layer,
in a layer block by block, each block's bytes in the order in which they lie in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hicache.errors import UnsupportedError

Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockGeometry:
    """A layer's blocks in its storage, in bytes. ``outer``: (count, stride) of what lies apart within a block."""

    offset: int
    blocks: int
    block_stride: int
    outer: tuple[tuple[int, int], ...]
    run_bytes: int

    @property
    def block_bytes(self) -> int:
        """What one block takes in a page."""
        return math.prod(count for count, _ in self.outer) * self.run_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the byte view: blocks, outer dimensions, bytes of a piece."""
        return (self.blocks, *(count for count, _ in self.outer), self.run_bytes)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the byte view."""
        return (self.block_stride, *(stride for _, stride in self.outer), 1)

    @property
    def end(self) -> int:
        """The first byte of the storage behind all blocks."""
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class LayerTensor:
    """What a layer's tensor says of itself; strides in elements."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    offset: int  # of its first element, in bytes of its storage
    storage: int  # address of its storage
    storage_bytes: int
    device: str

    @classmethod
    def of(cls, name: str, tensor: Any) -> LayerTensor:
        """Of a torch tensor."""
        item = int(tensor.element_size())
        storage = tensor.untyped_storage()
        return cls(
            name,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            item,
            int(tensor.storage_offset()) * item,
            int(storage.data_ptr()),
            int(storage.nbytes()),
            str(tensor.device.type),
        )


def geometry(tensor: LayerTensor, num_blocks: int) -> BlockGeometry:
    """How the blocks of a layer lie. Raises UnsupportedError where they cannot be told or overlap."""
    at, split = _block_dimension(tensor, num_blocks)
    item = tensor.item_bytes
    dims = [
        (count, stride * item)
        for number, (count, stride) in enumerate(zip(tensor.shape, tensor.strides, strict=True))
        if number != at and count != 1
    ]
    block_stride = tensor.strides[at] * split * item
    if split > 1:
        dims.append((split, tensor.strides[at] * item))
    dims.sort(key=lambda dim: -dim[1])
    run = item
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    found = BlockGeometry(tensor.offset, num_blocks, block_stride, tuple(dims), run)
    _refuse_overlaps(tensor.name, found)
    if found.end > tensor.storage_bytes:
        raise UnsupportedError(f"layer {tensor.name}: its blocks reach beyond its memory")
    return found


def _block_dimension(tensor: LayerTensor, num_blocks: int) -> tuple[int, int]:
    """Which dimension counts blocks, and into how many of its steps one of the engine's blocks is split.

    Blocks come first, or second after a dimension of 2 that keeps keys and values apart.
    """
    shape = tensor.shape
    first = bool(shape) and shape[0] >= num_blocks and shape[0] % num_blocks == 0
    second = len(shape) > 1 and shape[0] == 2 and shape[1] >= num_blocks and shape[1] % num_blocks == 0
    if first == second:
        how = (
            "several of its dimensions could be the blocks"
            if first
            else "none of its dimensions is the blocks"
        )
        raise UnsupportedError(
            f"layer {tensor.name}: a tensor {list(shape)} for {num_blocks} blocks: {how}",
            hint="this KV layout is not known to hicache",
        )
    at = 0 if first else 1
    return at, shape[at] // num_blocks


def _refuse_overlaps(name: str, found: BlockGeometry) -> None:
    """Raise UnsupportedError where two bytes of a layer's blocks share an address."""
    dims = sorted(zip(found.shape[:-1], found.strides[:-1], strict=True), key=lambda dim: dim[1])
    extent = found.run_bytes
    for count, stride in dims:
        if count > 1 and stride < extent:
            raise UnsupportedError(f"layer {name}: its blocks overlap (stride {stride}, {extent} bytes)")
        extent += (count - 1) * stride


@dataclasses.dataclass(frozen=True, slots=True)
class LayerBlocks:
    """One layer of a part of a page: where it is there, and where its blocks are in the engine."""

    name: str
    number: int
    begin: int  # of its bytes in a part
    block_bytes: int
    geometry: BlockGeometry
    tensor: LayerTensor


class PartLayout:
    """A rank's part of a page: all layers' blocks. Layers that share another's cache are no part of it."""

    def __init__(
        self, tensors: Mapping[str, LayerTensor], layers: Sequence[tuple[str, int]], sizes: tuple[int, int]
    ) -> None:
        """``layers``: names and bytes of a block, in the part's order; ``sizes``: blocks, and blocks of a page.

        Raises UnsupportedError where tensors are missing, differ from what was announced, or share memory.
        """
        num_blocks, self.page_blocks = sizes
        self.num_blocks = num_blocks
        self.layers: list[LayerBlocks] = []
        self._numbers: dict[str, int] = {}
        begin = 0
        for name, block_bytes in layers:
            layer = self._layer(tensors, name, block_bytes, begin)
            self._numbers[name] = layer.number
            self.layers.append(layer)
            begin += block_bytes * self.page_blocks
        self.part_bytes = begin
        _refuse_shared(self.layers)
        self._adopt_sharing(tensors)

    def _layer(
        self, tensors: Mapping[str, LayerTensor], name: str, block_bytes: int, begin: int
    ) -> LayerBlocks:
        if name not in tensors:
            raise UnsupportedError(f"layer {name}: the engine registered no KV tensor for it")
        found = geometry(tensors[name], self.num_blocks)
        if found.block_bytes != block_bytes:
            raise UnsupportedError(
                f"layer {name}: a block takes {found.block_bytes} bytes in the engine's tensor, and {block_bytes} by "
                "its configuration"
            )
        return LayerBlocks(name, len(self.layers), begin, block_bytes, found, tensors[name])

    def _adopt_sharing(self, tensors: Mapping[str, LayerTensor]) -> None:
        """Layers that were not announced must be other names of announced ones (KV sharing)."""
        owners = {_place(layer.tensor): layer.number for layer in self.layers}
        for name, tensor in tensors.items():
            if name in self._numbers:
                continue
            if _place(tensor) not in owners:
                raise UnsupportedError(
                    f"layer {name}: it has a KV cache of its own that is no part of a page",
                    hint="models whose layers have different kinds of caches are not supported",
                )
            self._numbers[name] = owners[_place(tensor)]

    def number(self, name: str) -> int | None:
        """Which layer of the part is behind a layer's name; None for layers without KV here."""
        return self._numbers.get(name)

    def owns(self, name: str) -> bool:
        """Whether the layer writes its KV itself."""
        found = self._numbers.get(name)
        return found is not None and self.layers[found].name == name

    @property
    def device(self) -> str:
        """Where the tensors are. Raises UnsupportedError where they are in different places."""
        devices = {layer.tensor.device for layer in self.layers}
        if len(devices) != 1:
            raise UnsupportedError(f"KV tensors on several devices: {', '.join(sorted(devices))}")
        return devices.pop()


def _place(tensor: LayerTensor) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return tensor.storage, tensor.offset, tensor.shape, tensor.strides


def _refuse_shared(layers: Sequence[LayerBlocks]) -> None:
    """Raise UnsupportedError where two announced layers begin at the same bytes."""
    seen: dict[tuple[int, int], str] = {}
    for layer in layers:
        place = (layer.tensor.storage, layer.tensor.offset)
        if place in seen:
            raise UnsupportedError(f"layers {seen[place]} and {layer.name} share one KV tensor")
        seen[place] = layer.name


# --- which bytes go where


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """Pages beside blocks: ``pages`` rows from ``row`` of ``span``, of each the blocks from ``first`` on.

    ``blocks``: their numbers in the engine, shape (pages, blocks of each). ``step``: 1 or -1 where these follow one
    another through all pages, else 0.
    """

    span: int
    row: int
    first: int
    blocks: npt.NDArray[np.intp]
    step: int

    @property
    def pages(self) -> int:
        """How many rows it takes."""
        return len(self.blocks)


#: Pages that one call copies: a bound on how long a copy that is to be stopped still takes.
MOST_PAGES = 64


def plan(
    block_ids: Sequence[int], spans: Sequence[int], page_blocks: int, skip_blocks: int = 0
) -> list[Move]:
    """How blocks lie beside pages. ``spans``: lengths of stretches of consecutive page rows.

    ``skip_blocks``: of the first page, without a block in the engine.
    """
    assert 0 <= skip_blocks < page_blocks, skip_blocks
    assert len(block_ids) == sum(spans) * page_blocks - skip_blocks, "a block for each place in the pages"
    ids = np.fromiter(block_ids, np.intp, len(block_ids))
    assert ids.min() >= 0, "block numbers"
    moves: list[Move] = []
    at = 0
    for span, rows in enumerate(spans):
        row = 0
        while row < rows:
            first = skip_blocks if not at else 0
            pages = 1 if first else min(rows - row, MOST_PAGES)
            count = pages * page_blocks - first
            moves.append(_move(span, row, first, ids[at : at + count].reshape(pages, -1)))
            row, at = row + pages, at + count
    return moves


def _move(span: int, row: int, first: int, blocks: npt.NDArray[np.intp]) -> Move:
    steps = np.diff(blocks.reshape(-1))
    step = int(steps[0]) if len(steps) else 1
    regular = step in {-1, 1} and bool((steps == step).all())
    return Move(span, row, first, blocks, step if regular else 0)
