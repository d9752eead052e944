"""Page contents that can be checked: pseudo-random bytes made from what a page stands for.

The seed of a page is a hash chained over the namespace's salt and every page's symbol up to and including
its own, with the page's number: a page of another prompt, place or namespace has other bytes, so that
whoever reads a page can tell whether it is the right one. The bytes are SplitMix64 of the seed, a
counter-based generator, in one numpy pass for many pages; ``bf16`` bends them into what 16-bit floats look
like, whose exponents compress.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest, xxh3_128_digest

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U64 = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD_BYTES = 8


def page_seeds(salt: str, symbols: bytes, symbol_bytes: int) -> U64:
    """One seed a page of the prompt ``symbols``, uint64 of shape [pages]."""
    chain = xxh3_128_digest(salt.encode())
    count = len(symbols) // symbol_bytes
    seeds = np.empty(count, np.uint64)
    for page in range(count):
        chain = xxh3_128_digest(chain + symbols[page * symbol_bytes : (page + 1) * symbol_bytes])
        seeds[page] = xxh3_64_intdigest(chain, seed=page)
    return seeds


class PageMaker:
    """Makes the bytes of pages of one size from their seeds.

    ``bf16``: sign and mantissa are noise, exponents are those of a normal distribution, as in real KV.
    """

    def __init__(self, page_bytes: int, *, bf16: bool = True) -> None:
        self.page_bytes = page_bytes
        self._words = -(-page_bytes // _WORD_BYTES)
        self._table = _bf16_table() if bf16 else None

    def make(self, seeds: U64) -> U8:
        """The pages of ``seeds``: uint8 of shape [pages, page_bytes], contiguous."""
        words = _splitmix64(seeds, self._words)
        if self._table is not None:
            words = self._table[words.view(np.uint16)].view(np.uint64)
        raw = words.view(np.uint8)
        return raw if raw.shape[1] == self.page_bytes else np.ascontiguousarray(raw[:, : self.page_bytes])

    def wrong_bytes(self, seeds: U64, first: int, data: memoryview | U8) -> int:
        """How many bytes of ``data``, whole pages from page ``first``, are not what they should be."""
        found = np.frombuffer(data, np.uint8).reshape(-1, self.page_bytes)
        expected = self.make(seeds[first : first + len(found)])
        if np.array_equal(found, expected):
            return 0
        return int(np.count_nonzero(found != expected))


def _splitmix64(seeds: U64, words: int) -> U64:
    """The first ``words`` outputs of SplitMix64 for each seed; shape [seeds, words]."""
    made: U64 = np.arange(1, words + 1, dtype=np.uint64) * _STEP + seeds[:, None]
    scratch = np.empty_like(made)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        np.right_shift(made, np.uint64(shift), out=scratch)
        np.bitwise_xor(made, scratch, out=made)
        np.multiply(made, factor, out=made)
    np.right_shift(made, np.uint64(31), out=scratch)
    np.bitwise_xor(made, scratch, out=made)
    return made


def _bf16_table() -> U16:
    """From 16 random bits to a bfloat16: 8 bits kept as sign and mantissa, 8 bits choose the exponent."""
    chances = np.abs(np.random.default_rng(0).standard_normal(1 << 16))
    exponents = np.sort(np.floor(np.log2(np.maximum(chances, 2.0**-20))).astype(np.int64) + 127)
    by_rank = exponents[(np.arange(256) * 256) + 128]
    bits = np.arange(1 << 16)
    low = bits & 0xFF
    table: U16 = ((low >> 7 << 15) | (by_rank[bits >> 8] << 7) | (low & 0x7F)).astype(np.uint16)
    return table
