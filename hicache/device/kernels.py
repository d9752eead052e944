"""The door to ``kernels/``: one typed wrapper a kernel, loaded when it is first called.

``kernels/`` travels inside the package as ``_kernels`` and stands at the top of a checkout; it is loaded by
file location, so that both work alike. What each kernel does is said beside it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from hicache.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hicache.device.copying.cuda_seam import Coding
    from hicache.device.driver import UnitMove

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels")
#: Triton even where tensors are not on a GPU: for its interpreter (TRITON_INTERPRET=1).
FUSED = False


def gather_pages(pool: Tensor, indices: Tensor, out: Tensor) -> None:
    """``out[i] = pool[indices[i]]``."""
    _load("pages").gather_pages(pool, indices, out)


def scatter_pages(staging: Tensor, pool: Tensor, indices: Tensor) -> None:
    """``pool[indices[i]] = staging[i]``."""
    _load("pages").scatter_pages(staging, pool, indices)


def pack_layers(layers: Sequence[Tensor], blocks: Tensor, out: Tensor) -> None:
    """Layer-first paged KV to page-first pages."""
    _load("pages").pack_layers(layers, blocks, out)


def unpack_layers(pages: Tensor, layers: Sequence[Tensor], blocks: Tensor) -> None:
    """Page-first pages back to layer-first paged KV."""
    _load("pages").unpack_layers(pages, layers, blocks)


# --- engine's paged KV and pages: see kernels/paged.py for planes, places and rows


def planes(layer: Tensor, layout: str) -> list[Tensor]:
    """The planes ``[blocks, block, heads, dim]`` of one layer's tensor; ``kernels/paged.py`` lists the layouts."""
    found: list[Tensor] = _load("paged").planes(layer, layout)
    return found


def places_of_blocks(blocks: Tensor, block_tokens: int, page_tokens: int) -> Tensor:
    """Where the units of pages lie that are whole blocks, or whole parts of one."""
    return cast("Tensor", _load("paged").places_of_blocks(blocks, block_tokens, page_tokens))


def pack_units(
    planes: Sequence[Tensor], places: Tensor, rows: Tensor, page_tokens: int, first: int = 0
) -> None:
    """Engine to rows, whole pages or some of their layers. By Triton on a GPU, by the twin elsewhere."""
    _move_units("pack", planes, places, rows, (page_tokens, first))


def unpack_units(
    planes: Sequence[Tensor], places: Tensor, rows: Tensor, page_tokens: int, first: int = 0
) -> None:
    """Rows to engine, the inverse of ``pack_units``."""
    _move_units("unpack", planes, places, rows, (page_tokens, first))


def _move_units(
    name: str, planes: Sequence[Tensor], places: Tensor, rows: Tensor, page: tuple[int, int]
) -> None:
    paged = _load("paged")
    if not _fused(rows) and not _fused(planes[0] if planes else rows):
        getattr(paged, name)(planes, places, rows, *page)
        return
    geometry = paged.check(planes, places, rows, *page)
    where, tables, aligned_to = _tables(planes, places, rows)
    launch = _load("paged_triton").move_units
    launch(geometry, where, aligned_to=aligned_to, pack=name == "pack", host_rows=not rows.is_cuda)
    del tables  # torch's allocator reuses their memory in stream order


def quantise_units(
    planes: Sequence[Tensor],
    places: Tensor,
    rows: Tensor,
    codec: str,
    *,
    page: tuple[int, int, int],
    refused: Tensor,
) -> None:
    """Engine to quantised rows. page: (page_tokens, planes of a page, the first one given).

    refused: int32 ``[pages]``, becomes 1 for pages that cannot be quantised. See ``kernels/quant.py``.
    """
    paged, quant = _load("paged"), _load("quant")
    geometry = _check_quantised(planes, places, rows, codec, page)
    page_tokens, count, _ = page
    if not _fused(rows):
        if len(planes) != count:
            raise ValueError(f"the twin must be given all {count} planes")
        raw = rows.new_empty((geometry.pages, count * geometry.plane_bytes))
        paged.pack(planes, places, raw, page_tokens)
        quant.encode(raw.view(planes[0].dtype), codec, rows, refused)
        return
    (at_planes, at_places, at_rows, number), tables, aligned_to = _tables(planes, places, rows)
    launch = _load("quant_triton")
    launch.encode(
        geometry,
        (at_planes, at_places, at_rows, refused.data_ptr(), number),
        codec,
        page_planes=count,
        half=quant.is_half(planes[0].dtype),
        least=quant.FP8_LEAST[planes[0].dtype],
        run=_load("paged_triton").Run.of(geometry, 2, widest=2),
        aligned=_load("paged_triton").Run.of(geometry, aligned_to).aligned,
    )
    del tables


def dequantise_units(
    planes: Sequence[Tensor], places: Tensor, rows: Tensor, codec: str, *, page: tuple[int, int, int]
) -> None:
    """Quantised rows to engine; arguments as ``quantise_units``."""
    paged, quant = _load("paged"), _load("quant")
    geometry = _check_quantised(planes, places, rows, codec, page)
    page_tokens, count, _ = page
    if not _fused(rows):
        raw = rows.new_empty((geometry.pages, count * geometry.plane_bytes))
        quant.decode(rows, codec, raw.view(planes[0].dtype))
        given = raw[:, geometry.first_byte : geometry.first_byte + len(planes) * geometry.plane_bytes]
        paged.unpack(planes, places, given, page_tokens)
        return
    where, tables, aligned_to = _tables(planes, places, rows)
    _load("quant_triton").decode(
        geometry,
        where,
        codec,
        page_planes=count,
        half=quant.is_half(planes[0].dtype),
        run=_load("paged_triton").Run.of(geometry, 2, widest=2),
        aligned=_load("paged_triton").Run.of(geometry, aligned_to).aligned,
    )
    del tables


def quantised_bytes(numbers: int, codec: str) -> int:
    """Bytes of a quantised page of so many numbers."""
    return int(_load("quant").row_bytes(numbers, codec))


def check_quantised(dtype: torch.dtype, codec: str, unit_numbers: int) -> None:
    """ValueError for numbers that no such codec quantises."""
    _load("quant").check(dtype, codec, unit_numbers)


def encode_rows(numbers: Tensor, codec: str, rows: Tensor, refused: Tensor) -> None:
    """Pages of numbers to quantised rows, by the twin; refused as ``quantise_units``."""
    _load("quant").encode(numbers, codec, rows, refused)


def decode_rows(rows: Tensor, codec: str, numbers: Tensor) -> None:
    """The inverse, by the twin."""
    _load("quant").decode(rows, codec, numbers)


def word_dtype(width: int) -> torch.dtype:
    """The integers of so many bytes, as which elements are moved."""
    return cast("torch.dtype", _load("paged").WORDS[width])


def hash_rows(rows: Tensor, row_bytes: int, out: Tensor) -> None:
    """``out[i]`` = xxh3-64 of the first ``row_bytes`` of row i. By Triton on a GPU, by the twin elsewhere."""
    twin = _load("xxh3")
    if not _fused(rows):
        twin.hash_rows(rows, row_bytes, out)
        return
    twin.check(rows, row_bytes, out)
    launch = _load("xxh3_triton")
    constants, table = _constants(rows.device), _addresses(rows, rows.device)
    scratch = rows.new_empty(launch.scratch_bytes(len(rows), row_bytes))
    launch.hash_rows(
        constants.data_ptr(),
        table.data_ptr(),
        len(rows),
        row_bytes,
        scratch=scratch.data_ptr(),
        out=out.data_ptr(),
    )


def can_hash(row_bytes: int) -> bool:
    """Whether ``hash_rows`` takes rows of this size."""
    return bool(_load("xxh3").can_hash(row_bytes))


# --- the same by address, for rows that no tensor holds; launched on torch's current stream


def move_rows_at(targets: int, sources: int, rows: int, row_bytes: int, aligned_to: int) -> None:
    """Copy rows; targets and sources: addresses of int64 tables on the device."""
    _load("paged_triton").move_rows(targets, sources, rows, row_bytes, aligned_to=aligned_to)


def move_units_at(move: UnitMove, *, pack: bool) -> None:
    """Between planes and rows; see UnitMove."""
    tables = (move.planes, move.places, move.rows, move.plane_count)
    _load("paged_triton").move_units(
        _geometry(move), tables, aligned_to=move.aligned_to, pack=pack, host_rows=move.host_rows
    )


def encode_units_at(move: UnitMove, coding: Coding, refused: int) -> None:
    """Planes to quantised rows, which begin where whole pages do. refused: address of int32 ``[pages]``."""
    quant, geometry = _load("quant"), _geometry(move, coding.first_plane)
    dtype = _dtype(coding.dtype)
    tables = (move.planes, move.places, move.rows, refused, move.plane_count)
    least = quant.FP8_LEAST[dtype]
    _load("quant_triton").encode(
        geometry, tables, coding.codec, least=least, **_coding(geometry, move, coding)
    )


def decode_units_at(move: UnitMove, coding: Coding) -> None:
    """Quantised rows to planes; arguments as ``encode_units_at``."""
    geometry = _geometry(move, coding.first_plane)
    tables = (move.planes, move.places, move.rows, move.plane_count)
    _load("quant_triton").decode(geometry, tables, coding.codec, **_coding(geometry, move, coding))


def _coding(geometry: Any, move: UnitMove, coding: Coding) -> dict[str, Any]:
    run = _load("paged_triton").Run
    return {
        "page_planes": coding.page_planes,
        "half": _load("quant").is_half(_dtype(coding.dtype)),
        "run": run.of(geometry, 2, widest=2),
        "aligned": run.of(geometry, move.aligned_to).aligned,
    }


def _dtype(name: str) -> torch.dtype:
    import torch

    return cast("torch.dtype", getattr(torch, name))


def _geometry(move: UnitMove, first_plane: int = 0) -> Any:
    plane_bytes = move.units * move.unit_tokens * move.heads * move.head_size * move.element_bytes
    return _load("paged").Geometry(
        pages=move.pages,
        units=move.units,
        unit_tokens=move.unit_tokens,
        block=move.block_tokens,
        heads=move.heads,
        dim=move.head_size,
        width=move.element_bytes,
        strides=move.strides,
        first_byte=first_plane * plane_bytes,
    )


def hash_rows_at(constants: int, table: int, rows: int, row_bytes: int, *, scratch: int, out: int) -> None:
    """As ``hash_rows``; everything but the sizes is an address on the device."""
    _load("xxh3_triton").hash_rows(constants, table, rows, row_bytes, scratch=scratch, out=out)


def hash_constants() -> Tensor:
    """The table that ``hash_rows_at`` looks things up in, on the host."""
    return cast("Tensor", _load("xxh3").constants())


def hash_scratch_bytes(rows: int, row_bytes: int) -> int:
    """What ``hash_rows_at`` needs beside the rows."""
    return rows * ((row_bytes - 1) // 1024 + 1) * 64


def launch_errors() -> tuple[type[Exception], ...]:
    """What a launch may raise: Triton's own, and those of the compilers that it calls."""
    from triton.errors import TritonError

    return (TritonError, RuntimeError, OSError, ValueError, subprocess.SubprocessError)


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


# --- inside


def _check_quantised(
    planes: Sequence[Tensor], places: Tensor, rows: Tensor, codec: str, page: tuple[int, int, int]
) -> Any:
    """The geometry of the page before; rows are as long as the codec says."""
    quant, (page_tokens, count, first) = _load("quant"), page
    geometry = _load("paged").measure(planes, places, page_tokens, first)
    quant.check(planes[0].dtype, codec, geometry.unit_bytes // 2)
    wanted = (geometry.pages, quant.row_bytes(count * geometry.plane_bytes // 2, codec))
    if rows.shape != wanted or rows.stride(1) != 1 or first + len(planes) > count:
        raise ValueError(f"rows of {codec} must be {list(wanted)} for {count} planes, not {list(rows.shape)}")
    return geometry


def _fused(tensor: Tensor) -> bool:
    return FUSED or tensor.is_cuda


def _addresses(rows: Tensor, device: torch.device) -> Tensor:
    """Where the rows lie, as a table on the device; made there, since a copy of it would wait."""
    import torch

    step = torch.arange(len(rows), dtype=torch.int64, device=device)
    return step * rows.stride(0) + rows.data_ptr()


@functools.lru_cache(maxsize=512)
def _pointers(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """A table on the device. An engine's layers stay where they are, so it is made once."""
    import torch

    return torch.tensor(pointers, dtype=torch.int64).to(device)


@functools.lru_cache(maxsize=16)
def _constants(device: torch.device) -> Tensor:
    return hash_constants().to(device)


def _tables(
    planes: Sequence[Tensor], places: Tensor, rows: Tensor
) -> tuple[tuple[int, int, int, int], tuple[Tensor, ...], int]:
    """Addresses for a launch, the tensors behind them, and what all addresses are a multiple of (up to 16)."""
    pointers = tuple(plane.data_ptr() for plane in planes)
    tables = (
        _pointers(pointers, places.device),
        places.contiguous(),
        _addresses(rows, places.device),
    )
    aligned_to = math.gcd(16, *pointers, rows.data_ptr(), rows.stride(0))
    at_planes, at_places, at_rows = (table.data_ptr() for table in tables)
    return (at_planes, at_places, at_rows, len(planes)), tables, aligned_to


@functools.cache
def _load(name: str) -> ModuleType:
    """A module of kernels/. Raises ConfigError where neither folder has it."""
    for folder in FOLDERS:
        path = folder / f"{name}.py"
        if not path.is_file():
            continue
        spec = importlib.util.spec_from_file_location(f"hicache_kernels_{name}", path)
        assert spec is not None and spec.loader is not None, path
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    raise ConfigError(
        f"the kernels are missing: no {name}.py in {' or '.join(map(str, FOLDERS))}",
        hint="install hicache from a wheel, or keep kernels/ beside hicache/ in a checkout",
    )
