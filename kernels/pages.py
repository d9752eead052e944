"""Reference page kernels in torch: correct on every backend, the twin of the faster ones.

Two layouts meet here.

*Slots*, page first: a pool is ``[slots, ...]``, one row a slot.

*An engine's paged KV*, layer first: one tensor a layer, ``[2, blocks, block, heads, dim]`` (keys, then
values), ``block`` tokens in a block. A page is ``page_tokens = n * block`` tokens and lies in ``n`` blocks
anywhere. **A page's bytes are** ``[layers, 2, page_tokens, heads, dim]``, **contiguous**, in the dtype of the
layers: ``page_bytes = layers * 2 * page_tokens * heads * dim * element_size``.

Arguments may have any strides and any dtype of up to 8 bytes; nothing is converted, bits travel as they are
(NaNs too). Each docstring states the bytes read and written. ValueError for shapes and dtypes that do not go
together, and nothing is written then; an index out of range is the backend's error (IndexError on the CPU),
not checked here because a check would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Types that stand for raw words of their width.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def gather_pages(pool: Tensor, indices: Tensor, out: Tensor) -> None:
    """``out[i] = pool[indices[i]]``.

    pool ``[slots, ...]``, indices int ``[pages]`` (repeats are fine), out ``[pages, ...]`` apart from pool.
    Reads and writes ``pages`` rows once each.
    """
    _check_rows(out, pool, indices)
    if indices.numel():
        pool, out = _in_words(pool, out, widest=8)
        torch.index_select(pool, 0, indices, out=out)


def scatter_pages(staging: Tensor, pool: Tensor, indices: Tensor) -> None:
    """``pool[indices[i]] = staging[i]``.

    staging ``[pages, ...]``, pool ``[slots, ...]``, indices int ``[pages]``, all different (else any row may
    win). Reads and writes ``pages`` rows once each.
    """
    _check_rows(staging, pool, indices)
    if indices.numel():
        # index_copy_ moves element by element: 16 bytes a step are twice as fast as 8
        pool, staging = _in_words(pool, staging, widest=16)
        pool.index_copy_(0, indices.long(), staging)


def pack_layers(layers: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:
    """Layer-first paged KV to page-first pages.

    layers: each ``[2, blocks, block, heads, dim]``. blocks: int ``[pages, page_tokens / block]``, the pages'
    blocks in token order. out: ``[pages, layers, 2, page_tokens, heads, dim]``; rows of staging, viewed
    in the dtype, will do. Reads ``2 * pages * page_bytes`` and writes as many: each byte passes through a
    temporary of one layer's keys or values (``pages * page_bytes / (2 * layers)``).
    """
    pages = _check_layers(layers, blocks, out)
    flat = blocks.reshape(-1)
    for number, layer in enumerate(layers):
        for kv in range(2):
            source, target = _raw(layer)[kv], _raw(pages)[:, number, kv]
            target.copy_(torch.index_select(source, 0, flat).view(target.shape))


def unpack_layers(pages: Tensor, layers: Sequence[Tensor], blocks: Tensor) -> None:
    """Page-first pages back to layer-first paged KV; the inverse of ``pack_layers``.

    Shapes as there; the block numbers are all different. Blocks that are not named stay as they are.
    Reads and writes at most what ``pack_layers`` does.
    """
    split = _check_layers(layers, blocks, pages)
    flat = blocks.reshape(-1)
    for number, layer in enumerate(layers):
        for kv in range(2):
            source = _raw(split)[:, number, kv].reshape(len(flat), *layer.shape[2:])
            scatter_pages(source, _raw(layer)[kv], flat)


def _check_rows(rows: Tensor, pool: Tensor, indices: Tensor) -> None:
    if indices.dim() != 1 or indices.dtype not in {torch.int64, torch.int32}:
        raise ValueError(f"indices must be int32 or int64 [pages], not {indices.dtype} {list(indices.shape)}")
    wanted = (len(indices), *pool.shape[1:])
    if pool.dim() < 1 or rows.shape != wanted or rows.dtype != pool.dtype:
        raise ValueError(
            f"{len(indices)} pages of a pool {pool.dtype} {list(pool.shape)} are {list(wanted)},"
            f" not {rows.dtype} {list(rows.shape)}"
        )
    if pool.element_size() not in {1, 2, 4, 8}:
        raise ValueError(f"{pool.dtype} is too wide")


def _check_layers(layers: Sequence[Tensor], blocks: Tensor, pages: Tensor) -> Tensor:
    """The pages, their tokens split by block: ``[pages, layers, 2, n, block, heads, dim]``."""
    if blocks.dim() != 2 or blocks.dtype not in {torch.int64, torch.int32}:
        raise ValueError(f"blocks must be int32 or int64 [pages, n], not {blocks.dtype} {list(blocks.shape)}")
    if not layers or layers[0].dim() != 5 or layers[0].shape[0] != 2:
        raise ValueError("layers must be one or more [2, blocks, block, heads, dim]")
    first = layers[0]
    _, _, block, heads, dim = first.shape
    if any(layer.shape != first.shape or layer.dtype != first.dtype for layer in layers):
        raise ValueError("layers differ in shape or dtype")
    count, per_page = blocks.shape
    wanted = (count, len(layers), 2, per_page * block, heads, dim)
    if pages.shape != wanted or pages.dtype != first.dtype:
        raise ValueError(f"pages must be {first.dtype} {list(wanted)}, not {pages.dtype} {list(pages.shape)}")
    if first.element_size() not in {1, 2, 4, 8}:
        raise ValueError(f"{first.dtype} is too wide")
    return pages.view(count, len(layers), 2, per_page, block, heads, dim)


def _raw(tensor: Tensor) -> Tensor:
    """The same bytes as integers of the same width: every dtype is moved alike."""
    return tensor.view(WORDS[tensor.element_size()])


def _in_words(first: Tensor, second: Tensor, widest: int) -> tuple[Tensor, Tensor]:
    """Two tensors of one dtype as raw words, the widest of at most ``widest`` bytes that fit both."""
    width = widest
    while width > first.element_size() and not (_fits(first, width) and _fits(second, width)):
        width //= 2
    word = WORDS[width]
    return _raw(first).view(word), _raw(second).view(word)


def _fits(tensor: Tensor, width: int) -> bool:
    """Whether rows of the tensor are whole, aligned words of ``width`` bytes."""
    ratio = width // tensor.element_size()
    if tensor.dim() < 2 or tensor.stride(-1) != 1 or tensor.data_ptr() % width:
        return False
    steps = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return not any(step % ratio for step in steps)
