"""Between an engine's paged KV, layer first, and pages, page first: the words, the checks and the torch twin.

*A plane* is one kind of vector of one layer (its keys, its values, or MLA's latent), seen as
``[blocks, block, heads, dim]`` with any strides; ``planes`` makes them from the layouts engines use. *A token
place* is ``block * block_tokens + place in the block``. *A unit* is ``unit_tokens`` tokens of a page that lie
one after another in one block: units are what is moved, so a page may be larger or smaller than a block, start
in the middle of one, or lie token by token anywhere.

**A page's bytes are** ``[planes, page_tokens, heads, dim]``, **contiguous**, planes in the order of the
layers and within a layer keys before values: ``page_bytes = planes * page_tokens * heads * dim * element_size``.
*Rows* are pages or their slots, uint8 ``[pages, stride]``. A call may move some layers only: ``first_plane`` says
which of the page's planes the first one given is.

Bits travel as they are. A unit whose place is negative is skipped, on both sides. ValueError for shapes, dtypes
and sizes that do not go together, and nothing is written then; places and blocks out of range are undefined on a
GPU (a check would wait for the device).

Bytes: pack and unpack read and write each byte of the units once; the floor is two times
``units * unit_tokens * heads * dim * element_size * planes``, plus 8 bytes a unit, a page and a plane for tables.
The twin here passes each byte through temporaries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

#: Layouts of an engine's layer: the axes of its tensor, ``kv`` has two entries (keys, then values).
LAYOUTS = {
    "kv-nhd": "kv blocks block heads dim",
    "kv-hnd": "kv blocks heads block dim",
    "block-kv-nhd": "blocks kv block heads dim",
    "block-kv-hnd": "blocks kv heads block dim",
    "nhd": "blocks block heads dim",  # one tensor of keys, one of values
    "hnd": "blocks heads block dim",
    "tokens": "blocks heads dim",  # one tensor of keys, one of values; blocks of one token
    "latent": "blocks block dim",  # MLA
}
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What one call moves; made by ``check``. Sizes in tokens, bytes and elements."""

    pages: int
    units: int  # of a page
    unit_tokens: int
    block: int
    heads: int
    dim: int
    width: int  # bytes of an element
    strides: tuple[int, int, int, int]  # of a plane, in elements
    first_byte: int  # of the first plane, in a row

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit in one plane."""
        return self.unit_tokens * self.heads * self.dim * self.width

    @property
    def plane_bytes(self) -> int:
        """Bytes of a page in one plane."""
        return self.units * self.unit_bytes


def planes(layer: Tensor, layout: str) -> list[Tensor]:
    """The planes of one layer's tensor, as views. ValueError for an unknown layout or another number of axes."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    axes = LAYOUTS[layout].split()
    if layer.dim() != len(axes):
        raise ValueError(f"layout {layout!r} must be {axes}, not {list(layer.shape)}")
    parts = [layer]
    if "kv" in axes:
        at = axes.index("kv")
        if layer.shape[at] != 2:
            raise ValueError(f"layout {layout!r} must be {axes} with two kv, not {list(layer.shape)}")
        parts = list(layer.unbind(at))
        axes.remove("kv")
    order = [axes.index(axis) for axis in ("blocks", "block", "heads", "dim") if axis in axes]
    parts = [part.permute(order) for part in parts]
    for at, axis in ((1, "block"), (2, "heads")):
        if axis not in axes:
            parts = [part.unsqueeze(at) for part in parts]
    return parts


def check(planes: Sequence[Tensor], places: Tensor, rows: Tensor, page_tokens: int, first: int) -> Geometry:
    """See that a call's arguments go together; ``first`` is the page's plane that ``planes[0]`` is."""
    found = measure(planes, places, page_tokens, first)
    if rows.dim() != 2 or rows.dtype is not torch.uint8 or len(rows) != found.pages:
        raise ValueError(f"rows must be uint8 [{found.pages}, bytes], not {rows.dtype} {list(rows.shape)}")
    if rows.shape[1] < found.first_byte + len(planes) * found.plane_bytes or rows.stride(1) != 1:
        raise ValueError(f"rows must hold {len(planes)} planes from plane {first} on, not {list(rows.shape)}")
    return found


def measure(planes: Sequence[Tensor], places: Tensor, page_tokens: int, first: int) -> Geometry:
    """What a call moves, rows apart."""
    if not planes or planes[0].dim() != 4:
        raise ValueError("planes must be one or more [blocks, block, heads, dim]")
    one = planes[0]
    if any((p.shape, p.dtype, p.stride()) != (one.shape, one.dtype, one.stride()) for p in planes):
        raise ValueError("planes differ in shape, dtype or strides")
    if one.element_size() not in WORDS:
        raise ValueError(f"{one.dtype} is too wide")
    if places.dim() != 2 or places.dtype is not torch.int64:
        raise ValueError(f"places must be int64 [pages, units], not {places.dtype} {list(places.shape)}")
    pages, units = places.shape
    _, block, heads, dim = one.shape
    unit_tokens = page_tokens // units if units and not page_tokens % units else 0
    if not unit_tokens or block % unit_tokens:
        raise ValueError(f"{units} units must divide {page_tokens} tokens, and blocks of {block} into units")
    if first < 0:
        raise ValueError(f"the first plane must not be negative, not {first}")
    return Geometry(
        pages=pages,
        units=units,
        unit_tokens=page_tokens // units,
        block=block,
        heads=heads,
        dim=dim,
        width=one.element_size(),
        strides=one.stride(),
        first_byte=first * page_tokens * heads * dim * one.element_size(),
    )


def places_of_blocks(blocks: Tensor, block_tokens: int, page_tokens: int) -> Tensor:
    """Places of pages that are whole blocks, or whole parts of one.

    blocks: int ``[pages, page_tokens / block_tokens]`` in token order, or, where blocks are larger than pages,
    int ``[pages]`` counted in parts of ``page_tokens`` (block * (block_tokens / page_tokens) + part). A negative
    block is skipped. Returns int64 ``[pages, units]``.
    """
    if block_tokens <= page_tokens:
        if page_tokens % block_tokens or blocks.dim() != 2:
            raise ValueError(f"pages of {page_tokens} tokens must be whole blocks of {block_tokens}")
        return blocks.long() * block_tokens
    if block_tokens % page_tokens or blocks.dim() != 1:
        raise ValueError(f"blocks of {block_tokens} tokens must be whole pages of {page_tokens}")
    return (blocks.long() * page_tokens).view(-1, 1)


def pack(planes: Sequence[Tensor], places: Tensor, rows: Tensor, page_tokens: int, first: int = 0) -> None:
    """Engine to rows. places: int64 ``[pages, units]``, where each unit's first token lies."""
    geometry = check(planes, places, rows, page_tokens, first)
    if not geometry.pages:
        return
    block, place, keep = _spread(places, geometry)
    for number, plane in enumerate(planes):
        target = _columns(rows, geometry, number)
        found = _raw(plane)[block, place].contiguous().view(geometry.pages, geometry.units, -1)
        moved = found.view(torch.uint8).reshape(geometry.pages, geometry.units, -1)
        old = target.reshape(moved.shape)
        target.copy_(torch.where(keep, moved, old).view(target.shape))


def unpack(planes: Sequence[Tensor], places: Tensor, rows: Tensor, page_tokens: int, first: int = 0) -> None:
    """Rows to engine, the inverse of ``pack``; the places are all different."""
    geometry = check(planes, places, rows, page_tokens, first)
    if not geometry.pages:
        return
    block, place, keep = _spread(places, geometry)
    kept = keep.expand(-1, -1, geometry.unit_tokens).reshape(geometry.pages, -1)
    for number, plane in enumerate(planes):
        words = _columns(rows, geometry, number).contiguous().view(WORDS[geometry.width])
        source = words.view(geometry.pages, -1, geometry.heads, geometry.dim)
        _raw(plane)[block[kept], place[kept]] = source[kept]


def _spread(places: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Block and place of every token ``[pages, page_tokens]``, and which units are moved ``[pages, units, 1]``."""
    keep = (places >= 0).unsqueeze(2)
    inside = torch.arange(geometry.unit_tokens, device=places.device)
    tokens = (places.clamp(min=0).unsqueeze(2) + inside).reshape(geometry.pages, -1)
    return tokens // geometry.block, tokens % geometry.block, keep


def _columns(rows: Tensor, geometry: Geometry, number: int) -> Tensor:
    start = geometry.first_byte + number * geometry.plane_bytes
    return rows[:, start : start + geometry.plane_bytes]


def _raw(tensor: Tensor) -> Tensor:
    return tensor.view(WORDS[tensor.element_size()])
