"""A cache's tensors to pages and back.

A layer's keys, and its values, are ``[1, heads, tokens, dim]``. A page is ``[layers, 2, page_tokens, heads, dim]``,
contiguous, keys before values, as the kernels' pages are. Bits travel as they are. A cache is no paged KV: one
strided copy of each layer's keys, and of its values, moves a batch in one pass, where ``kernels.pack_layers``, which
wants both in one tensor, takes three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hicache.errors import CorruptError

if TYPE_CHECKING:
    from hicache.rpc.client import Lease

#: One layer's keys and values.
KeysValues: TypeAlias = tuple[Tensor, Tensor]

#: How much is packed or unpacked at a time; bounds the memory beside the cache itself.
BATCH_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class PageShape:
    """What a page is made of."""

    layers: int
    page_tokens: int
    heads: int
    dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """The size of one page."""
        return self.layers * 2 * self.page_tokens * self.heads * self.dim * self.dtype.itemsize

    @property
    def batch_pages(self) -> int:
        """How many pages are moved at a time."""
        return max(1, BATCH_BYTES // self.page_bytes)

    def empty(self, pages: int, device: torch.device) -> Tensor:
        """Uninitialised ``[pages, layers, 2, page_tokens, heads, dim]``."""
        size = (pages, self.layers, 2, self.page_tokens, self.heads, self.dim)
        return torch.empty(size, dtype=self.dtype, device=device)

    def paged(self, tensor: Tensor) -> Tensor:
        """A view of ``[heads, pages * page_tokens, dim]`` as ``[pages, page_tokens, heads, dim]``."""
        heads, tokens, dim = tensor.shape
        return tensor.view(heads, tokens // self.page_tokens, self.page_tokens, dim).permute(1, 2, 0, 3)


def page_rows(pages: Tensor) -> Tensor:
    """The bytes of pages in host memory, ``[pages, page_bytes]``; no copy."""
    assert pages.is_contiguous() and pages.device.type == "cpu"
    return pages.reshape(len(pages), -1).view(torch.uint8)


def pack(layers: Sequence[KeysValues], shape: PageShape, first_page: int, out: Tensor) -> None:
    """Fill ``out`` (as ``shape.empty`` makes it) with the cache's pages from ``first_page`` on."""
    begin, end = first_page * shape.page_tokens, (first_page + len(out)) * shape.page_tokens
    for number, pair in enumerate(layers):
        for which, tensor in enumerate(pair):
            out[:, number, which].copy_(shape.paged(tensor[0, :, begin:end]))


def unpack(pages: Tensor, shape: PageShape, first_page: int, layers: Sequence[KeysValues]) -> None:
    """Put pages to where they belong in the cache; the inverse of ``pack``."""
    begin, end = first_page * shape.page_tokens, (first_page + len(pages)) * shape.page_tokens
    for number, pair in enumerate(layers):
        for which, tensor in enumerate(pair):
            shape.paged(tensor[0, :, begin:end]).copy_(pages[:, number, which])


class PagePacker:
    """The pages of a cache as ``Reservation.store`` asks for them: one at a time, in order, from any first one."""

    def __init__(self, layers: Sequence[KeysValues], shape: PageShape, pages: int) -> None:
        self._layers = layers
        self._shape = shape
        self._pages = pages
        self._first = 0
        self._rows: Tensor | None = None  # the bytes of pages [first, first + len)

    def __call__(self, page: int, view: memoryview) -> None:
        """Copy a page's bytes into ``view``."""
        if self._rows is None or not self._first <= page < self._first + len(self._rows):
            self._rows = self._packed(page)
            self._first = page
        np.copyto(np.frombuffer(view, np.uint8), self._rows[page - self._first].numpy())

    def _packed(self, first: int) -> Tensor:
        pages = min(self._shape.batch_pages, self._pages - first)
        staging = self._shape.empty(pages, self._layers[0][0].device)
        pack(self._layers, self._shape, first, staging)
        return page_rows(staging.cpu())


class PageReader:
    """A lease's pages to keys and values. ``pages``: how many, from the first read, came whole and unchanged."""

    def __init__(self, shape: PageShape, device: torch.device) -> None:
        self.pages = 0
        self._shape = shape
        self._device = device
        self._layers: list[KeysValues] = []  # room for what is wanted, filled up to ``pages``

    def read(self, lease: Lease, first_page: int = 0, pages: int | None = None) -> None:
        """Copy pages out, checked, batch by batch; page by page where a batch has a corrupt one.

        ``pages`` None: all from ``first_page`` on. Raises what ended it before the last page: CorruptError,
        NotFoundError (it expired), StaleError.
        """
        assert not self._layers, "one lease"
        wanted = len(lease) - first_page if pages is None else pages
        assert wanted <= len(lease) - first_page, "no more than is granted"
        if wanted <= 0:
            return
        self._layers = [(self._room(wanted), self._room(wanted)) for _ in range(self._shape.layers)]
        step = min(wanted, self._shape.batch_pages)
        staging = self._shape.empty(step, torch.device("cpu"))
        while self.pages < wanted:
            count = min(step, wanted - self.pages)
            try:
                lease.copy_into(staging[:count], first_page + self.pages, count, verify="on-copy")
            except CorruptError:
                if count == 1:
                    raise
                step = 1
                continue
            unpack(staging[:count].to(self._device), self._shape, self.pages, self._layers)
            self.pages += count

    def layers(self) -> Iterator[KeysValues]:
        """Each layer's keys and values of the pages read, once; none where there are none."""
        tokens = self.pages * self._shape.page_tokens
        while self._layers and tokens:
            keys, values = self._layers.pop(0)
            yield keys[:, :, :tokens], values[:, :, :tokens]

    def _room(self, pages: int) -> Tensor:
        size = (1, self._shape.heads, pages * self._shape.page_tokens, self._shape.dim)
        return torch.empty(size, dtype=self._shape.dtype, device=self._device)
