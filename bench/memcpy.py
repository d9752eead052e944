"""How fast one thread copies memory here: the yardstick for bulk figures.

    python bench/memcpy.py [--mib 512]

Needs numpy. As a library: ``from memcpy import memcpy_gib_s``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness
import numpy as np


def memcpy_samples(mib: int = 512, repetitions: int = 9) -> list[float]:
    """GiB/s of ``numpy.copyto`` between two warm buffers, one value a repetition."""
    source = np.arange(mib << 17, dtype=np.int64)
    target = np.empty_like(source)
    np.copyto(target, source)  # first touch
    taken = []
    for _ in range(repetitions):
        start = time.perf_counter()
        np.copyto(target, source)
        taken.append(mib / 1024 / (time.perf_counter() - start))
    return taken


def memcpy_gib_s(mib: int = 512, repetitions: int = 9) -> float:
    """The median of ``memcpy_samples``."""
    return statistics.median(memcpy_samples(mib, repetitions))


def main() -> None:
    """Measure and write ``bench/results/memcpy.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512)
    options = parser.parse_args()
    taken = memcpy_samples(options.mib)
    median = statistics.median(taken)
    print(
        f"memcpy, one thread, {options.mib} MiB: {median:.2f} GiB/s (min {min(taken):.2f}, max {max(taken):.2f})"
    )
    harness.write("memcpy", {"mib": options.mib, "gib_s": median, "samples_gib_s": taken}, ["numpy"])


if __name__ == "__main__":
    harness.run(main)
