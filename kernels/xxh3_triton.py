"""Triton: xxh3-64 of rows, in two launches (sums of blocks, chains through them). Twin, bytes, floor: ``xxh3.py``.

Rows are given as a table of int64 addresses on the device, multiples of 8. ``scratch`` takes
``rows * (blocks + 1) * 64`` bytes. Launches go to torch's current stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Blocks of 1,024 bytes that one program sums.
_SUM_BLOCKS = 16
#: Rows of one program of the chains: four rows of eight lanes are a warp.
_CHAIN_ROWS = 4
#: Blocks whose sums are loaded ahead of the chain, in short rows and in long ones: a trip to memory costs as much as
#: ten steps of the chain, so it is made once in so many.
_AHEAD_SHORT, _AHEAD_LONG = 8, 32


@triton.jit
def _words(address):
    return tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 8)


@triton.jit(do_not_specialize=["table", "rows", "scratch", "block_count", "stripes"])
def _sum_blocks(
    table: tl.int64, rows: tl.int64, scratch: tl.int64, block_count, stripes, BLOCKS: tl.constexpr
):
    row = tl.program_id(0)
    number = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None, None]
    stripe = tl.arange(0, 16)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]
    base = _words(tl.load(_words(rows) + row))
    inside = (number * 16 + stripe) < stripes
    at = number.to(tl.int64) * 128 + stripe * 8
    data = tl.load(base + at + lane, mask=inside, other=0).to(tl.uint64, bitcast=True)
    beside = tl.load(base + at + (lane ^ 1), mask=inside, other=0).to(tl.uint64, bitcast=True)
    keyed = data ^ tl.load(_words(table) + stripe + lane).to(tl.uint64, bitcast=True)
    added = tl.where(inside, (keyed & 0xFFFFFFFF) * (keyed >> 32) + beside, 0)
    sums = tl.sum(added, 1).to(tl.int64, bitcast=True)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    target = _words(scratch) + (row.to(tl.int64) * block_count + block) * 8 + tl.arange(0, 8)[None, :]
    tl.store(target, sums, mask=(block < block_count) & (tl.arange(0, 8)[None, :] < 8))


@triton.jit
def _fold(a, b):
    a_low = a & 0xFFFFFFFF
    a_high = a >> 32
    b_low = b & 0xFFFFFFFF
    b_high = b >> 32
    low = a_low * b_low
    cross = a_high * b_low
    middle = (low >> 32) + (cross & 0xFFFFFFFF) + a_low * b_high
    high = (cross >> 32) + (middle >> 32) + a_high * b_high
    return ((middle << 32) | (low & 0xFFFFFFFF)) ^ high


@triton.jit
def _scramble(lanes, key):
    return (lanes ^ (lanes >> 47) ^ key) * 0x9E3779B1  # a constant of 32 bits: two products, not four


@triton.jit(do_not_specialize=["table", "rows", "scratch", "out", "row_count", "row_words", "block_count"])
def _chain_rows(
    table: tl.int64,
    rows: tl.int64,
    scratch: tl.int64,
    out: tl.int64,
    row_count,
    row_words,
    block_count,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = (row < row_count)[:, None]
    lane = tl.arange(0, 8)[None, :]
    look = _words(table)
    scramble = tl.load(look + 16 + lane).to(tl.uint64, bitcast=True)
    sums = _words(scratch) + row.to(tl.int64)[:, None] * block_count * 8 + lane
    lanes = tl.load(look + 40 + lane + row[:, None] * 0).to(tl.uint64, bitcast=True)
    whole = (block_count - 1) // AHEAD * AHEAD
    for start in range(
        0, whole, AHEAD
    ):  # the loads do not wait for the chain, so they are under way together
        for ahead in tl.static_range(AHEAD):
            added = tl.load(sums + (start + ahead) * 8, mask=here, other=0)
            lanes = _scramble(lanes + added.to(tl.uint64, bitcast=True), scramble)
    for ahead in tl.static_range(AHEAD):
        inside = here & (row[:, None] * 0 + whole + ahead < block_count - 1)
        added = tl.load(sums + (whole + ahead) * 8, mask=inside, other=0).to(tl.uint64, bitcast=True)
        lanes = tl.where(inside, _scramble(lanes + added, scramble), lanes)
    lanes += tl.load(sums + (block_count - 1) * 8, mask=here, other=0).to(tl.uint64, bitcast=True)
    base = _words(tl.load(_words(rows) + row, mask=row < row_count, other=0))
    last = base[:, None] + (row_words - 8)
    data = tl.load(last + lane, mask=here, other=0).to(tl.uint64, bitcast=True)
    lanes += tl.load(last + (lane ^ 1), mask=here, other=0).to(tl.uint64, bitcast=True)
    data = data ^ tl.load(look + 24 + lane).to(tl.uint64, bitcast=True)
    lanes += (data & 0xFFFFFFFF) * (data >> 32)
    lanes = lanes ^ tl.load(look + 32 + lane).to(tl.uint64, bitcast=True)
    found = tl.load(look + 49).to(tl.uint64, bitcast=True) * (row_words * 8).to(tl.uint64)
    found += tl.zeros([ROWS], tl.uint64)
    for pair in tl.static_range(4):
        first = tl.sum(tl.where(lane == 2 * pair, lanes, 0), 1)
        second = tl.sum(tl.where(lane == 2 * pair + 1, lanes, 0), 1)
        found += _fold(first, second)
    found = (found ^ (found >> 37)) * tl.load(look + 50).to(tl.uint64, bitcast=True)
    found = found ^ (found >> 32)
    tl.store(_words(out) + row, found.to(tl.int64, bitcast=True), mask=row < row_count)


def scratch_bytes(rows, row_bytes):
    """What ``hash_rows`` needs beside the rows."""
    return rows * ((row_bytes - 1) // 1024 + 1) * 64


def hash_rows(table, rows, row_count, row_bytes, *, scratch, out):
    """Launch both. All but the sizes are addresses on the device; table: ``xxh3.constants``; out: int64 [rows]."""
    if not row_count:
        return
    blocks = (row_bytes - 1) // 1024 + 1
    sizes = (blocks, (row_bytes - 1) // 64)
    grid = (row_count, -(-blocks // _SUM_BLOCKS))
    _sum_blocks[grid](table, rows, scratch, *sizes, BLOCKS=_SUM_BLOCKS)
    _chain_rows[(-(-row_count // _CHAIN_ROWS),)](
        table,
        rows,
        scratch,
        out,
        row_count,
        row_bytes // 8,
        blocks,
        ROWS=_CHAIN_ROWS,
        AHEAD=_AHEAD_LONG if blocks > _AHEAD_LONG else _AHEAD_SHORT,
        num_warps=1,
    )
