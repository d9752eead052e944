"""An engine's paged KV on the CPU: tensors in shared memory, filled so that every element tells where it belongs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from hicache.device import kernels
from hicache.rpc.client import KvMemory

LAYERS, HEADS, DIM, PAGE_TOKENS = 4, 2, 8, 16
SHAPES = {
    "kv-nhd": "2 n b h d",
    "kv-hnd": "2 n h b d",
    "block-kv-hnd": "n 2 h b d",
    "nhd": "n b h d",
    "latent": "n b d",
}


@dataclasses.dataclass(frozen=True)
class Form:
    """How an engine lays its KV out."""

    layout: str
    block: int = PAGE_TOKENS
    blocks: int = 24
    layers: int = LAYERS
    dtype: Any = torch.bfloat16
    pairs: bool = False  # keys and values apart

    @property
    def planes_per_layer(self) -> int:
        return 1 if self.layout == "latent" else 2

    @property
    def page_bytes(self) -> int:
        heads = 1 if self.layout == "latent" else HEADS
        width = torch.empty(0, dtype=self.dtype).element_size()
        return self.layers * self.planes_per_layer * PAGE_TOKENS * heads * DIM * width

    @property
    def shape(self) -> list[int]:
        sizes = {"2": 2, "n": self.blocks, "b": self.block, "h": HEADS, "d": DIM}
        return [sizes[axis] for axis in SHAPES[self.layout].split()]


def namespace_fields(form: Form) -> dict[str, Any]:
    return {"model": "m", "page_bytes": form.page_bytes, "page_tokens": PAGE_TOKENS, "layers": form.layers}


class Engine:
    """Its tensors, in one memory."""

    def __init__(self, form: Form, seed: int = 0) -> None:
        self.form = form
        each = int(np.prod(form.shape)) * torch.empty(0, dtype=form.dtype).element_size() + 256
        self.memory = KvMemory(each * form.layers * (2 if form.pairs else 1))

        def tensor() -> Any:
            return self.memory.tensor(form.shape, form.dtype)

        self.tensors: list[Any] = [
            (tensor(), tensor()) if form.pairs else tensor() for _ in range(form.layers)
        ]
        if seed:
            generator = torch.Generator().manual_seed(seed)
            for plane in self.planes:
                plane.copy_(torch.randn(plane.shape, generator=generator).to(form.dtype))

    @property
    def planes(self) -> list[Any]:
        found = []
        for layer in self.tensors:
            parts = layer if self.form.pairs else [layer]
            found += [plane for part in parts for plane in kernels.planes(part, self.form.layout)]
        return found

    def bytes_of(self, places: Any) -> np.ndarray:
        """The pages at these places as the server stores them: uint8 [pages, page_bytes]."""
        rows = torch.zeros((len(places), self.form.page_bytes), dtype=torch.uint8)
        kernels.pack_units(self.planes, torch.from_numpy(places), rows, PAGE_TOKENS)
        return rows.numpy()

    def wipe(self) -> None:
        for plane in self.planes:
            plane.zero_()
