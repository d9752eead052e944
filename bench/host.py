"""Reading 512 MiB from the host tier through the shared arena, against one-thread memcpy.

    python bench/host.py [--mib 512] [--repetitions 9]

Steps, each sampled in turn with a memcpy of the same size: lease and 512 views (CPU time), touching every byte in
place, copying out to warm memory without and with checksums. Writes ``bench/results/host.json``.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402
import numpy as np  # noqa: E402

import hicache  # noqa: E402
from hicache.cli.sidecar import Sidecar  # noqa: E402

PAGE_BYTES = 1 << 20
PAGE_TOKENS = 64


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    pages = options.mib
    rng = np.random.default_rng(5)
    prompt = rng.integers(0, 1 << 17, PAGE_TOKENS * pages, dtype=np.int32).tobytes()
    target = np.zeros((pages, PAGE_BYTES), np.uint8)
    source = rng.integers(0, 255, (pages, PAGE_BYTES), dtype=np.uint8)
    taken: dict[str, list[float]] = {}
    flags = ["--host-bytes", f"{2 * options.mib + 64}MiB"]
    with (
        tempfile.TemporaryDirectory(prefix="hicache-bench-") as folder,
        Sidecar(Path(folder), flags) as sidecar,
        hicache.Client(sidecar.target) as client,
    ):
        cache = client.namespace(model="bench", page_tokens=PAGE_TOKENS, page_bytes=PAGE_BYTES)
        cache.store(prompt, source)
        for repetition in range(options.repetitions + 1):
            for name, value in one_round(cache, prompt, source, target).items():
                if repetition:
                    taken.setdefault(name, []).append(value)
    found: dict[str, Any] = {name: statistics.median(values) for name, values in taken.items()}
    gib = options.mib / 1024
    memcpy = found["memcpy_s"]
    print(f"{options.mib} MiB in {pages} pages, medians of {options.repetitions}")
    print(f"  lease and {pages} views, CPU      {found['lease_and_views_cpu_ms']:7.2f} ms  (bar 5 ms)")
    print(f"  memcpy, one thread            {gib / memcpy:7.2f} GiB/s")
    for name, label, bar in (
        ("touch_s", "touching every byte in place", ""),
        ("copy_unverified_s", "copy-out without checksums", "  (bar 0.90)"),
        ("copy_verified_s", "copy-out, checksums verified", ""),
    ):
        ratio = memcpy / found[name]
        found[name.replace("_s", "_over_memcpy")] = ratio
        print(f"  {label:<29} {gib / found[name]:7.2f} GiB/s  {ratio:5.2f}x memcpy{bar}")
    harness.write(
        "host", {"mib": options.mib, "page_bytes": PAGE_BYTES, **found, "samples": taken}, ["numpy"]
    )


def one_round(cache: Any, prompt: bytes, source: Any, target: Any) -> dict[str, float]:
    """One sample of every step."""
    found = {"memcpy_s": timed(lambda: np.copyto(target, source))}
    cpu = time.process_time()
    lease = cache.fetch(prompt, wait_ms=1000)
    views = lease.views()
    found["lease_and_views_cpu_ms"] = (time.process_time() - cpu) * 1e3
    assert len(views) == len(source)
    found["touch_s"] = timed(functools.partial(touch, views))
    found["copy_unverified_s"] = timed(lambda: lease.copy_into(target, verify="off"))
    assert np.array_equal(target, source)
    found["copy_verified_s"] = timed(lambda: lease.copy_into(target))
    views.clear()
    lease.release()
    return found


def touch(views: list[memoryview]) -> int:
    """Read every byte in place."""
    return sum(int(np.frombuffer(view, np.uint64).sum()) for view in views)


def timed(call: Any) -> float:
    """Wall seconds."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    harness.run(main)
