"""A sidecar in a process of its own, host pools like SGLang's, and stand-ins for SGLang's classes."""

from __future__ import annotations

import dataclasses
import enum
import math
import mmap
import os
from typing import Any

import numpy as np
import torch


class ShmAllocator:
    """Tensors in memfds, as SGLang's ``shm`` allocator makes them: unsealed, mapped shared."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.mms: list[mmap.mmap] = []

    def allocate(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = -(-math.prod(dims) * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("pool", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size, mmap.MAP_SHARED)
        self.fds.append(fd)
        self.mms.append(mapping)
        return torch.frombuffer(mapping, dtype=dtype, count=math.prod(dims)).reshape(dims)


class PlainAllocator:
    """Tensors in private memory."""

    def allocate(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(dims, dtype=dtype)


class HostPool:
    """A host pool in the shape of SGLang's ``MHATokenToKVPoolHost``."""

    layer_num, head_num, head_dim, page_size, pages = 3, 2, 64, 16, 24

    def __init__(self, layout: str = "page_first", *, shm: bool = True, dtype: str = "float16") -> None:
        self.layout = layout
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.allocator: Any = ShmAllocator() if shm else PlainAllocator()
        row = (self.head_num, self.head_dim)
        size = self.pages * self.page_size
        dims = {
            "layer_first": (2, self.layer_num, size, *row),
            "page_first": (2, size, self.layer_num, *row),
            "page_first_direct": (2, self.pages, self.layer_num, self.page_size, *row),
        }[layout]
        self.kv_buffer = self.allocator.allocate(dims, self.dtype)
        self.fd = self.allocator.fds[0] if shm else None

    @property
    def page_bytes(self) -> int:
        return 2 * self.layer_num * self.page_size * self.head_num * self.head_dim * self.dtype.itemsize

    def _page(self, index: int) -> torch.Tensor:
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, index : index + self.page_size]
        if self.layout == "page_first":
            return self.kv_buffer[:, index : index + self.page_size]
        return self.kv_buffer[:, index // self.page_size]

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        assert flat
        return self._page(index).flatten()

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(self.page_bytes // self.dtype.itemsize, dtype=self.dtype)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        page = self._page(index)
        page.copy_(data_page.reshape(page.shape))

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        found = []
        for index in indices.tolist()[:: self.page_size]:
            page = self._page(index)
            pieces = (page[0], page[1])
            if self.layout == "layer_first":  # K and V of each layer in turn, as SGLang lists them
                pieces = tuple(page[side, layer] for layer in range(self.layer_num) for side in (0, 1))
            found += [(piece.data_ptr(), piece.numel() * piece.element_size()) for piece in pieces]
        return [address for address, _ in found], [size for _, size in found]

    # --- what tests do

    def indices(self, *pages: int) -> torch.Tensor:
        spans = [torch.arange(page * self.page_size, (page + 1) * self.page_size) for page in pages]
        return torch.cat(spans) if spans else torch.arange(0)

    def fill(self, *pages: int, seed: int = 0) -> list[bytes]:
        for page in pages:
            rng = np.random.default_rng([seed, page])
            raw = torch.from_numpy(rng.integers(0, 256, self.page_bytes, dtype=np.uint8))
            self.set_from_flat_data_page(page * self.page_size, raw.view(self.dtype))
        return self.read(*pages)

    def read(self, *pages: int) -> list[bytes]:
        return [
            self.get_data_page(page * self.page_size).view(torch.uint8).numpy().tobytes() for page in pages
        ]

    def wipe(self) -> None:
        self.kv_buffer.zero_()


class StatePool(HostPool):
    """A pool that does not say where its pages lie: flat pages only; 1 token a page, as for Mamba states."""

    page_size = 1

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        raise ValueError("zero-copy requires another layout")


@dataclasses.dataclass
class StorageConfig:
    """As SGLang's HiCacheStorageConfig."""

    extra_config: dict[str, Any] | None = None
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    is_mla_model: bool = False
    enable_storage_metrics: bool = True
    is_page_first_layout: bool = True
    model_name: str | None = "model"
    should_split_heads: bool = False
    dcp_size: int = 1
    dcp_rank: int = 0


class Storage:
    def register_mem_pool_host(self, pool: Any) -> None:
        self.mem_pool_host = pool

    def register_mem_host_pool_v2(self, pool: Any, name: Any) -> None:
        self.registered = name


@dataclasses.dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


@dataclasses.dataclass
class StorageMetrics:
    prefetch_pgs: list[int] = dataclasses.field(default_factory=list)
    backup_pgs: list[int] = dataclasses.field(default_factory=list)
    prefetch_bandwidth: list[float] = dataclasses.field(default_factory=list)
    backup_bandwidth: list[float] = dataclasses.field(default_factory=list)


class HitPolicy(str, enum.Enum):  # noqa: UP042  # as SGLang's: str() of it is not its value
    """As SGLang's PoolHitPolicy."""

    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclasses.dataclass
class Transfer:
    """As SGLang's PoolTransfer."""

    name: str
    host_indices: torch.Tensor | None = None
    keys: list[str] | None = None
    hit_policy: HitPolicy = HitPolicy.ALL_PAGES


def keys_of(*numbers: int) -> list[str]:
    """Keys as SGLang makes them: 64 hexadecimal digits."""
    return [f"{number:064x}" for number in numbers]
