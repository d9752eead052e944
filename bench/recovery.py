"""Warm restart, the store's side: rows of N pages in the store's own format, tiny bodies, read back as chains.

    python bench/recovery.py [--pages 1000000] [--page-tokens 16] [--shards 4] [--folder DIR]

Rows are written straight through LMDB (making them through the store would take most of the time). Reading happens
in a process of its own; its CPU time, wall time and growth of peak memory are reported as JSON, and checked: every
page comes back.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from hicache.keys import chain_keys, fingerprint
from hicache.tier.disk import DiskStore, Layout
from hicache.tier.rows import pack_namespace, pack_row
from hicache.tier.shards import create_shard, open_shard
from hicache.types import Namespace, PageRecord

CHAIN_PAGES = 64


class Sampler:
    """Growth of the process's own memory (KiB); pages of the mapped files are the kernel's."""

    def __init__(self) -> None:
        self._first = self._most = self._now()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._most - self._first

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def _run(self) -> None:
        while not self._stopped.wait(0.01):
            self._most = max(self._most, self._now())


def write(folder: Path, namespace: Namespace, pages: int, shards: int) -> None:
    """Chains of about 64 pages, half of them forking off an earlier page."""
    store = DiskStore(folder, 1 << 32, lambda: None, layout=Layout(shard_bytes=900 << 20))
    store.close()
    rng, space, width = random.Random(1), fingerprint(namespace), namespace.symbol_bytes
    tips, left = [space], pages
    for number in range(shards):
        info = create_shard(folder, number, size_class_bytes=namespace.page_bytes, map_bytes=900 << 20)
        db = open_shard(info.path, map_bytes=info.map_bytes, readonly=False)
        share = left // (shards - number)
        left -= share
        rows = []
        while len(rows) < share:
            parent = rng.choice(tips[-1000:]) if rng.random() < 0.5 else space
            count = min(CHAIN_PAGES, share - len(rows))
            symbols = rng.randbytes(width * count)
            for at, key in enumerate(chain_keys(parent, symbols, width)):
                record = PageRecord(space, parent, symbols[at * width : (at + 1) * width])
                row = pack_row(4096, record, last_use_ms=rng.randrange(1 << 40), hits=rng.randrange(100))
                rows.append((key, row))
                parent = key
                if rng.random() < 0.1:
                    tips.append(key)
        with db.env.begin(write=True) as txn:
            txn.put(space, pack_namespace(namespace), db=db.namespaces)
            for key, row in sorted(rows):
                txn.put(key, b"body", db=db.pages)
                txn.put(key, row, db=db.meta)
        db.env.close()


def read(folder: Path) -> dict[str, float]:
    """Recover everything; called in a process of its own."""
    store = DiskStore(folder, 1 << 33, lambda: None, layout=Layout(shard_bytes=900 << 20))
    sampler = Sampler()
    recovery = store.recover()
    wall, cpu = time.monotonic(), time.thread_time()
    first_s, pages, chains = 0.0, 0, 0
    for chain in recovery:
        first_s = first_s or time.monotonic() - wall
        pages += len(chain.keys)
        chains += 1
    took = {
        "pages": pages,
        "chains": chains,
        "orphans": len(recovery.orphans),
        "cpu_s": time.thread_time() - cpu,
        "wall_s": time.monotonic() - wall,
        "first_chain_s": first_s,
        "peak_growth_mib": sampler.stop() / 1024,
    }
    store.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--read", action="store_true", help="read a folder that was made before, print JSON")
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "store"
        write(folder, Namespace("m", options.page_tokens, 1 << 20), options.pages, options.shards)
        ran = subprocess.run(
            [sys.executable, __file__, "--read", "--folder", str(folder)], check=True, capture_output=True
        )
        took = json.loads(ran.stdout)
        assert took["pages"] == options.pages, took
        print(json.dumps(took, indent=2))


if __name__ == "__main__":
    main()
