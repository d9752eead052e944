"""Triton: between an engine's paged KV and page-first rows, and rows to rows. The twin is ``paged.py``.

Addresses come in tables of int64 on the device, so one launch serves any number of layers, segments and host
buffers; a row may lie in pinned, mapped host memory. Launches go to torch's current stream. Programs walk over the
work in steps of their number, so ``programs`` bounds the multiprocessors that a copy takes from others.

Bytes: each byte once in and once out; beside it 8 bytes a program step for each table entry read (cached). Floor:
the slower of the link and 2 * bytes / memory bandwidth. Words are the widest of 8 bytes or less that every address
and stride allows; where all are multiples of 16 the compiler is told and moves 16 bytes a thread.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl

#: Words a program moves in one step, and warps, within the device: enough programs to fill its memory's width.
BLOCK, WARPS, PROGRAMS = 2048, 4, 512
#: The same where rows lie in host memory. The link needs about 110 KiB under way (55 GB/s times 2 us); a program on a
#: multiprocessor is in the way of compute there, so they are few, each with much under way.
HOST_BLOCK, HOST_WARPS, HOST_PROGRAMS = 4096, 16, 16
#: What launches differ in and kernels need not be compiled anew for: each of them costs a second when it is first met.
_ANY_UNITS = ["planes", "places", "rows", "steps", "plane_count", "chunks", "first_word"]
_ANY_ROWS = ["targets", "sources", "steps", "chunks"]


@triton.jit
def _typed(address, WORD: tl.constexpr):
    if WORD == 8:
        found = address.to(tl.pointer_type(tl.int64))
    elif WORD == 4:
        found = address.to(tl.pointer_type(tl.int32))
    elif WORD == 2:
        found = address.to(tl.pointer_type(tl.int16))
    else:
        found = address.to(tl.pointer_type(tl.int8))
    return found


@triton.jit(do_not_specialize=_ANY_UNITS)
def _move_units(
    planes: tl.int64,  # address of int64 [planes]: where each plane lies
    places: tl.int64,  # address of int64 [pages * units]
    rows: tl.int64,  # address of int64 [pages]: where each row lies
    steps,  # pages * units * planes * chunks
    unit_count,  # of a page
    plane_count,
    chunks,  # of a unit
    block,  # tokens
    block_stride,  # these and all below in words
    token_stride,
    first_word,
    UNIT: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    STRIDE_T: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_D: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    table_planes = planes.to(tl.pointer_type(tl.int64))
    table_places = places.to(tl.pointer_type(tl.int64))
    table_rows = rows.to(tl.pointer_type(tl.int64))
    for step in range(tl.program_id(0), steps, tl.num_programs(0)):
        chunk = step % chunks
        plane = (step // chunks) % plane_count
        unit = step // chunks // plane_count
        place = tl.load(table_places + unit)
        word = chunk * BLOCK + tl.arange(0, BLOCK)
        moves = word < tl.where(place >= 0, UNIT, 0)
        inside = (word // (H * D)) * STRIDE_T + ((word // D) % H) * STRIDE_H + (word % D) * STRIDE_D
        start = (place // block) * block_stride + (place % block) * token_stride
        at_row = (
            first_word + (plane * unit_count + unit % unit_count).to(tl.int64) * UNIT
        )  # the unit's first word in its row
        engine = _typed(tl.load(table_planes + plane), WORD) + start
        row = _typed(tl.load(table_rows + unit // unit_count), WORD) + at_row
        if ALIGNED:  # said of the pointers, since the compiler may fold what they are made of
            engine = tl.multiple_of(engine, 16)
            row = tl.multiple_of(row, 16)
        if PACK:
            tl.store(row + word, tl.load(engine + inside, mask=moves), mask=moves)
        else:
            tl.store(engine + inside, tl.load(row + word, mask=moves), mask=moves)


@triton.jit(do_not_specialize=_ANY_ROWS)
def _move_rows(
    targets: tl.int64,  # address of int64 [rows]
    sources: tl.int64,  # address of int64 [rows]
    steps,
    chunks,
    words,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for step in range(tl.program_id(0), steps, tl.num_programs(0)):
        row = step // chunks
        start = (step % chunks) * BLOCK
        # the step into the row is added here, so that what is said of the pointers stays with them: of what comes
        # out of a function, Triton 3.6 forgets it
        target = _typed(tl.load(targets.to(tl.pointer_type(tl.int64)) + row), WORD) + start
        source = _typed(tl.load(sources.to(tl.pointer_type(tl.int64)) + row), WORD) + start
        if ALIGNED:
            target = tl.multiple_of(target, 16)
            source = tl.multiple_of(source, 16)
        word = tl.arange(0, BLOCK)
        inside = word < words - start
        tl.store(target + word, tl.load(source + word, mask=inside), mask=inside)


def move_units(geometry, tables, *, aligned_to, pack, host_rows=True):
    """Launch pack (engine to rows) or unpack.

    geometry: ``paged.Geometry``. tables: addresses of (planes, places, rows) and the number of planes.
    aligned_to: what every address is a multiple of, in bytes; ValueError where that is no whole element.
    host_rows: whether rows lie in host memory.
    """
    planes, places, rows, plane_count = tables
    run = Run.of(geometry, aligned_to)
    unit = run.t * run.h * run.d
    most, warps, programs = (HOST_BLOCK, HOST_WARPS, HOST_PROGRAMS) if host_rows else (BLOCK, WARPS, PROGRAMS)
    block = min(most, max(16, triton.next_power_of_2(unit)))
    chunks = -(-unit // block)
    steps = geometry.pages * geometry.units * plane_count * chunks
    if not steps:
        return
    _move_units[(min(steps, programs),)](
        planes,
        places,
        rows,
        steps,
        geometry.units,
        plane_count,
        chunks,
        geometry.block,
        run.block_stride,
        run.token_stride,
        geometry.first_byte // run.word,
        UNIT=unit,
        H=run.h,
        D=run.d,
        STRIDE_T=run.stride_t,
        STRIDE_H=run.stride_h,
        STRIDE_D=run.stride_d,
        WORD=run.word,
        ALIGNED=run.aligned,
        PACK=pack,
        BLOCK=block,
        num_warps=warps if block == most else WARPS,
    )


def move_rows(targets, sources, rows, row_bytes, *, aligned_to):
    """Launch ``rows`` copies of ``row_bytes``; targets and sources: addresses of int64 tables on the device.

    Programs are those for host memory, to or from which rows go, at once or a copy later.
    """
    word = next(width for width in (8, 4, 2, 1) if not (aligned_to % width or row_bytes % width))
    words = row_bytes // word
    if not rows or not words:
        return
    block = min(HOST_BLOCK, max(16, triton.next_power_of_2(words)))
    chunks = -(-words // block)
    _move_rows[(min(rows * chunks, HOST_PROGRAMS),)](
        targets,
        sources,
        rows * chunks,
        chunks,
        words,
        WORD=word,
        ALIGNED=word == 8 and not (aligned_to % 16 or row_bytes % 16),
        BLOCK=block,
        num_warps=HOST_WARPS if block == HOST_BLOCK else WARPS,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """How a unit lies in its plane: (tokens, heads, dim) with neighbours without a gap made one, in words."""

    t: int
    h: int
    d: int
    stride_t: int
    stride_h: int
    stride_d: int
    block_stride: int
    token_stride: int  # of the plane: where a unit starts
    word: int  # bytes
    aligned: bool  # whether everything is a multiple of 16 bytes, too

    @classmethod
    def of(cls, geometry, aligned_to, *, widest=8):
        """With the widest words that every address, run and stride allows."""
        t, h, d = geometry.unit_tokens, geometry.heads, geometry.dim
        block, stride_t, stride_h, stride_d = (stride * geometry.width for stride in geometry.strides)
        token, width = stride_t, geometry.width
        if aligned_to % width:
            raise ValueError(f"addresses must be whole elements of {width} bytes")
        if d == 1:
            stride_d = width
        if stride_d != width:  # nothing lies side by side
            if h == 1:
                stride_h = 0
            sizes = (t, h, d, stride_t, stride_h, stride_d, block, token)
            return cls(*sizes[:3], *(stride // width for stride in sizes[3:]), word=width, aligned=False)
        d *= width
        if h == 1 or stride_h == d:
            h, d, stride_h = 1, h * d, 0
        if t == 1 or (h == 1 and stride_t == d):
            t, d, stride_t = (1, t * d, 0) if h == 1 else (1, d, 0)
        start = token if geometry.block > 1 else 0  # units may start at any token of a block
        steps = (d, stride_t, stride_h, block, start, aligned_to, geometry.first_byte)
        word = next(size for size in (widest, 4, 2, 1) if not any(step % size for step in steps))
        strides = (stride_t // word, stride_h // word, 1, block // word, token // word)
        return cls(t, h, d // word, *strides, word, word == 8 and not any(step % 16 for step in steps))
