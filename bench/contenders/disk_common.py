"""What every contender of ``bench/disk.py`` does alike: the pages, the folder, the page cache, the clock.

Imported in peers' environments, too: numpy and the standard library only.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DiskSpec:
    """Where the pages are (an .npy of uint8 [pages, page bytes]) and where the store may write."""

    pages_path: str
    folder: str
    copies: int = 1  # how often the pages are stored under other keys, to make a batch

    def load(self) -> np.ndarray:
        pages = np.load(self.pages_path)
        return np.concatenate([pages] * self.copies)


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def drop_from_page_cache(folder: Path) -> None:
    """Write back, then have the kernel forget every file below; nobody may have them mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def disk_bytes(folder: Path) -> int:
    """What ``du`` shows."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def timed_pages(run: Callable[[], object], pages: int, **extra: float) -> dict[str, Any]:
    """One sample: process CPU time (all threads) and wall time a page."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_us": cpu / pages * 1e6, "wall_us": wall / pages * 1e6, "iterations": pages, **extra}
