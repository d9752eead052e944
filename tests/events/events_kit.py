"""What the tests of events share: prompts, and a picture kept by applying events."""

from __future__ import annotations

from typing import Any

import numpy as np

from hicache.keys import chain_keys
from hicache.rpc.client import EventBatch, WatchKind

PAGE_BYTES = 4096
PAGE_TOKENS = 16
FLAGS = ("--host-bytes", "4MiB", "--host-segment-bytes", "1MiB", "--grace", "1s", "--log-level", "info")


def tokens(pages: int, salt: int = 0) -> Any:
    """Prompts of one salt share their prefix."""
    return np.arange(pages * PAGE_TOKENS, dtype=np.int32) + salt * 1_000_000


def store(client: Any, ids: Any, **namespace: Any) -> Any:
    """Store a prompt; its namespace's handle."""
    fields = {"model": "m", "page_bytes": PAGE_BYTES, "page_tokens": PAGE_TOKENS} | namespace
    handle = client.namespace(**fields)
    pages = len(ids) // PAGE_TOKENS
    rows = (np.arange(pages)[:, None] % 251).astype(np.uint8)
    handle.store(ids, np.repeat(rows, PAGE_BYTES, axis=1))
    return handle


class Picture:
    """What a consumer knows that applies batches and nothing else: (model, tier, key) -> token ids."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str, bytes], bytes] = {}
        self.kinds: list[WatchKind] = []
        self.revision = 0

    def apply(self, batch: EventBatch) -> None:
        self.kinds.append(batch.kind)
        self.revision = batch.revision or self.revision
        if batch.kind is WatchKind.RESET:
            self.held.clear()
        for each in batch.events:
            name = each.namespace.spec.model
            if not each.stored:
                for key in each.keys:
                    del self.held[name, each.tier, key]
                continue
            width = each.namespace.spec.symbol_bytes
            assert each.keys == tuple(
                chain_keys(each.parent or each.namespace.fingerprint, each.symbols, width)
            )
            if each.parent:
                assert any(key == each.parent for _, _, key in self.held), "parents come first"
            for page, key in enumerate(each.keys):
                place = (name, each.tier, key)
                assert place not in self.held, "told twice"
                self.held[place] = each.symbols[page * width : (page + 1) * width]

    def pages(self, tier: str) -> int:
        return sum(place[1] == tier for place in self.held)
