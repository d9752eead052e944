"""Copies between pages and blocks in host memory: one call a move and a layer, without the GIL.

A thread that takes the GIL back for every block waits for it as often, up to the interpreter's switch interval of
5 ms each time while the engine's own thread is at work. So however many blocks a move has and wherever they are, numpy
is called once: with a slice where block numbers follow one another, else with their list. It copies piece by piece
with memcpy and holds no GIL meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from hicache.integrations.vllm.layout import Bytes, LayerBlocks, Move, PartLayout


class Blocks(Protocol):
    """Where the engine's blocks are. ``deferred``: saves are not waited for when a step ends."""

    layout: PartLayout
    deferred: bool

    def mark(self) -> Any:
        """What copies are to come behind. From the engine's thread."""

    def load(self, rows: Sequence[Bytes], move: Move, layer: int, after: Any) -> None:
        """Copy one layer of a move's pages into its blocks. ``rows``: a span's parts, one a row."""

    def save(self, rows: Sequence[Bytes], move: Move, layer: int, after: Any) -> None:
        """Copy one layer of a move's blocks into its pages."""


class HostBlocks:
    """The blocks of all layers of a part, in host memory, as byte views. Threads may share it."""

    def __init__(self, layout: PartLayout) -> None:
        self.layout = layout
        self.deferred = False
        self._views = [_view(layer) for layer in layout.layers]

    def mark(self) -> None:
        """Nothing: what the engine has computed is there."""

    def load(self, rows: Sequence[Bytes], move: Move, layer: int, after: object = None) -> None:
        """Copy one layer of a move's pages into its blocks. ``rows``: a span's parts, one a row."""
        pages = self._pages(rows, move, layer)
        if move.step:
            np.copyto(self._slice(move, layer), pages)
        else:
            self._views[layer][move.blocks] = pages

    def save(self, rows: Sequence[Bytes], move: Move, layer: int, after: object = None) -> None:
        """Copy one layer of a move's blocks into its pages."""
        blocks = self._slice(move, layer) if move.step else self._views[layer][move.blocks]
        np.copyto(self._pages(rows, move, layer), blocks)

    def _slice(self, move: Move, layer: int) -> Bytes:
        """A layer of blocks that follow one another: pages, blocks of each, outer dimensions, bytes."""
        view, begin = self._views[layer], int(move.blocks[0, 0])
        end = begin + move.step * move.blocks.size
        stop = None if end < 0 else end  # a slice that goes down to 0 has no number for its end
        return _split(view[begin : stop : move.step], (*move.blocks.shape, *view.shape[1:]))

    def _pages(self, rows: Sequence[Bytes], move: Move, layer: int) -> Bytes:
        """The places in the pages of a layer of these blocks, in the same shape."""
        place, shape = self.layout.layers[layer], move.blocks.shape
        begin = place.begin + move.first * place.block_bytes
        found = rows[move.span][
            move.row : move.row + move.pages, begin : begin + shape[1] * place.block_bytes
        ]
        return _split(found, (*shape, *self._views[layer].shape[1:]))


def _split(data: Bytes, shape: tuple[int, ...]) -> Bytes:
    """The same bytes seen with more dimensions. Splitting one never copies, whatever its stride."""
    found = data.reshape(shape)
    assert np.may_share_memory(found, data), "a view"
    return found


def _view(layer: LayerBlocks) -> Bytes:
    """A layer's blocks. The engine keeps its tensors while it lives; the view does not."""
    raw = (ctypes.c_uint8 * layer.tensor.storage_bytes).from_address(layer.tensor.storage)
    found = layer.geometry
    return np.ndarray(
        found.shape, np.uint8, buffer=memoryview(raw).cast("B"), offset=found.offset, strides=found.strides
    )
