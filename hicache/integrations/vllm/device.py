"""Copies between pages and blocks in a GPU's memory, on streams of our own.

A copy goes through pinned memory, which only its thread uses: page memory and staging memory belong to other
processes. It is launched behind what the engine had launched when the blocks were given to it, or computed, and it has
ended when the call returns: so whoever waits for a copy waits in a thread of ours, never the engine's stream.

The engine's KV tensors are never written to by the host, and a layer is one transfer and one gather or scatter,
however many blocks it has.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hicache.errors import UnsupportedError
from hicache.integrations.vllm.layout import Bytes, LayerBlocks, Move, PartLayout


class Launcher(Protocol):
    """A device's streams and events, and nothing else of it."""

    def stream(self) -> Any:
        """A new stream."""

    def mark(self) -> Any:
        """An event behind everything that the calling thread's current stream was given."""

    def launch(self, stream: Any, work: Callable[[], None], after: Any) -> Any:
        """Give a stream some work, behind an event; answers the event behind it."""

    def wait(self, event: Any) -> None:
        """Wait for an event, without the GIL."""

    def pinned(self, size_bytes: int) -> Any:
        """A tensor of bytes in host memory that the device copies from and to by itself."""


class CudaLauncher:
    """CUDA's, through torch."""

    def __init__(self, device: Any) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._torch = torch
        self._device = device

    def stream(self) -> Any:
        """A new one of the tensors' device."""
        return self._cuda.Stream(device=self._device)

    def mark(self) -> Any:
        """Recorded on the engine's stream."""
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))
        return event

    def launch(self, stream: Any, work: Callable[[], None], after: Any) -> Any:
        """Launched by the calling thread, which waits for nothing."""
        event = self._cuda.Event()
        with self._cuda.device(self._device), self._cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            work()
            event.record(stream)
        return event

    def wait(self, event: Any) -> None:
        """By the driver."""
        event.synchronize()

    def pinned(self, size_bytes: int) -> Any:
        """Page-locked."""
        return self._torch.empty(size_bytes, dtype=self._torch.uint8, pin_memory=True)


class DeviceBlocks:
    """As HostBlocks, for blocks in a device's memory. Threads may share it; each has a stream of its own."""

    def __init__(
        self, layout: PartLayout, tensors: Mapping[str, Any], launcher: Launcher | None = None
    ) -> None:
        first = tensors[layout.layers[0].name]
        if launcher is None and layout.device != "cuda":
            raise UnsupportedError(f"KV tensors on {layout.device}: only cpu and cuda are supported")
        self.layout = layout
        self.deferred = True
        self._launcher = launcher or CudaLauncher(first.device)
        self._views = [_view(layer, tensors[layer.name]) for layer in layout.layers]
        self._own = threading.local()

    def mark(self) -> Any:
        """What copies are to come behind: all that the engine has launched until now."""
        return self._launcher.mark()

    def load(self, rows: Sequence[Bytes], move: Move, layer: int, after: Any) -> None:
        """Copy one layer of a move's pages into its blocks. ``rows``: a span's parts, one a row."""
        place, view = self._place(rows, move, layer), self._views[layer]
        host = self._host(place.size)
        np.copyto(host.numpy().reshape(place.shape), place)

        def scatter() -> None:
            staged = host.to(view.device, non_blocking=True).view(view.dtype)
            blocks = self._blocks(move, view)
            view.index_copy_(0, blocks, staged.view(len(blocks), *view.shape[1:]))

        self._run(scatter, after)

    def save(self, rows: Sequence[Bytes], move: Move, layer: int, after: Any) -> None:
        """Copy one layer of a move's blocks into its pages."""
        place, view = self._place(rows, move, layer), self._views[layer]
        host = self._host(place.size)

        def gather() -> None:
            found = view.index_select(0, self._blocks(move, view))
            host.copy_(found.view(-1).view(host.dtype), non_blocking=True)

        self._run(gather, after)
        np.copyto(place, host.numpy().reshape(place.shape))

    def _run(self, work: Callable[[], None], after: Any) -> None:
        """To its end, also where launching it fails midway: what was launched may still write."""
        if not hasattr(self._own, "stream"):
            self._own.stream = self._launcher.stream()
        stream = self._own.stream
        try:
            event = self._launcher.launch(stream, work, after)
        except BaseException:
            with contextlib.suppress(RuntimeError):
                self._launcher.wait(self._launcher.launch(stream, lambda: None, None))
            raise
        self._launcher.wait(event)

    def _blocks(self, move: Move, view: Any) -> Any:
        import torch

        return torch.from_numpy(move.blocks.reshape(-1)).to(view.device)

    def _place(self, rows: Sequence[Bytes], move: Move, layer: int) -> Bytes:
        """A layer's bytes in a move's pages, one row a page."""
        place = self.layout.layers[layer]
        begin = place.begin + move.first * place.block_bytes
        end = begin + move.blocks.shape[1] * place.block_bytes
        return rows[move.span][move.row : move.row + move.pages, begin:end]

    def _host(self, size_bytes: int) -> Any:
        """This thread's pinned memory, of that size."""
        held = getattr(self._own, "pinned", None)
        if held is None or len(held) < size_bytes:
            held = self._own.pinned = self._launcher.pinned(size_bytes)
        return held[:size_bytes]


def _view(layer: LayerBlocks, tensor: Any) -> Any:
    """A layer's blocks as a tensor of the widest items that its pieces are made of."""
    import torch

    found = layer.geometry
    numbers = [found.offset, found.run_bytes, *found.strides[:-1]]
    item, dtype = next(
        (size, kind)
        for size, kind in ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
        if all(number % size == 0 for number in numbers)
    )
    shape = (*found.shape[:-1], found.run_bytes // item)
    strides = (*(stride // item for stride in found.strides[:-1]), 1)
    return torch.empty(0, dtype=dtype, device=tensor.device).set_(
        tensor.untyped_storage(), found.offset // item, shape, strides
    )
