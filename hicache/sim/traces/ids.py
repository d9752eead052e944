"""Block ids: what other formats write, as signed 64-bit numbers; and chaining where a format has none."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import cast

_MASK = (1 << 64) - 1
_SIGN = 1 << 63


def mixed(value: int) -> int:
    """A 64-bit number scrambled, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def signed(value: int) -> int:
    """The same 64 bits as array("q") stores them."""
    return value - (1 << 64) if value & _SIGN else value


def hashed(raw: bytes) -> int:
    """A 64-bit id of any bytes."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


def narrowed(values: Sequence[object]) -> array[int]:
    """Ids of a JSON list, numbers or strings, as 64 bits each; wider ones and strings are hashed.

    Raises TypeError for anything else in the list.
    """
    try:
        found = array("q", cast("Sequence[int]", values))  # what is no number raises here
    except (TypeError, OverflowError):
        return array("q", [_narrow(value) for value in values])
    if bool in map(type, values):
        raise TypeError("block ids must be whole numbers or strings")
    return found


def _narrow(value: object) -> int:
    if isinstance(value, str):
        return hashed(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("block ids must be whole numbers or strings")
    if -_SIGN <= value < _SIGN:
        return value
    return hashed(b"%x" % value)


def chained(values: Iterable[int], root: int = 0) -> array[int]:
    """Ids that stand for a block and everything before it, from ids that stand for a block alone."""
    found = array("q")
    link = root
    for value in values:
        link = mixed(link ^ (value & _MASK))
        found.append(signed(link))
    return found


def token_blocks(tokens: array[int], block_tokens: int) -> array[int]:
    """Chained ids of the whole blocks of a prompt."""
    raw = tokens.tobytes()
    width = block_tokens * tokens.itemsize
    link = bytes(8)
    found = array("q")
    for start in range(0, len(raw) - width + 1, width):
        link = hashlib.blake2b(raw[start : start + width], key=link, digest_size=8).digest()
        found.append(int.from_bytes(link, "little", signed=True))
    return found
