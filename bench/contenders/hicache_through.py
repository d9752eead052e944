"""The whole path of ``bench/disk.py``: pages through a sidecar to its disk tier and back, CPU time of both ends.

store_durable  pages written to the client's region, committed with ``ack=DURABLE``: copied in, compressed, on disk
fetch_cold     pages that are only in the disk tier: promoted, leased, copied into the client's memory and verified

CPU time is the client's (this process) plus the sidecar's (all threads). The host tier holds one round only, so each
round pushes the one before out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import numpy as np  # noqa: E402
from contender import serve  # noqa: E402

import hicache  # noqa: E402

PAGE_TOKENS = 16
WAIT_MS = 60_000
#: Until the disk tier is full: after that the file grows no more and every round evicts as much as it stores.
WARM_ROUNDS = 6


class Bench:
    """One client of one sidecar."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.pages = np.load(spec["pages_path"])
        self.server_pid = int(spec["server_pid"])
        self.client = hicache.Client(spec["target"])
        self.cache = self.client.namespace(
            model="bench",
            page_tokens=PAGE_TOKENS,
            page_bytes=self.pages.shape[1],
            kv_dtype="bfloat16",
            **spec["hints"],
        )
        self.views = [memoryview(page) for page in self.pages]
        self.into = bytearray(self.pages.nbytes)
        self.round = 0

    def prompt(self, number: int) -> bytes:
        tokens = np.zeros((len(self.pages), PAGE_TOKENS), np.int32)
        tokens[:, 0], tokens[:, 1] = number, np.arange(len(self.pages))
        return tokens.tobytes()

    def both_cpu_s(self) -> float:
        fields = Path(f"/proc/{self.server_pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + time.process_time()

    def timed(self, run: Callable[[], object]) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), self.both_cpu_s()
        run()
        cpu, wall = self.both_cpu_s() - cpu, time.perf_counter() - wall
        count = len(self.pages)
        return {"cpu_us": cpu / count * 1e6, "wall_us": wall / count * 1e6, "iterations": count}

    def store(self) -> None:
        self.round += 1
        result = self.cache.store(self.prompt(self.round), self.views, durable=True)
        if result.committed.durable_pages != len(self.views):
            raise RuntimeError(f"stored {result}")

    def fetch(self, number: int) -> None:
        with self.cache.fetch(self.prompt(number), wait_ms=WAIT_MS) as lease:
            if lease.granted_pages != len(self.views):
                raise RuntimeError(f"granted {lease.granted_pages} of {len(self.views)} pages")
            lease.copy_into(self.into)

    def store_durable(self) -> Callable[[], dict[str, Any]]:
        for _ in range(WARM_ROUNDS):
            self.store()
        return lambda: self.timed(self.store)

    def fetch_cold(self) -> Callable[[], dict[str, Any]]:
        first = self.round + 1
        for _ in range(3):
            self.store()
        at = 0

        def sample() -> dict[str, Any]:
            nonlocal at
            number = first + at % 3  # the one whose turn was longest ago: out of the host tier by now
            at += 1
            self.into[: len(self.into)] = bytes(len(self.into))
            taken = self.timed(lambda: self.fetch(number))
            if self.into != self.pages.tobytes():
                raise RuntimeError("the pages read are not the pages stored")
            return taken

        return sample


def prepare(spec: dict[str, Any]) -> dict[str, Callable[[], Callable[[], dict[str, Any]]]]:
    bench = Bench(spec)
    return {"store_durable": bench.store_durable, "fetch_cold": bench.fetch_cold}


if __name__ == "__main__":
    serve("hicache through the sidecar", prepare, lambda: {"hicache": hicache.__version__})  # type: ignore[arg-type]
