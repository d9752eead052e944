"""Pages as an engine's blocks.

A page's last block is named by the page's key, which the next page's key is chained from. Where an engine's blocks are
smaller than pages, the blocks before it are named by SHA-256 over the name of the block before and the block's token
ids: pages that share their beginning share these blocks, so that it is counted how many pages of a medium have one, and
it is gone with the last of them.

What comes of that for routers: blocks can be found by the block, but a fetch gives whole pages.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter

import numpy as np

from hicache.keys import KEY_BYTES
from hicache.rpc.client.watch import PageEvents


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive blocks that a medium has from now on. ``parent`` empty: at the root."""

    parent: bytes
    names: list[bytes]
    token_ids: list[int]
    block_size: int


class Blocks:
    """The blocks of one endpoint. ``block_size`` 0: pages are the blocks."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._inner: dict[
            tuple[str, bytes], bytes
        ] = {}  # (tier, page key) -> names of the blocks before its last
        self._shared: Counter[tuple[str, bytes]] = (
            Counter()
        )  # (tier, name) -> pages that have this inner block

    def fits(self, page_tokens: int) -> bool:
        """Whether pages are a whole number of blocks."""
        return not self._block_size or page_tokens % self._block_size == 0

    def clear(self) -> None:
        """Nothing is stored any more."""
        self._inner.clear()
        self._shared.clear()

    def stored(self, event: PageEvents) -> Stored:
        """What consumers are told of stored pages."""
        page_tokens = event.namespace.spec.page_tokens
        size = self._block_size or page_tokens
        token_ids: list[int] = np.frombuffer(event.symbols, dtype="<i4").tolist()
        if size == page_tokens:
            return Stored(event.parent, list(event.keys), token_ids, size)
        names: list[bytes] = []
        before = event.parent or event.namespace.fingerprint
        width = event.namespace.spec.symbol_bytes
        for page, key in enumerate(event.keys):
            inner = _inner_names(before, event.symbols[page * width : (page + 1) * width], 4 * size)
            self._inner[event.tier, key] = b"".join(inner)
            self._shared.update((event.tier, name) for name in inner)
            names += [*inner, key]
            before = key
        return Stored(event.parent, names, token_ids, size)

    def removed(self, event: PageEvents) -> list[bytes]:
        """The blocks that a medium has no longer, when pages left it."""
        gone: list[bytes] = []
        for key in event.keys:
            inner = self._inner.pop((event.tier, key), b"")
            for at in range(0, len(inner), KEY_BYTES):
                place = (event.tier, inner[at : at + KEY_BYTES])
                self._shared[place] -= 1
                if not self._shared[place]:
                    del self._shared[place]
                    gone.append(place[1])
            gone.append(key)
        return gone


def _inner_names(before: bytes, symbol: bytes, block_bytes: int) -> list[bytes]:
    """The names of all blocks of a page but its last."""
    names = []
    for at in range(0, len(symbol) - block_bytes, block_bytes):
        before = hashlib.sha256(before + symbol[at : at + block_bytes]).digest()
        names.append(before)
    return names
