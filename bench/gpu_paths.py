"""The ways from an engine's paged KV to host pages and back, each checked against the twin."""

from __future__ import annotations

import ctypes
import dataclasses

import harness
import torch
from gpu_machine import Machine

from hicache.device import kernels

#: The staged way moves pieces of this size through two buffers.
PIECE_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """An engine's cache; a page is one block."""

    layers: int
    layout: str
    block: int
    heads: int
    dim: int
    counts: tuple[int, ...]  # of pages to move

    def tensor(self, blocks: int) -> tuple[int, ...]:
        if self.layout == "latent":
            return (blocks, self.block, self.dim)
        return (2, blocks, self.block, self.heads, self.dim)


class Paths:
    """A paged cache with twice as many blocks as pages, some of which are moved, in random order."""

    def __init__(self, machine: Machine, shape: Shape, count: int) -> None:
        self.machine, self.shape, self.count = machine, shape, count
        rng = torch.Generator().manual_seed(1)
        # bfloat16 numbers, not any bits: the quantising kernels take them too
        sample = torch.randn(shape.tensor(2 * count), generator=rng).to(torch.bfloat16)
        self.layers = [torch.roll(sample, number, 0).to(machine.device) for number in range(shape.layers)]
        self.planes = [plane for layer in self.layers for plane in kernels.planes(layer, shape.layout)]
        blocks = torch.randperm(2 * count, generator=rng)[:count].view(-1, 1)
        self.places = kernels.places_of_blocks(blocks, shape.block, shape.block).to(machine.device)
        self.page_bytes = len(self.planes) * shape.block * shape.heads * shape.dim * 2
        self.bytes = count * self.page_bytes
        self.host = machine.pinned(count, self.page_bytes)
        self.slots = torch.zeros((count, self.page_bytes), dtype=torch.uint8, device=machine.device)
        self.piece = max(1, min(count, PIECE_BYTES // self.page_bytes))
        self.buffers = [self.slots.new_empty((self.piece, self.page_bytes)) for _ in range(2)]
        self.truth = self._truth()
        self._batch = _batch_copier(machine)

    def close(self) -> None:
        self.layers, self.planes, self.buffers = [], [], []
        if self.machine.is_cuda:
            torch.cuda.empty_cache()

    def engines(self) -> list[str]:
        return ["kernel", "staged"] + (["batch"] if self._batch else [])

    def run(self, engine: str, way: str) -> None:
        """Queue all pages, on the current stream (the staged way uses stream 2 beside it)."""
        {"kernel": self._kernel, "staged": self._staged, "batch": self._batched}[engine](way)

    def verify(self, engine: str, way: str) -> None:
        """Move the pages for once and compare. Raises BenchError where a byte is wrong."""
        if way == "to host":
            self.host.zero_()
        else:
            self.host.copy_(self.truth)
            for plane in self.planes:
                plane.zero_()
        with self.machine.on(0):
            self.run(engine, way)
        self.machine.wait()
        found = self.host if way == "to host" else self._truth()
        if not torch.equal(found, self.truth):
            raise harness.BenchError(f"{engine} {way}: wrong bytes")

    def _truth(self) -> torch.Tensor:
        """The pages as the twin packs them, on the CPU."""
        rows = torch.zeros((self.count, self.page_bytes), dtype=torch.uint8)
        planes = [plane.cpu() for plane in self.planes]
        kernels.pack_units(planes, self.places.cpu(), rows, self.shape.block)
        return rows

    # --- the engines

    def _kernel(self, way: str) -> None:
        move = kernels.pack_units if way == "to host" else kernels.unpack_units
        move(self.planes, self.places, self.host, self.shape.block)

    def _staged(self, way: str) -> None:
        """Two buffers: while one is copied, the other is filled or emptied by the kernel, on stream 2."""
        machine, out = self.machine, way == "to host"
        ours = torch.cuda.current_stream() if machine.is_cuda else None
        helper = machine.streams[2]
        done = [None, None]
        for number, start in enumerate(range(0, self.count, self.piece)):
            end = min(start + self.piece, self.count)
            buffer, places = self.buffers[number % 2][: end - start], self.places[start:end]
            host = self.host[start:end]
            steps = (
                lambda b=buffer, p=places: kernels.pack_units(self.planes, p, b, self.shape.block),
                lambda b=buffer, h=host: h.copy_(b, non_blocking=True),
            ) if out else (
                lambda b=buffer, h=host: b.copy_(h, non_blocking=True),
                lambda b=buffer, p=places: kernels.unpack_units(self.planes, p, b, self.shape.block),
            )  # fmt: skip
            if not machine.is_cuda:
                steps[0]()
                steps[1]()
                continue
            if number == 0:
                helper.wait_stream(ours)
            first, second = (helper, ours) if out else (ours, helper)
            if done[number % 2] is not None:
                first.wait_event(done[number % 2])
            with torch.cuda.stream(first):
                steps[0]()
            second.wait_stream(first)
            with torch.cuda.stream(second):
                steps[1]()
                done[number % 2] = second.record_event()
        if machine.is_cuda:
            ours.wait_stream(helper)

    def _batched(self, way: str) -> None:
        self._batch(*self._pieces(way))

    def _pieces(self, way: str) -> tuple[list[int], list[int], list[int]]:
        size = self.page_bytes // len(self.planes)
        device, host = [], []
        for row, place in enumerate(self.places[:, 0].tolist()):
            for number, plane in enumerate(self.planes):
                block = place // self.shape.block
                device.append(plane.data_ptr() + block * plane.stride(0) * 2)
                host.append(self.host[row].data_ptr() + number * size)
        sizes = [size] * len(host)
        return (host, device, sizes) if way == "to host" else (device, host, sizes)

    # --- within the device

    def gather(self) -> None:
        kernels.pack_units(self.planes, self.places, self.slots, self.shape.block)

    def scatter(self) -> None:
        kernels.unpack_units(self.planes, self.places, self.slots, self.shape.block)

    def plain_copy(self) -> None:
        if not hasattr(self, "_other"):
            self._other = torch.empty_like(self.slots)
        self._other.copy_(self.slots)

    def hash(self) -> None:
        if not hasattr(self, "_sums"):
            self._sums = torch.zeros(self.count, dtype=torch.int64, device=self.machine.device)
        kernels.hash_rows(self.slots, self.page_bytes, self._sums)

    def quantised(self, codec: str):
        """Work that quantises the pages into rows on the device, and work that brings them back."""
        size = kernels.quantised_bytes(self.page_bytes // 2, codec)
        rows = self.slots.new_empty((self.count, size))
        refused = torch.zeros(self.count, dtype=torch.int32, device=self.machine.device)
        page = (self.shape.block, len(self.planes), 0)

        def into() -> None:
            kernels.quantise_units(self.planes, self.places, rows, codec, page=page, refused=refused)

        def out_of() -> None:
            kernels.dequantise_units(self.planes, self.places, rows, codec, page=page)

        return into, out_of


def _batch_copier(machine: Machine):
    """Copies by address in one call; None where the runtime has none."""
    if machine.is_cuda:
        from hicache.device.cudart import Cudart

        runtime = Cudart()
        if not runtime.has_batch:
            return None
        return lambda *columns: runtime.copy_batch(*columns, torch.cuda.current_stream().cuda_stream)

    def one_by_one(targets, sources, sizes) -> None:
        for target, source, size in zip(targets, sources, sizes, strict=True):
            ctypes.memmove(target, source, size)

    return one_by_one
