"""xxh3-64 of rows in parallel: the table of constants, the split into parts, and the torch twin.

XXH3's long form (seed 0, the default secret, more than 240 bytes; specification: xxHash's doc/xxhash_spec.md)
keeps eight 64-bit lanes. In a block of 1,024 bytes it only *adds* to them, so that all blocks can be summed at the
same time; between blocks it scrambles the lanes, eight independent chains of ``row_bytes / 1024`` short steps. So
a GPU computes the very checksum that records, slots and clients use, and no second format is needed.

    sums    every block's eight sums       reads row_bytes, writes row_bytes / 16     parallel over all
    chain   lanes through the blocks       reads row_bytes / 16                       parallel over rows and lanes

Floor: 1.125 * bytes / memory bandwidth, and at least 2,048 steps (tens of microseconds) for a page of 2 MiB, which
pages of one launch share. Rows are ``row_bytes > 240``, a multiple of 8; others are hashed on the host.
The secret and the primes are xxHash's (Yann Collet), part of its specification.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

LEAST_BYTES = 241
BLOCK_WORDS, STRIPE_WORDS, STRIPES = 128, 8, 16

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_PRIMES32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIMES64 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_AVALANCHE = 0x165667919E3779F9
#: The lanes before the first byte.
_START = (_PRIMES32[2], *_PRIMES64[:4], _PRIMES32[1], _PRIMES64[4], _PRIMES32[0])

#: Where what lies in the table of constants.
AT_KEYS, AT_SCRAMBLE, AT_LAST, AT_MERGE, AT_START, AT_PRIME32, AT_PRIME64, AT_AVALANCHE = (
    0,
    16,
    24,
    32,
    40,
    48,
    49,
    50,
)


def constants() -> Tensor:
    """int64 ``[51]``: what the kernels look up."""
    words = struct.unpack("<24Q", _SECRET)
    last = struct.unpack_from("<8Q", _SECRET, 192 - 64 - 7)
    merge = struct.unpack_from("<8Q", _SECRET, 11)
    values = (*words, *last, *merge, *_START, _PRIMES32[0], _PRIMES64[0], _AVALANCHE)
    return torch.tensor([_signed(value) for value in values], dtype=torch.int64)


def can_hash(row_bytes: int) -> bool:
    """Whether rows of this size are hashed here."""
    return row_bytes >= LEAST_BYTES and not row_bytes % 8


def blocks(row_bytes: int) -> int:
    """Blocks of a row that are scrambled; one more sum is kept, for what follows them."""
    return (row_bytes - 1) // 1024


def hash_rows(rows: Tensor, row_bytes: int, out: Tensor) -> None:
    """``out[i]`` = xxh3-64 of the first ``row_bytes`` of row i.

    rows: uint8 ``[rows, stride]``, out: int64 ``[rows]``, the hashes' bits.
    """
    check(rows, row_bytes, out)
    if not len(rows):
        return
    table = constants().to(rows.device)
    words = rows[:, :row_bytes].contiguous().view(torch.int64)
    sums = _sums(words, table)
    lanes = table[AT_START : AT_START + 8].expand(len(rows), 8)
    for number in range(blocks(row_bytes)):
        lanes = lanes + sums[:, number]
        lanes = lanes ^ _shift(lanes, 47) ^ table[AT_SCRAMBLE : AT_SCRAMBLE + 8]
        lanes = lanes * table[AT_PRIME32]
    last = _products(words[:, -STRIPE_WORDS:], table[AT_LAST : AT_LAST + 8])
    out.copy_(_merge(lanes + sums[:, -1] + last, row_bytes, table))


def check(rows: Tensor, row_bytes: int, out: Tensor) -> None:
    """ValueError for arguments that do not go together."""
    if rows.dim() != 2 or rows.dtype is not torch.uint8 or rows.stride(1) != 1 or rows.shape[1] < row_bytes:
        raise ValueError(
            f"rows must be uint8 [rows, {row_bytes} or more], not {rows.dtype} {list(rows.shape)}"
        )
    if not can_hash(row_bytes):
        raise ValueError(f"row_bytes must be {LEAST_BYTES} or more and a multiple of 8, not {row_bytes}")
    if out.shape != (len(rows),) or out.dtype is not torch.int64:
        raise ValueError(f"out must be int64 [{len(rows)}], not {out.dtype} {list(out.shape)}")


def _sums(words: Tensor, table: Tensor) -> Tensor:
    """int64 ``[rows, blocks + 1, 8]``: what each block adds to the lanes, the last stripe apart."""
    rows, count = words.shape
    stripes = (count * 8 - 1) // 64
    padded = torch.zeros(
        (rows, (count * 8 - 1) // 1024 + 1, STRIPES, 8), dtype=torch.int64, device=words.device
    )
    taken = stripes * STRIPE_WORDS
    padded.view(rows, -1)[:, :taken] = words[:, :taken]
    place = torch.arange(STRIPES, device=words.device)[:, None] + torch.arange(8, device=words.device)
    added = _products(padded, table[AT_KEYS + place])
    number = torch.arange(padded.shape[1] * STRIPES, device=words.device).view(-1, STRIPES, 1)
    return torch.where(number < stripes, added, 0).sum(2)


def _products(data: Tensor, keys: Tensor) -> Tensor:
    """What data adds to the lanes: the product of each keyed word's halves, and the neighbour's word."""
    keyed = data ^ keys
    return (keyed & 0xFFFFFFFF) * _shift(keyed, 32) + data.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _merge(lanes: Tensor, row_bytes: int, table: Tensor) -> Tensor:
    keyed = lanes ^ table[AT_MERGE : AT_MERGE + 8]
    found = (table[AT_PRIME64] * row_bytes).expand(len(lanes))
    for pair in range(4):
        found = found + _fold(keyed[:, 2 * pair], keyed[:, 2 * pair + 1])
    found = (found ^ _shift(found, 37)) * table[AT_AVALANCHE]
    return found ^ _shift(found, 32)


def _fold(a: Tensor, b: Tensor) -> Tensor:
    """Low xor high half of the 128-bit product."""
    a_low, a_high, b_low, b_high = a & 0xFFFFFFFF, _shift(a, 32), b & 0xFFFFFFFF, _shift(b, 32)
    low, cross = a_low * b_low, a_high * b_low
    middle = _shift(low, 32) + (cross & 0xFFFFFFFF) + a_low * b_high
    high = _shift(cross, 32) + _shift(middle, 32) + a_high * b_high
    return ((middle << 32) | (low & 0xFFFFFFFF)) ^ high


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
