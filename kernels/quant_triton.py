"""Triton: engine's paged KV to quantised rows and back, fused with the gather. Twin, bytes, bounds: ``quant.py``.

Every float32 operation is rounded once and none is contracted (``enable_fp_fusion=False``, correctly rounded
division), so that codes and numbers equal the twin's bit for bit. Tables and launches are as in
``paged_triton.py``. A program takes some groups of one unit; the group's maximum stays in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUPS = 32  # of one program step
PROGRAMS = 1024
_NAMES = {"fp8-e4m3": 0, "int8-g64": 1, "int4-g64": 2}


@triton.jit
def _ptr8(address):
    return address.to(tl.pointer_type(tl.uint8))


@triton.jit
def _ptr16(address):
    return address.to(tl.pointer_type(tl.int16))


@triton.jit
def _round(value):
    """To the nearest whole number, ties to even, for sizes up to 2^22."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _bits(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _power(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load(engine, at, inside, HALF: tl.constexpr):
    raw = tl.load(engine + at, mask=inside, other=0)
    if HALF:
        found = raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        found = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return found


@triton.jit
def _narrow(value, HALF: tl.constexpr):
    """The bits of the number in the engine's dtype; a NaN becomes zero, what is too large the largest."""
    value = tl.where(value == value, value, 0.0)
    if HALF:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
        found = value.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        raw = _bits(value)
        size = raw & 0x7FFFFFFF
        size = (size + 0x7FFF + ((size >> 16) & 1)) >> 16
        size = tl.minimum(size, 0x7F7F)
        found = (size | ((raw >> 16) & 0x8000)).to(tl.int16)
    return found


@triton.jit
def _bfloat(value, UP: tl.constexpr):
    """The bits, in an int32, of a bfloat16 not below (UP) or not above."""
    raw = _bits(value)
    away = (raw ^ (-1 if UP else 0)) < 0  # away from zero is where we round to
    size = (raw & 0x7FFFFFFF) + tl.where(away, 0xFFFF, 0)
    return (size >> 16) | ((raw >> 16) & 0x8000)


@triton.jit
def _wide(words):
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _whole(step):
    return tl.where(step == 0.0, 1.0, step)


@triton.jit
def _inside(
    number, H: tl.constexpr, D: tl.constexpr, S_T: tl.constexpr, S_H: tl.constexpr, S_D: tl.constexpr
):
    return (number // (H * D)) * S_T + ((number // D) % H) * S_H + (number % D) * S_D


@triton.jit
def _extremes(low, high):
    """Smallest, largest, whether a number is not finite, over both halves of each group."""
    least = tl.minimum(tl.min(low, 1), tl.min(high, 1))
    most = tl.maximum(tl.max(low, 1), tl.max(high, 1))
    size = tl.maximum(tl.max(_bits(low) & 0x7FFFFFFF, 1), tl.max(_bits(high) & 0x7FFFFFFF, 1))
    bad = (size >= 0x7F800000) | ((most - least) > 3.4028234663852886e38)
    return least, most, size, bad


@triton.jit
def _fp8_exponent(size, LEAST: tl.constexpr):
    k = (size >> 23) - 135 + tl.where((size & 0x7FFFFF) > 0x600000, 1, 0)
    return tl.maximum(tl.where(size == 0, -1, k), LEAST)


@triton.jit
def _fp8_code(value, k):
    scaled = value * _power(-k)[:, None]
    raw = _bits(scaled)
    size = raw & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    tiny = _round(size.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)
    code = tl.where(size < 0x3C800000, tiny, normal)  # 2^-6
    return code | tl.where((raw < 0) & (code > 0), 128, 0)


@triton.jit
def _fp8_value(code, k):
    exponent = (code >> 3) & 15
    mantissa = code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent > 0, normal, mantissa.to(tl.float32) * 0.001953125)
    value = tl.where(code > 127, -size, size)
    half = k >> 1  # in two steps, since a power may lie beyond float32 in a forged row
    return value * _power(half)[:, None] * _power(k - half)[:, None]


@triton.jit
def _write_fp8(row, group_count, at, low, high, size, here, LEAST: tl.constexpr):
    k = _fp8_exponent(size, LEAST)
    tl.store(row + at, (k + 128).to(tl.uint8), mask=here)
    code = row + group_count + at[:, None] * 64 + tl.arange(0, 32)[None, :]
    tl.store(code, _fp8_code(low, k).to(tl.uint8), mask=here[:, None])
    tl.store(code + 32, _fp8_code(high, k).to(tl.uint8), mask=here[:, None])


@triton.jit
def _write_int8(row, group_count, at, low, high, size, here, GROUPS: tl.constexpr):
    peak = size.to(tl.float32, bitcast=True)
    scale = _bfloat(tl.div_rn(peak, tl.full([GROUPS], 127.0, tl.float32)), UP=True)
    tl.store(row.to(tl.pointer_type(tl.int16)) + at, scale.to(tl.int16), mask=here)
    divisor = tl.broadcast_to(_whole(_wide(scale))[:, None], [GROUPS, 32])
    code = row + group_count * 2 + at[:, None] * 64 + tl.arange(0, 32)[None, :]
    tl.store(code, _round(tl.div_rn(low, divisor)).to(tl.int32).to(tl.uint8), mask=here[:, None])
    tl.store(code + 32, _round(tl.div_rn(high, divisor)).to(tl.int32).to(tl.uint8), mask=here[:, None])


@triton.jit
def _write_int4(row, group_count, at, low, high, least, most, here, GROUPS: tl.constexpr):
    bottom = _bfloat(least + 0.0, UP=False)
    floor = _wide(bottom)
    scale = _bfloat(tl.div_rn(most - floor + 0.0, tl.full([GROUPS], 15.0, tl.float32)), UP=True)
    tl.store(row.to(tl.pointer_type(tl.int16)) + at, bottom.to(tl.int16), mask=here)
    tl.store(row.to(tl.pointer_type(tl.int16)) + group_count + at, scale.to(tl.int16), mask=here)
    divisor = tl.broadcast_to(_whole(_wide(scale))[:, None], [GROUPS, 32])
    first = _round(tl.div_rn(low - floor[:, None], divisor))
    second = _round(tl.div_rn(high - floor[:, None], divisor))
    first = tl.minimum(tl.maximum(first, 0.0), 15.0).to(tl.int32)
    second = tl.minimum(tl.maximum(second, 0.0), 15.0).to(tl.int32)
    code = row + group_count * 4 + at[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(code, (first | (second << 4)).to(tl.uint8), mask=here[:, None])


@triton.jit(do_not_specialize=["planes", "places", "rows", "refused", "steps", "plane_count", "first_group"])
def _encode(
    planes: tl.int64, places: tl.int64, rows: tl.int64, refused: tl.int64,
    steps, unit_count, plane_count, chunks, block, block_stride, token_stride, first_group, group_count,
    UNIT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, S_T: tl.constexpr, S_H: tl.constexpr,
    S_D: tl.constexpr, CODEC: tl.constexpr, HALF: tl.constexpr, LEAST: tl.constexpr, GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    words = tl.pointer_type(tl.int64)
    for step in range(tl.program_id(0), steps, tl.num_programs(0)):
        chunk = step % chunks
        plane = (step // chunks) % plane_count
        unit = step // chunks // plane_count
        place = tl.load(places.to(words) + unit)
        group = chunk * GROUPS + tl.arange(0, GROUPS)
        here = group < tl.where(place >= 0, UNIT // 64, 0)
        inside = here[:, None]
        number = group[:, None] * 64 + tl.arange(0, 32)[None, :]
        start = (place // block) * block_stride + (place % block) * token_stride
        engine = _ptr16(tl.load(planes.to(words) + plane)) + start
        if ALIGNED:
            engine = tl.multiple_of(engine, 16)
        low = _load(engine, _inside(number, H, D, S_T, S_H, S_D), inside, HALF)
        high = _load(engine, _inside(number + 32, H, D, S_T, S_H, S_D), inside, HALF)
        least, most, size, bad = _extremes(low, high)
        row_number = unit // unit_count
        tl.store(refused.to(tl.pointer_type(tl.int32)) + row_number + group * 0, 1, mask=bad & here)
        row = _ptr8(tl.load(rows.to(words) + row_number))
        if ALIGNED:
            row = tl.multiple_of(row, 16)
        at = first_group + (plane * unit_count + unit % unit_count) * (UNIT // 64) + group
        at = at.to(tl.int64)
        if CODEC == 0:
            _write_fp8(row, group_count, at, low, high, size, here, LEAST)
        elif CODEC == 1:
            _write_int8(row, group_count, at, low, high, size, here, GROUPS)
        else:
            _write_int4(row, group_count, at, low, high, least, most, here, GROUPS)


@triton.jit(do_not_specialize=["planes", "places", "rows", "steps", "plane_count", "first_group"])
def _decode(
    planes: tl.int64, places: tl.int64, rows: tl.int64,
    steps, unit_count, plane_count, chunks, block, block_stride, token_stride, first_group, group_count,
    UNIT: tl.constexpr, H: tl.constexpr, D: tl.constexpr, S_T: tl.constexpr, S_H: tl.constexpr,
    S_D: tl.constexpr, CODEC: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    words = tl.pointer_type(tl.int64)
    for step in range(tl.program_id(0), steps, tl.num_programs(0)):
        chunk = step % chunks
        plane = (step // chunks) % plane_count
        unit = step // chunks // plane_count
        place = tl.load(places.to(words) + unit)
        group = chunk * GROUPS + tl.arange(0, GROUPS)
        here = group < tl.where(place >= 0, UNIT // 64, 0)
        inside = here[:, None]
        row = _ptr8(tl.load(rows.to(words) + unit // unit_count))
        if ALIGNED:
            row = tl.multiple_of(row, 16)
        at = first_group + (plane * unit_count + unit % unit_count) * (UNIT // 64) + group
        at = at.to(tl.int64)
        column = tl.arange(0, 32)[None, :]
        if CODEC == 0:
            k = tl.load(row + at, mask=here, other=0).to(tl.int32) - 128
            code = row + group_count + at[:, None] * 64 + column
            low = _fp8_value(tl.load(code, mask=inside, other=0).to(tl.int32), k)
            high = _fp8_value(tl.load(code + 32, mask=inside, other=0).to(tl.int32), k)
        elif CODEC == 1:
            scale = _wide(tl.load(row.to(tl.pointer_type(tl.int16)) + at, mask=here, other=0).to(tl.int32))[
                :, None
            ]
            code = row + group_count * 2 + at[:, None] * 64 + column
            low = tl.load(code, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32) * scale
            high = tl.load(code + 32, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32) * scale
        else:
            floor = _wide(tl.load(row.to(tl.pointer_type(tl.int16)) + at, mask=here, other=0).to(tl.int32))[
                :, None
            ]
            scale = _wide(
                tl.load(row.to(tl.pointer_type(tl.int16)) + group_count + at, mask=here, other=0).to(tl.int32)
            )[:, None]
            code = row + group_count * 4 + at[:, None] * 32 + column
            pair = tl.load(code, mask=inside, other=0).to(tl.int32)
            low = (pair & 15).to(tl.float32) * scale + floor
            high = (pair >> 4).to(tl.float32) * scale + floor
        number = group[:, None] * 64 + column
        start = (place // block) * block_stride + (place % block) * token_stride
        engine = _ptr16(tl.load(planes.to(words) + plane)) + start
        if ALIGNED:
            engine = tl.multiple_of(engine, 16)
        tl.store(engine + _inside(number, H, D, S_T, S_H, S_D), _narrow(low, HALF), mask=inside)
        tl.store(engine + _inside(number + 32, H, D, S_T, S_H, S_D), _narrow(high, HALF), mask=inside)


def encode(geometry, tables, codec, *, page_planes, half, least, run, aligned, programs=PROGRAMS):
    """Engine to quantised rows.

    geometry, run: as ``paged_triton.move_units`` (words of 2 bytes). tables: addresses of (planes, places, rows,
    refused) and the number of planes. page_planes: planes of a whole page. aligned: whether all
    addresses and steps are multiples of 16 bytes. least: ``quant.FP8_LEAST``.
    """
    planes, places, rows, refused, plane_count = tables
    sizes = _sizes(geometry, plane_count, page_planes, run)
    if sizes[0]:
        _encode[(min(sizes[0], programs),)](
            planes,
            places,
            rows,
            refused,
            *sizes,
            **_constants(run, codec, half),
            ALIGNED=aligned,
            LEAST=least,
        )


def decode(geometry, tables, codec, *, page_planes, half, run, aligned, programs=PROGRAMS):
    """Quantised rows to the engine; tables: addresses of (planes, places, rows) and the number of planes."""
    planes, places, rows, plane_count = tables
    sizes = _sizes(geometry, plane_count, page_planes, run)
    if sizes[0]:
        _decode[(min(sizes[0], programs),)](
            planes, places, rows, *sizes, **_constants(run, codec, half), ALIGNED=aligned
        )


def _sizes(geometry, plane_count, page_planes, run):
    unit_groups = run.t * run.h * run.d // 64
    chunks = -(-unit_groups // GROUPS)
    steps = geometry.pages * geometry.units * plane_count * chunks
    first_group = geometry.first_byte // 128
    group_count = page_planes * geometry.units * unit_groups
    places = (geometry.block, run.block_stride, run.token_stride)
    return steps, geometry.units, plane_count, chunks, *places, first_group, group_count


def _constants(run, codec, half):
    return {
        "UNIT": run.t * run.h * run.d,
        "H": run.h,
        "D": run.d,
        "S_T": run.stride_t,
        "S_H": run.stride_h,
        "S_D": run.stride_d,
        "CODEC": _NAMES[codec],
        "HALF": half,
        "GROUPS": GROUPS,
        "enable_fp_fusion": False,
    }
