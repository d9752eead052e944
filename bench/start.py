"""How soon a sidecar serves, and what memory it takes besides its pools.

    python bench/start.py [--repetitions 9] [--host-bytes 1GiB]

Starts ``hicache serve`` (host and disk tiers; torch, if it is installed, is not loaded) and waits for SERVING.
RssAnon is read after two seconds: the pools are shared memory and do not count in it. Writes
``bench/results/start.json``.
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

from hicache.cli.sidecar import Sidecar  # noqa: E402


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--host-bytes", default="1GiB")
    options = parser.parse_args()
    starts, anon, modules = [], [], set()
    for _ in range(options.repetitions + 1):
        with tempfile.TemporaryDirectory(prefix="hicache-bench-") as folder:
            flags = [
                "--host-bytes",
                options.host_bytes,
                "--disk-path",
                f"{folder}/disk",
                "--disk-bytes",
                "1GiB",
            ]
            begin = time.perf_counter()
            with Sidecar(Path(folder), flags) as sidecar:
                starts.append(time.perf_counter() - begin)
                time.sleep(2)
                status = Path(f"/proc/{sidecar.pid}/status").read_text()
                anon.append(int(status.split("RssAnon:")[1].split()[0]) / 1024)
                maps = Path(f"/proc/{sidecar.pid}/maps").read_text()
                modules |= {name for name in ("libtorch", "lmdb", "zstandard") if name in maps}
    starts, anon = starts[1:], anon[1:]
    print(
        f"SERVING after   {statistics.median(starts):6.2f} s    (bar 1.5 s; {min(starts):.2f} to {max(starts):.2f})"
    )
    print(f"RssAnon         {statistics.median(anon):6.1f} MiB  (bar 120 MiB; up to {max(anon):.1f})")
    print(f"torch loaded    {'yes' if 'libtorch' in modules else 'no'}")
    harness.write(
        "start",
        {
            "host_bytes": options.host_bytes,
            "serving_s": statistics.median(starts),
            "rss_anon_mib": statistics.median(anon),
            "torch_loaded": "libtorch" in modules,
            "samples_s": starts,
            "samples_mib": anon,
        },
        ["grpcio", "lmdb", "zstandard", "numpy"],
    )


if __name__ == "__main__":
    harness.run(main)
