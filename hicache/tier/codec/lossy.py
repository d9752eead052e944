"""Quantisation of 16-bit floats, 64 numbers a group. A namespace asks for it by name; nothing else does.

x is a number, y what comes back, m the largest |x| of its group, [a, b] the group's range; t is the smallest subnormal
of the dtype, u(y) its rounding: 2^-8 |y| in bfloat16, 2^-11 |y| in float16, at least t. Bounds hold for every number of
every page; in fp8 and int8 zeros come back as zeros:

    fp8-e4m3   |x - y| <= max(|x| / 16, m / 2^17, t)                      8.125 bits a number
    int8-g64   |x - y| <= m / 252 + u(y)                                  8.25 bits
    int4-g64   |x - y| <= (b - a) / 29 + max(|a|, |b|) / 2^11 + u(y)      4.5 bits

fp8: a power of two scales the group so that its maximum is at most 448; the number is then rounded to e4m3 (nearest,
ties to even). Every such number is one of the dtype's own: decoding is exact, and quantising what was decoded changes
nothing more. int8: round(x / s), s = m / 127. int4: round((x - a) / s), s = (b - a) / 15. a is rounded down and s
up to bfloat16 when they are stored.

A page that holds an infinity or a NaN, or whose range no float32 holds, is refused here and stored without loss.
Decoding is float32 arithmetic, one rounding an operation: the same on every machine.

Payload: coded bytes u32 (0: the codes are not compressed) | group parameters | codes, or a frame of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hicache.tier.codec.forms import Form
from hicache.tier.codec.frames import U8, U16, deflate, inflate

GROUP = 64
#: What can be quantised.
FORMS = frozenset({Form.BFLOAT16, Form.FLOAT16})
F32 = npt.NDArray[np.float32]
_HEAD = struct.Struct("<I")
_MIN_SAVING = 0.05
_E4M3_MAX = 448.0
_FP8_MIN_EXPONENT = {Form.BFLOAT16: -124, Form.FLOAT16: -15}


def _wide(raw: U8, form: Form) -> F32:
    """The page's numbers in groups, the last one filled up with its last number."""
    words = raw.view(np.uint16)
    if form is Form.FLOAT16:
        flat = words.view(np.float16).astype(np.float32)
    else:
        flat = (words.astype(np.uint32) << 16).view(np.float32)
    short = -len(flat) % GROUP
    if short:
        flat = np.concatenate([flat, np.repeat(flat[-1:], short)])
    return flat.reshape(-1, GROUP)


def _narrow(values: F32, form: Form, target: U8) -> None:
    """Round to the page's dtype, to nearest even; what would become an infinity becomes the largest number."""
    flat = values.reshape(-1)[: len(target) // 2]
    words = target.view(np.uint16)
    if form is Form.FLOAT16:
        np.copyto(words.view(np.float16), np.clip(flat, -65504.0, 65504.0), casting="unsafe")
        return
    bits = flat.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    over = (rounded & 0x7FFF) >= 0x7F80
    rounded[over] = (rounded[over] & 0x8000) | 0x7F7F
    np.copyto(words, rounded, casting="unsafe")


def _bfloat(values: F32, *, up: bool) -> U16:
    """bfloat16 not below (``up``), or not above, the values."""
    bits = values.view(np.uint32)
    away = (bits >> 31 == 0) if up else (bits >> 31 == 1)  # away from zero is where we round to
    rounded: U16 = ((bits + np.where(away, np.uint32(0xFFFF), np.uint32(0))) >> 16).astype(np.uint16)
    return rounded


def _float(words: U16) -> F32:
    return (words.astype(np.uint32) << 16).view(np.float32)


# --- fp8


def _fp8_codes(values: F32, form: Form) -> tuple[U8, U8]:
    peak = np.abs(values).max(axis=1)
    # Exponent k of the group: the least with peak <= 448 * 2^k and 2^k * 2^-9 a number of the dtype.
    _, k = np.frexp(peak / np.float32(_E4M3_MAX))
    k = np.where(np.ldexp(np.float32(_E4M3_MAX), k - 1) >= peak, k - 1, k)
    k = np.maximum(k, _FP8_MIN_EXPONENT[form])
    scaled = np.ldexp(values, -k[:, None])
    return (k + 128).astype(np.uint8), _e4m3(scaled.reshape(-1))


def _e4m3(values: F32) -> U8:
    """Codes of numbers within +-448."""
    size = np.abs(values)
    bits = size.view(np.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)  # wraps below; not used there
    tiny = np.rint(size * np.float32(512)).astype(np.uint32)
    codes = np.where(size < np.float32(2.0**-6), tiny, normal)
    return (codes | (np.signbit(values) & (codes > 0)) * np.uint32(128)).astype(np.uint8)


def _e4m3_values() -> F32:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    return (np.where(codes & 128, -size, size)).astype(np.float32)


_E4M3 = _e4m3_values()


def _fp8_values(parameters: U8, codes: U8) -> F32:
    k = parameters.astype(np.int32) - 128
    found: F32 = np.ldexp(_E4M3[codes].reshape(-1, GROUP), k[:, None])
    return found


# --- int8


def _int8_codes(values: F32, form: Form) -> tuple[U8, U8]:
    scale = _bfloat(np.abs(values).max(axis=1) / np.float32(127), up=True)
    step = _float(scale)
    step[step == 0] = 1
    codes = np.rint(values / step[:, None]).astype(np.int8)
    return scale.view(np.uint8), codes.reshape(-1).view(np.uint8)


def _int8_values(parameters: U8, codes: U8) -> F32:
    step = _float(parameters.view(np.uint16))
    return codes.view(np.int8).astype(np.float32).reshape(-1, GROUP) * step[:, None]


# --- int4


def _int4_codes(values: F32, form: Form) -> tuple[U8, U8]:
    base = _bfloat(values.min(axis=1), up=False)
    low = _float(base)
    scale = _bfloat((values.max(axis=1) - low) / np.float32(15), up=True)
    step = _float(scale)
    step[step == 0] = 1
    codes = np.rint((values - low[:, None]) / step[:, None])
    codes = np.clip(codes, 0, 15).astype(np.uint8)
    packed: U8 = codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] * 16
    return np.concatenate([base, scale]).view(np.uint8), packed.reshape(-1)


def _int4_values(parameters: U8, codes: U8) -> F32:
    base, scale = parameters.view(np.uint16).reshape(2, -1)
    pairs = codes.reshape(-1, GROUP // 2)
    counts = np.concatenate([pairs & 15, pairs >> 4], axis=1).astype(np.float32)
    return counts * _float(scale)[:, None] + _float(base)[:, None]


# --- pages

_Encode = Callable[[F32, Form], tuple[U8, U8]]
_Decode = Callable[[U8, U8], F32]
#: name -> (to codes, from codes, bytes of parameters and of codes a group)
_CODECS: dict[str, tuple[_Encode, _Decode, int, int]] = {
    "fp8-e4m3": (_fp8_codes, _fp8_values, 1, GROUP),
    "int8-g64": (_int8_codes, _int8_values, 2, GROUP),
    "int4-g64": (_int4_codes, _int4_values, 4, GROUP // 2),
}


def pack(raw: U8, name: str, form: Form, room: int) -> U8 | None:
    """``room`` free bytes and the payload; None for a page that must be stored without loss."""
    if len(raw) % 2 or not len(raw):
        return None
    values = _wide(raw, form)
    with np.errstate(over="ignore", invalid="ignore"):
        spread = values.max() - values.min()
    if not np.isfinite(spread):
        return None
    parameters, codes = _CODECS[name][0](values, form)
    frame = deflate(codes)
    coded = len(frame) if len(frame) < len(codes) * (1 - _MIN_SAVING) else 0
    body = np.frombuffer(frame, np.uint8) if coded else codes
    head = np.frombuffer(_HEAD.pack(coded), np.uint8)
    return np.concatenate([np.empty(room, np.uint8), head, parameters, body])


def unpack(payload: U8, name: str, form: Form, target: U8) -> bool:
    """The page into ``target``; False when the payload is not one."""
    _, decode, parameter_bytes, code_bytes = _CODECS[name]
    groups = -(-len(target) // (2 * GROUP))
    if len(target) % 2 or len(payload) < _HEAD.size + groups * parameter_bytes:
        return False
    (coded,) = _HEAD.unpack(payload[: _HEAD.size].tobytes())
    start = _HEAD.size + groups * parameter_bytes
    if len(payload) - start != (coded or groups * code_bytes):
        return False
    codes = payload[start:]
    if coded:
        codes = np.empty(groups * code_bytes, dtype=np.uint8)
        if not inflate(payload[start:], codes):
            return False
    with np.errstate(over="ignore", invalid="ignore"):  # forged parameters may be anything
        values = decode(np.ascontiguousarray(payload[_HEAD.size : start]), codes)
    _narrow(np.nan_to_num(values, nan=0.0), form, target)
    return True
