"""Many prompts in one call: what is refused as a whole, and what spoils one prompt only."""

from __future__ import annotations

import numpy as np
import pytest
from sidecars import BareSidecar

from hicache.errors import InvalidArgumentError, UnavailableError
from hicache.rpc.client import Client
from hicache.rpc.client.batch import StoreAsk
from hicache.rpc.client.batching import Batches, PageSource

PAGE_BYTES = 4096
ASK = StoreAsk(wait_ms=100)


def symbol(number: int) -> bytes:
    return number.to_bytes(32, "big")


def page(number: int) -> PageSource:
    return PageSource([np.full(PAGE_BYTES, number, np.uint8)])


def test_prompts_of_two_pages(shared_sidecar: BareSidecar) -> None:
    with Client(shared_sidecar.target) as client:
        space = client.namespace(
            model="batches", page_bytes=PAGE_BYTES, symbol_kind="hashes", symbol_hash_bytes=32
        )
        batches = Batches(client, space)
        assert batches.match([], 5) == []
        assert batches.store([], ASK, 5) == []
        both, first = symbol(1) + symbol(2), symbol(3)
        found = batches.store([(both, [page(1), page(2)])], ASK, 5)
        assert [(each.present_pages, each.stored_pages, each.reason) for each in found] == [(0, 2, "")]
        assert batches.match([both, symbol(1) + first], 5) == [2, 1]
        found = batches.store([(symbol(1) + first, [page(9), page(3)])], ASK, 5)
        assert [(each.present_pages, each.stored_pages) for each in found] == [(1, 1)]
        with space.fetch(symbol(1) + first) as lease:
            assert [view[0] for view in lease.views()] == [1, 3]
        with pytest.raises(InvalidArgumentError, match="one length"):
            batches.match([both, first], 5)
        with pytest.raises(InvalidArgumentError, match="one length"):
            batches.match([b"short"], 5)
        with pytest.raises(InvalidArgumentError, match="one entry a page"):
            batches.store([(both, [page(1)])], ASK, 5)
        with pytest.raises(UnavailableError, match="0 of 1 prompts"):
            batches.store([(both, [page(1), page(2)])], ASK, 0)
        assert client.core.memory.used_bytes == 0
        assert client.admin.check().ok
