"""A durable store owes durability for pages that were there before, too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from sidecars import Sidecar

import hicache
import hicache.aio

PAGES = 10
TOKENS = np.arange(64 * PAGES, dtype=np.int32)
CONTENT = np.arange(PAGES, dtype=np.uint8)[:, None] + np.arange(8192, dtype=np.uint8)


def sidecar(folder: Path) -> Sidecar:
    return Sidecar(
        folder, ["--host-bytes", "64MiB", "--disk-path", str(folder / "disk"), "--disk-bytes", "256MiB"]
    )


def test_a_durable_store_saves_pages_that_were_only_visible(tmp_path: Path) -> None:
    """Pages stored without durability survive kill -9 once somebody stores them durably."""
    with sidecar(tmp_path) as server, hicache.Client(server.target) as client:
        cache = client.namespace(model="m", page_bytes=CONTENT.shape[1])
        assert cache.store(TOKENS, CONTENT).committed.stored_pages == PAGES
        again = cache.store(TOKENS, CONTENT, durable=True)
        assert (again.present_pages, again.committed.stored_pages) == (PAGES, 0)
        assert again.committed.durable_pages == PAGES
        server.kill()
        server.start()
        out = np.zeros_like(CONTENT)
        assert cache.load(TOKENS, out) == PAGES
        assert np.array_equal(out, CONTENT)


@pytest.mark.parametrize("disk", [False, True])
def test_the_asyncio_client_says_how_many_pages_are_durable(tmp_path: Path, disk: bool) -> None:
    """Without a durable tier a durable store keeps the pages and says that none is durable."""

    async def run(target: str) -> int:
        async with hicache.aio.Client(target) as client:
            cache = client.namespace(model="m", page_bytes=CONTENT.shape[1])
            await cache.store(TOKENS, CONTENT)
            return (await cache.store(TOKENS, CONTENT, durable=True)).committed.durable_pages

    with sidecar(tmp_path) if disk else Sidecar(tmp_path, ["--host-bytes", "64MiB"]) as server:
        assert asyncio.run(run(server.target)) == (PAGES if disk else 0)
