"""Two clients that store one prompt at once: the first copy stays, and differing bytes are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sidecars import Sidecar

import hicache

PAGES = 3
TOKENS = np.arange(64 * PAGES, dtype=np.int32)


def test_the_first_copy_stays_and_differing_pages_are_counted(tmp_path: Path) -> None:
    """Both reserved before either committed; the later commit changes nothing and is no error."""
    first = np.full((PAGES, 4096), 7, np.uint8)
    later = first.copy()
    later[1] = 8
    with Sidecar(tmp_path, ["--host-bytes", "64MiB"]) as server, hicache.Client(server.target) as client:
        cache = client.namespace(model="m", page_bytes=4096)
        with cache.reserve(TOKENS) as one, cache.reserve(TOKENS) as other:
            assert one.store(first).committed.stored_pages == PAGES
            assert other.store(later).committed.already_present_pages == PAGES
        out = np.empty_like(first)
        assert cache.load(TOKENS, out) == PAGES
        assert np.array_equal(out, first)
        assert client.admin.stats().counters["differing_pages"] == 1
