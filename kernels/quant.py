"""Quantised pages: the words, the checks and the torch twin. Codes and bounds are the disk tier's lossy codecs'.

A page's numbers (``paged.py``'s order, bfloat16 or float16) are taken 64 at a time. **A quantised row's bytes are**
the parameters of all groups, then the codes of all groups:

    fp8-e4m3   k + 128, u8                       64 codes of 1 byte       65 bytes a group
    int8-g64   step, bfloat16                    64 codes of 1 byte       66
    int4-g64   bases, then steps, bfloat16       32 bytes, i | i + 32     36

which is what ``hicache.tier.codec.lossy`` writes after its head when it leaves codes uncompressed, bit for bit, so
that host and disk can read what a GPU quantised. Bounds (x the number, y what comes back, m the largest |x| of the
group, [a, b] its range, t the smallest subnormal, u(y) one rounding to the dtype):

    fp8-e4m3   |x - y| <= max(|x| / 16, m / 2^17, t)
    int8-g64   |x - y| <= m / 252 + u(y)
    int4-g64   |x - y| <= (b - a) / 29 + max(|a|, |b|) / 2^11 + u(y)

Where it differs from the codec: a page is refused (``refused[page]`` becomes 1, its row is then undefined) for an
infinity, a NaN or a range beyond float32 *within a group*, the codec looks at the whole page; groups never straddle
units, so a unit must hold whole groups (ValueError); a base or step of zero has no sign; nothing is Huffman coded.

Bytes: 2 a number on the engine's side and 65/64, 66/64 or 36/64 on the row's; floor: the slower of the link with
those bytes and memory with the sum. The twin passes through temporaries of float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GROUP = 64
#: name -> bytes of parameters and of codes in a group.
CODECS = {"fp8-e4m3": (1, 64), "int8-g64": (2, 64), "int4-g64": (4, 32)}
#: The least exponent of a group whose e4m3 numbers are all the dtype's own.
FP8_LEAST = {torch.bfloat16: -124, torch.float16: -15}
LARGEST = {torch.bfloat16: 3.3895313892515355e38, torch.float16: 65504.0}


def is_half(dtype: torch.dtype) -> bool:
    """float16, not bfloat16."""
    return dtype is torch.float16


def row_bytes(numbers: int, codec: str) -> int:
    """Bytes of a quantised page of so many numbers."""
    return numbers // GROUP * sum(CODECS[codec])


def check(dtype: torch.dtype, codec: str, unit_numbers: int) -> None:
    """ValueError for what is not quantised."""
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, not {codec!r}")
    if dtype not in FP8_LEAST:
        raise ValueError(f"numbers must be bfloat16 or float16, not {dtype}")
    if unit_numbers % GROUP:
        raise ValueError(f"units must be whole groups of {GROUP} numbers, not {unit_numbers}")


def encode(pages: Tensor, codec: str, rows: Tensor, refused: Tensor) -> None:
    """Numbers to rows.

    pages: ``[pages, numbers]`` bfloat16 or float16; rows: uint8 ``[pages, row_bytes]``; refused: int32 ``[pages]``.
    """
    check(pages.dtype, codec, pages.shape[1])
    values = pages.float().view(len(pages), -1, GROUP)
    finite = torch.isfinite(values.amax(2) - values.amin(2)).all(1)
    refused[~finite] = 1
    values = torch.where(finite[:, None, None], values, 0)
    parameters, codes = _ENCODE[codec](values, pages.dtype)
    rows.copy_(torch.cat([parameters, codes.reshape(len(pages), -1)], 1))


def decode(rows: Tensor, codec: str, pages: Tensor) -> None:
    """The inverse; every row of bytes gives finite numbers (a NaN becomes zero)."""
    check(pages.dtype, codec, pages.shape[1])
    groups = pages.shape[1] // GROUP
    head = groups * CODECS[codec][0]
    values = _DECODE[codec](rows[:, :head].contiguous(), rows[:, head:].reshape(len(rows), groups, -1))
    largest = LARGEST[pages.dtype]
    # rounded first: what would become an infinity becomes the largest number
    rounded = values.nan_to_num(0.0, largest, -largest).clamp(-largest, largest)
    pages.copy_(rounded.view(pages.shape).to(pages.dtype))


def _words(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.to(torch.int16) for value in values], 1).contiguous().view(torch.uint8)


def _float(words: Tensor) -> Tensor:
    return (words.contiguous().view(torch.int16).int() << 16).view(torch.float32).unsqueeze(2)


def _bfloat(values: Tensor, *, up: bool) -> Tensor:
    """The bits of a bfloat16 not below (``up``), or not above."""
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    away = (bits >> 31 == 0) if up else (bits >> 31 == 1)
    found = ((bits + torch.where(away, 0xFFFF, 0)) >> 16) & 0xFFFF
    return torch.where(found > 0x7FFF, found - 0x10000, found)


def _power(exponent: Tensor) -> Tensor:
    """2 to the exponent, for -126 to 127."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _fp8_encode(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    peak = values.abs().amax(2)
    bits = peak.view(torch.int32)
    # the least k with peak <= 1.75 * 2^(8 + k)
    k = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
    k = torch.where(bits == 0, -1, k).clamp(min=FP8_LEAST[dtype])
    scaled = values * _power(-k).unsqueeze(2)
    size = scaled.abs()
    bits = size.view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    tiny = torch.round(size * 512).int()
    codes = torch.where(size < 2.0**-6, tiny, normal)
    codes = codes | torch.where(torch.signbit(scaled) & (codes > 0), 128, 0)
    return (k + 128).to(torch.uint8), codes.to(torch.uint8)


def _fp8_decode(parameters: Tensor, codes: Tensor) -> Tensor:
    exponent, mantissa = (codes.int() >> 3) & 15, codes.int() & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).view(torch.float32)
    size = torch.where(exponent > 0, normal, mantissa.float() * 2.0**-9)
    value = torch.where(codes > 127, -size, size)
    k = parameters.int() - 128
    half = k // 2  # in two steps, since a power may lie beyond float32 in a forged row
    return value * _power(half).unsqueeze(2) * _power(k - half).unsqueeze(2)


def _int8_encode(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    words = _words([_bfloat(values.abs().amax(2) / 127, up=True)])
    step = _float(words)
    codes = torch.round(values / torch.where(step == 0, 1, step))
    return words, codes.to(torch.int8).view(torch.uint8)


def _int8_decode(parameters: Tensor, codes: Tensor) -> Tensor:
    return codes.contiguous().view(torch.int8).float() * _float(parameters)


def _int4_encode(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    base = _bfloat(
        values.amin(2) + 0.0, up=False
    )  # which zero is the least is no matter: always the positive
    low = _float(_words([base]))
    step_bits = _bfloat((values.amax(2) - low.squeeze(2) + 0.0) / 15, up=True)
    step = _float(_words([step_bits]))
    codes = torch.round((values - low) / torch.where(step == 0, 1, step)).clamp(0, 15).to(torch.uint8)
    return _words([base, step_bits]), codes[..., :32] | (codes[..., 32:] << 4)


def _int4_decode(parameters: Tensor, codes: Tensor) -> Tensor:
    low, step = parameters.tensor_split(2, 1)
    counts = torch.cat([codes & 15, codes >> 4], 2).float()
    product = counts * _float(step)
    return product + _float(low)


_ENCODE = {"fp8-e4m3": _fp8_encode, "int8-g64": _int8_encode, "int4-g64": _int4_encode}
_DECODE = {"fp8-e4m3": _fp8_decode, "int8-g64": _int8_decode, "int4-g64": _int4_decode}
