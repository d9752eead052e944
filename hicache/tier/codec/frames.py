"""What each thread has for itself: zstd contexts, and scratch memory that is used again for the next page.

Contexts are never shared: two threads in one context crash. Scratch memory is by name; it grows to the largest
page seen and stays, about twice a page for each thread.
"""

from __future__ import annotations

import threading
from typing import cast

import numpy as np
import numpy.typing as npt
import zstandard
from xxhash import xxh3_64_intdigest

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.intp]

_WINDOW_LOG = 17  # blocks of 128 KiB: 14 gains .1 % on packed exponents and is a fifth slower


class _Thread(threading.local):
    def __init__(self) -> None:
        # Huffman only: a match finder that gives up at once. target_length above 0 would switch literals off.
        params = zstandard.ZstdCompressionParameters(
            compression_level=1,
            strategy=zstandard.STRATEGY_FAST,
            hash_log=6,
            min_match=7,
            target_length=0,
            window_log=_WINDOW_LOG,
        )
        self.compressor = zstandard.ZstdCompressor(compression_params=params)
        self.decompressor = zstandard.ZstdDecompressor()
        self.scratch: dict[str, U8] = {}


_thread = _Thread()


def scratch(name: str, size: int) -> U8:
    """``size`` bytes of this thread's memory of that name; whatever was in it."""
    found = _thread.scratch.get(name)
    if found is None or found.size < size:
        found = _thread.scratch[name] = np.empty(size, dtype=np.uint8)
    return found[:size]


def deflate(data: U8) -> bytes:
    """One Huffman-coded frame that says its size."""
    return _thread.compressor.compress(cast(bytes, data))


def inflate(frame: U8, target: U8) -> bool:
    """One zstd frame into exactly ``target``; the size it claims is checked before anything is decoded."""
    try:
        if zstandard.frame_content_size(cast(bytes, frame)) != len(target):
            return False
        with _thread.decompressor.stream_reader(cast(bytes, frame), closefd=False) as reader:
            filled = 0
            while filled < len(target) and (got := reader.readinto(cast(bytearray, target[filled:]))):
                filled += got
    except (zstandard.ZstdError, ValueError):
        return False
    return filled == len(target)


def checksum(data: U8) -> int:
    """xxh3-64 of contiguous bytes; releases the GIL."""
    return xxh3_64_intdigest(cast(bytes, data))


def nonzero(mask: Bools) -> Positions:
    """Where a long mask that is nearly all False is True: eight entries looked at in one step."""
    whole = len(mask) // 8 * 8
    eights = np.flatnonzero(mask[:whole].view(np.uint64) != 0)  # of booleans it is quick
    inside = np.flatnonzero(mask[:whole].reshape(-1, 8)[eights])
    found: Positions = eights[inside >> 3] * 8 + (inside & 7)
    if whole == len(mask):
        return found
    return np.concatenate([found, np.flatnonzero(mask[whole:]) + whole])
