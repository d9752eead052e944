"""The float codec of format version 1, for reading: one frame of the high bytes, then the low bytes as they are."""

from __future__ import annotations

import numpy as np

from hicache.tier.codec.frames import U8, inflate, scratch


def unpack(payload: U8, target: U8) -> bool:
    """The page into ``target``; False when the payload is not one."""
    if len(target) % 2 or len(payload) < len(target) // 2:
        return False
    words = target.view(np.uint16)
    split = len(payload) - len(words)
    high = scratch("plane", len(words))
    if not inflate(payload[:split], high):
        return False
    np.left_shift(high, 8, out=words, dtype=np.uint16)
    np.bitwise_or(words, payload[split:], out=words)
    return True
