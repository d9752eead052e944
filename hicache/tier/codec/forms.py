"""Kinds of numbers, and how each is taken apart into exponents and the rest.

The exponent of a number carries two or three bits of news, sign and mantissa are noise. So the exponents go into a
plane of bytes of their own, for ``exponents`` to pack, and the rest is stored as it is:

    bfloat16   n bytes                 sign << 7 | mantissa
    float16    n bytes, 3n / 8 bytes   low byte of the mantissa; sign and two upper bits, eight numbers in three bytes
    float32    n bytes, 2n bytes       as bfloat16, of the upper half; the lower half

Everything is bit patterns: NaN, infinities and what is not a number at all come back as they were.
"""

from __future__ import annotations

import enum

import numpy as np

from hicache.tier.codec.frames import U8, U16, scratch


class Form(enum.IntEnum):
    """What the page's bytes are. Numbers are on disk: never reuse one."""

    OPAQUE = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    FLOAT32 = 3
    BYTES = 4  # one-byte numbers: fp8, int8


_BY_DTYPE = {
    "bfloat16": Form.BFLOAT16,
    "float16": Form.FLOAT16,
    "half": Form.FLOAT16,
    "float32": Form.FLOAT32,
    "float": Form.FLOAT32,
    "int8": Form.BYTES,
    "uint8": Form.BYTES,
}

FLOATS = (Form.BFLOAT16, Form.FLOAT16, Form.FLOAT32)


def form_of(dtype: str) -> Form:
    """The form of a namespace's KV dtype; OPAQUE for one that is not known."""
    if dtype.startswith(("float8", "fp8")):
        return Form.BYTES
    return _BY_DTYPE.get(dtype, Form.OPAQUE)


def item_bytes(form: Form) -> int:
    """Bytes of one float."""
    return 4 if form is Form.FLOAT32 else 2


def rest_bytes(form: Form, count: int) -> int:
    """Bytes of what is not exponent, of ``count`` floats."""
    if form is Form.BFLOAT16:
        return count
    return 3 * count if form is Form.FLOAT32 else count + 3 * -(-count // 8)


def split_exponents(raw: U8, form: Form, exponents: U8) -> None:
    """The exponents of the page's floats, one a byte."""
    count = len(exponents)
    shifted = scratch("words", 2 * count).view(np.uint16)
    if form is Form.FLOAT16:
        np.right_shift(raw.view(np.uint16), 10, out=shifted)
        np.copyto(exponents, shifted, casting="unsafe")
        np.bitwise_and(exponents, 31, out=exponents)
        return
    words = _upper(raw) if form is Form.FLOAT32 else raw.view(np.uint16)
    np.right_shift(words, 7, out=shifted)
    np.copyto(exponents, shifted, casting="unsafe")  # the sign falls off


def split_rest(raw: U8, form: Form, rest: U8) -> None:
    """Everything but the exponents."""
    if form is Form.FLOAT16:
        _split_half(raw.view(np.uint16), rest)
        return
    if form is Form.FLOAT32:
        count = len(raw) // 4
        _split_bfloat(_upper(raw), rest[:count])
        lower = scratch("words", 2 * count).view(np.uint16)
        np.copyto(lower, raw.view(np.uint32), casting="unsafe")
        np.copyto(rest[count:], lower.view(np.uint8))
        return
    _split_bfloat(raw.view(np.uint16), rest)


def join(exponents: U8, rest: U8, form: Form, target: U8) -> None:
    """The page again."""
    count = len(exponents)
    if form is Form.FLOAT16:
        _join_half(exponents, rest, target.view(np.uint16))
    elif form is Form.FLOAT32:
        upper = scratch("upper", 2 * count).view(np.uint16)
        _join_bfloat(exponents, rest[:count], upper)
        lower = scratch("words", 2 * count)
        np.copyto(lower, rest[count:])
        halves = target.view(np.uint16).reshape(-1, 2)
        halves[:, 0] = lower.view(np.uint16)
        halves[:, 1] = upper
    else:
        _join_bfloat(exponents, rest, target.view(np.uint16))


def _upper(raw: U8) -> U16:
    """The upper halves of 32-bit words."""
    words = raw.view(np.uint32)
    shifted = scratch("wide", len(raw)).view(np.uint32)
    upper = scratch("upper", len(raw) // 2).view(np.uint16)
    np.right_shift(words, 16, out=shifted)
    np.copyto(upper, shifted, casting="unsafe")
    return upper


# numpy shifts bytes to the left ten times slower than it multiplies them, hence the multiplications below.


def _split_bfloat(words: U16, rest: U8) -> None:
    sign = scratch("bytes", len(words))
    np.less(words.view(np.int16), 0, out=sign.view(np.bool_))
    np.multiply(sign, 128, out=sign)
    np.copyto(rest, words, casting="unsafe")
    np.bitwise_and(rest, 127, out=rest)
    np.bitwise_or(rest, sign, out=rest)


def _join_bfloat(exponents: U8, rest: U8, words: U16) -> None:
    shifted = scratch("words", 2 * len(exponents)).view(np.uint16)
    np.copyto(shifted, exponents)
    np.multiply(shifted, 128, out=shifted)
    np.copyto(words.view(np.int16), rest.view(np.int8))  # the sign fills the upper byte
    np.bitwise_and(words, 0x807F, out=words)
    np.bitwise_or(words, shifted, out=words)


def _split_half(words: U16, rest: U8) -> None:
    count = len(words)
    np.copyto(rest[:count], words, casting="unsafe")
    shifted = scratch("words", 2 * count).view(np.uint16)
    high, bits = scratch("bytes", count), scratch("threes", -(-count // 8) * 8)
    np.right_shift(words, 8, out=shifted)
    np.copyto(high, shifted, casting="unsafe")
    bits[count:] = 0
    np.right_shift(high, 5, out=bits[:count])
    np.bitwise_and(bits[:count], 4, out=bits[:count])
    np.bitwise_and(high, 3, out=high)
    np.bitwise_or(bits[:count], high, out=bits[:count])
    _pack_threes(bits.reshape(8, -1), rest[count:].reshape(3, -1))


def _join_half(exponents: U8, rest: U8, words: U16) -> None:
    count = len(exponents)
    bits = scratch("threes", -(-count // 8) * 8)
    _unpack_threes(rest[count:].reshape(3, -1), bits.reshape(8, -1))
    high, sign = scratch("bytes", count), scratch("signs", count)
    np.bitwise_and(bits[:count], 4, out=sign)
    np.multiply(sign, 32, out=sign)
    np.bitwise_and(bits[:count], 3, out=high)
    np.bitwise_or(high, sign, out=high)
    np.multiply(exponents, 4, out=sign)
    np.bitwise_or(high, sign, out=high)
    shifted = scratch("words", 2 * count).view(np.uint16)
    np.copyto(shifted, high)
    np.multiply(shifted, 256, out=shifted)
    np.copyto(words, rest[:count])
    np.bitwise_or(words, shifted, out=words)


def _pack_threes(bits: U8, packed: U8) -> None:
    """Eight rows of 3-bit values in three rows of bytes."""
    a, b, c, d, e, f, g, h = bits
    packed[0] = a | b * 8 | c * 64  # two bits of c fall off
    packed[1] = c >> 2 | d * 2 | e * 16 | f * 128
    packed[2] = f >> 1 | g * 4 | h * 32


def _unpack_threes(packed: U8, bits: U8) -> None:
    x, y, z = packed
    bits[0], bits[1], bits[2] = x, x >> 3, x >> 6 | y * 4
    bits[3], bits[4], bits[5] = y >> 1, y >> 4, y >> 7 | z * 2
    bits[6], bits[7] = z >> 2, z >> 5
    np.bitwise_and(bits, 7, out=bits)
