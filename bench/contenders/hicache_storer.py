"""Stores new prompts at full rate for some seconds: the load of ``bench/rpc.py``. Prints a line when it has begun and
one when it ends."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np

import hicache

PAGE_TOKENS, PAGE_BYTES, PAGES = 64, 1 << 20, 32


def main() -> None:
    """``hicache_storer.py TARGET SECONDS``."""
    target, seconds = sys.argv[1], float(sys.argv[2])
    rng = np.random.default_rng(11)
    content = rng.standard_normal(PAGE_BYTES // 4, dtype=np.float32).astype(np.float16).view(np.uint8)
    page = np.concatenate([content, content]).tobytes()
    stored = 0
    with hicache.Client(target) as client:
        cache = client.namespace(model="load", page_tokens=PAGE_TOKENS, page_bytes=PAGE_BYTES)
        cache.match(bytes(256))
        print("storing", flush=True)
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            prompt = rng.integers(0, 1 << 17, PAGE_TOKENS * PAGES, dtype=np.int32).tobytes()
            with cache.reserve(prompt, wait_ms=20_000) as reservation:
                stored += reservation.store([page] * PAGES).committed.stored_pages
        took = time.monotonic() - begin
    print(f"{stored} pages, {stored * PAGE_BYTES / took / 2**30:.2f} GiB/s over {took:.1f} s", flush=True)


if __name__ == "__main__":
    main()
