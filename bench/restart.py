"""How soon a sidecar serves on a folder full of pages, when all are back, and what calls take meanwhile.

    python bench/restart.py [--pages 1000000] [--page-tokens 16]

The folder is made as ``bench/recovery.py`` makes it (rows in the store format, tiny bodies). Then ``hicache serve``
is started on it; a client calls Match all the time until the recovery is over. Writes ``bench/results/restart.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402
import recovery  # noqa: E402

from hicache import Client  # noqa: E402
from hicache.cli.sidecar import Sidecar  # noqa: E402
from hicache.types import Namespace  # noqa: E402

BAR_S = 10.0
PAGE_BYTES = 1 << 20


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def memory_mib(pid: int) -> float:
    """Its own memory, and the most it has ever had in all."""
    lines = Path(f"/proc/{pid}/status").read_text()
    return int(lines.split("RssAnon:")[1].split()[0]) / 1024


def measure(folder: Path, page_tokens: int) -> dict[str, float]:
    """One restart."""
    flags = ["--host-bytes", "64MiB", "--disk-path", str(folder / "store"), "--disk-bytes", "16GiB"]
    flags += ["--scrub-bytes-per-s", "0"]  # the bodies are no pages: it would take them away
    begin = time.perf_counter()
    with Sidecar(folder, flags) as sidecar, Client(sidecar.target) as client:
        served = time.perf_counter() - begin
        space = client.namespace(model="other", page_tokens=page_tokens, page_bytes=PAGE_BYTES)
        tokens = list(range(page_tokens * 8))
        taken, most_mib = [], 0.0
        while True:
            for _ in range(20):
                start = time.perf_counter()
                space.match(tokens)
                taken.append(time.perf_counter() - start)
            most_mib = max(most_mib, memory_mib(sidecar.pid))
            counters = client.admin.stats().counters
            if not counters["recovering"]:
                break
        whole = time.perf_counter() - begin
        taken.sort()
        return {
            "serving_s": served,
            "recovered_s": whole,
            "pages": counters["recovered_pages"],
            "cpu_s": cpu_s(sidecar.pid),
            "match_p50_ms": statistics.median(taken) * 1e3,
            "match_p99_ms": taken[len(taken) * 99 // 100] * 1e3,
            "match_max_ms": taken[-1] * 1e3,
            "calls": len(taken),
            "peak_anon_mib": most_mib,
            "anon_after_mib": memory_mib(sidecar.pid),
        }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--page-tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3, help="restarts on the same folder (default 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hicache-bench-") as name:
        folder = Path(name)
        space = Namespace("m", options.page_tokens, PAGE_BYTES)
        recovery.write(folder / "store", space, options.pages, shards=4)
        samples = [measure(folder, options.page_tokens) for _ in range(options.repetitions)]
    for sample in samples:
        assert sample["pages"] == options.pages, sample
    found = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    for key, value in found.items():
        bar = f"  (bar {BAR_S:g})" if key == "recovered_s" else ""
        print(f"{key:<16} {value:12.2f}{bar}")
    harness.write("restart", {"bars": {"recovered_s": BAR_S}, **found, "samples": samples})


if __name__ == "__main__":
    harness.run(main)
