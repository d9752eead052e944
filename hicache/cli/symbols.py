"""The symbols that stand for a trace's block ids in a hash namespace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

#: Width in bytes of the symbol that stands for one block id.
SYMBOL_BYTES = 16


class Symbols:
    """The 16-byte symbols of ids: a keyed hash, equal in every process; remembered, as ids repeat."""

    def __init__(self, salt: str) -> None:
        self._key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
        self._known: dict[int, bytes] = {}

    def of(self, ids: Iterable[int]) -> bytes:
        """The prompt for a hash namespace: one symbol an id, concatenated."""
        known = self._known
        found = []
        for number in ids:
            symbol = known.get(number)
            if symbol is None:
                raw = number.to_bytes(16, "little", signed=True)
                symbol = known[number] = hashlib.blake2b(
                    raw, key=self._key, digest_size=SYMBOL_BYTES
                ).digest()
            found.append(symbol)
        return b"".join(found)
