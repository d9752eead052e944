"""Many times the capacity written with random evictions: does the disk store stay as fast, and within its bound?

    python bench/churn.py [--capacity-mib 1024] [--turns 20] [--page-kib 2048 ...] [--sync] [--folder DIR]

Writes ``turns`` times the capacity; when the charges reach ``usable_bytes`` random pages are deleted, as an engine
would. Pages are noise in the low byte of each 16-bit word and Gaussian in the high one, like bf16. Reports, as JSON,
raw bytes per second of wall and of CPU time for each tenth, the last tenth against the first one after the fill, the
highest disk use seen (``st_blocks``), open files, memory and reader slots at the beginning and at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from hicache.tier.disk import DiskStore
from hicache.types import Batch, Completion, Op, Outcome

BATCH_BYTES = 16 << 20
WINDOW = 4


class Client:
    """Batches under way, the pages stored, and the charges they come to."""

    def __init__(self, folder: Path, capacity_bytes: int, **options: Any) -> None:
        self._woken = threading.Event()
        self._ids = itertools.count(1)
        self._issued: dict[int, list[bytes]] = {}
        self.live: list[tuple[bytes, int]] = []
        self.used_bytes = 0
        self.refused = 0
        self.store = DiskStore(folder, capacity_bytes, self._woken.set, **options)

    def submit(self, op: Op, keys: list[bytes], buffers: list[memoryview], page_bytes: int) -> None:
        number = next(self._ids)
        self._issued[number] = keys if op is Op.PUT else []
        self.store.submit(Batch(number, op, page_bytes, keys=keys, buffers=buffers))

    def wait(self, window: int) -> None:
        while True:
            self._woken.clear()
            for done in self.store.poll():
                self._take(done)
            if len(self._issued) <= window:
                return
            self._woken.wait(60)

    def _take(self, done: Completion) -> None:
        keys = self._issued.pop(done.id)
        for key, outcome, charge in zip(keys, done.outcomes, done.charges, strict=False):
            if outcome is Outcome.OK:
                self.live.append((key, charge))
                self.used_bytes += charge
            else:
                self.refused += 1

    def make_room(self, size: int, rng: random.Random) -> None:
        """Delete random pages, as many as the engine would."""
        doomed = []
        while self.live and self.used_bytes + size > self.store.usable_bytes:
            at = rng.randrange(len(self.live))
            self.live[at], self.live[-1] = self.live[-1], self.live[at]
            key, charge = self.live.pop()
            doomed.append(key)
            self.used_bytes -= charge
        if doomed:
            self.submit(Op.DELETE, doomed, [], 0)


def pages(page_bytes: int, count: int, rng: np.random.Generator) -> list[memoryview]:
    words = (rng.standard_normal((count, page_bytes // 2), dtype=np.float32).view(np.uint32) >> 16).astype(
        "<u2"
    )
    return [memoryview(row.view(np.uint8)) for row in words]  # type: ignore[arg-type]


def disk_use(folder: Path) -> int:
    total = 0
    for path in (folder, *folder.rglob("*")):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def held() -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"fds": len(os.listdir("/proc/self/fd")), "anon_kib": int(status["RssAnon"].split()[0])}  # noqa: PTH208


def churn(
    folder: Path, capacity_bytes: int, turns: float, sizes: list[int], **options: Any
) -> dict[str, Any]:
    """Run it; the report."""
    rng = random.Random(1)
    client = Client(folder, capacity_bytes, **options)
    sources = {size: pages(size, 8, np.random.default_rng(size)) for size in sizes}
    total, written, number, highest = int(capacity_bytes * turns), 0, 0, 0
    tenths: list[dict[str, float]] = []
    begin = {}
    wall, cpu, mark = time.monotonic(), time.process_time(), 0
    while written < total:
        size = rng.choice(sizes)
        count = max(1, min(BATCH_BYTES, capacity_bytes // 32) // size)
        keys = [hashlib.sha256(b"%d" % (number + n)).digest() for n in range(count)]
        number += count
        client.make_room((size + 8192) * count * (WINDOW + 1), rng)
        client.submit(Op.PUT, keys, [rng.choice(sources[size]) for _ in keys], size)
        written += size * count
        client.wait(WINDOW)
        highest = max(highest, disk_use(folder))
        if written - mark >= total // 10:
            now, now_cpu = time.monotonic(), time.process_time()
            rate = (written - mark) / 1e9
            tenths.append({"wall_gbps": rate / (now - wall), "cpu_gbps": rate / (now_cpu - cpu)})
            wall, cpu, mark = now, now_cpu, written
            begin = begin or held()
    client.wait(0)
    stats = client.store.stats
    readers = sum(s.db.env.info()["num_readers"] for s in client.store._shelf.shards)
    commits = sum(s.db.env.info()["last_txnid"] for s in client.store._shelf.shards)
    end = held()
    report = {
        "capacity_bytes": capacity_bytes,
        "page_bytes": sizes,
        "tenths": tenths,
        "last_over_first_cpu": tenths[-1]["cpu_gbps"] / tenths[0]["cpu_gbps"],
        "last_over_second_cpu": tenths[-1]["cpu_gbps"] / tenths[1]["cpu_gbps"],
        "last_over_first_wall": tenths[-1]["wall_gbps"] / tenths[0]["wall_gbps"],
        "highest_disk_use": highest,
        "refused_pages": client.refused,
        "begin": begin,
        "end": end,
        "reader_slots": readers,
        "map_full": stats.map_full,
        "pieces_pages": stats.pieces_pages,
        "pages": stats.pages,
        "commits": commits,
        "commits_per_page": commits / max(1, stats.pages),
        "evacuations": stats.evacuations,
        "evacuated_bytes": stats.evacuated_bytes,
    }
    client.store.close()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capacity-mib", type=int, default=1024)
    parser.add_argument("--turns", type=float, default=20)
    parser.add_argument("--page-kib", type=int, nargs="+", default=[2048])
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        sizes = [kib << 10 for kib in options.page_kib]
        capacity = options.capacity_mib << 20
        report = churn(Path(name) / "store", capacity, options.turns, sizes, sync=options.sync)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
