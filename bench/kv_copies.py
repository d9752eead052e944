"""Engine-driven copies against a plain memcpy of the same bytes: 64 pages of Llama-3-8B (2 MiB each).

    python bench/kv_copies.py [--device cuda:0] [--pages 64] [--repetitions 7] [--tiny]

A sidecar in a process of its own holds the pages; this process loads them into a layer-first paged KV in random blocks
and packs that into its own memory, plain and quantised. Cases take their samples in turn; medians of wall time. The
bytes of every case are compared once. ``memcpy`` is one thread's copy of the plain bytes in host memory; on a GPU
``dma`` is one copy of as many bytes from pinned memory, too. Writes ``bench/results/kv_copies.json``; a dry run
(``--tiny``) writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import numpy as np
import torch

import hicache

BLOCK = 16
CODECS = (None, "fp8-e4m3", "int8-g64", "int4-g64")


class Engine:
    """A paged KV, its copier, and one prompt's pages in the sidecar."""

    def __init__(
        self, client: hicache.Client, options: argparse.Namespace, codec: str | None, seed: int
    ) -> None:
        layers, heads, dim = (2, 2, 64) if options.tiny else (32, 8, 128)
        self.pages = options.pages
        shape = (2, 2 * self.pages, BLOCK, heads, dim)
        make = torch.Generator().manual_seed(seed)
        self.kv = [
            torch.randn(shape, generator=make, dtype=torch.bfloat16).to(options.device) for _ in range(layers)
        ]
        self.copier = client.copier(
            self.kv, layout="kv-nhd", page_tokens=BLOCK, codec=codec, threads=options.threads
        )
        self.cache = client.namespace(model="llama-3-8b", **self.copier.namespace_fields())
        order = torch.randperm(2 * self.pages, generator=make)
        self.blocks, self.others = order[: self.pages].numpy(), order[self.pages :].numpy()
        self.prompt = np.arange(self.pages * BLOCK, dtype=np.int32)
        self.fresh = 0
        with self.cache.reserve(self.prompt) as room, self.copier.store(room, self.blocks) as store:
            store.commit()
        self.lease = self.cache.fetch(self.prompt, ttl_ms=600_000)
        assert len(self.lease) == self.pages

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.kv[0].is_cuda:
            torch.cuda.synchronize(self.kv[0].device)

    def load(self, verify: str) -> None:
        self.copier.load(self.lease, self.others, verify=verify).wait()

    def check(self) -> None:
        """The other blocks hold what the first do, or what quantising leaves of it."""
        self.load("on-copy")
        for layer in self.kv:
            first, other = layer[:, self.blocks].float(), layer[:, self.others].float()
            most = 0.0 if not self.copier.kv.codec else float(first.abs().max()) / 4
            assert float((first - other).abs().max()) <= most, "a copy moved wrong bytes"

    def pack(self, verify: str, *, commit: bool = False) -> float:
        """Seconds from the call until packed, or committed. Each time another prompt."""
        self.fresh += 1
        prompt = self.prompt + np.int32(self.fresh * 1_000_003)
        with self.cache.reserve(prompt) as room:
            begin = time.perf_counter()
            with self.copier.store(room, self.blocks, verify=verify) as store:
                if commit:
                    assert store.commit().stored_pages == self.pages
                else:
                    store.wait()
                return time.perf_counter() - begin


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def cases(engines: dict[str, Engine], options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Name -> one sample, in seconds."""
    plain = engines["plain"]
    size = plain.copier.kv.page_bytes * plain.pages
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    found: dict[str, Callable[[], float]] = {"memcpy": lambda: timed(lambda: np.copyto(target, source))}
    if options.device != "cpu":
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(size, dtype=torch.uint8, device=options.device)
        found["dma"] = lambda: timed(lambda: (device.copy_(host, non_blocking=True), plain.wait()))
    for name, engine in engines.items():
        found[f"load {name}"] = lambda e=engine: timed(lambda: e.load("on-copy"))
        found[f"pack {name}"] = lambda e=engine: e.pack("on-copy")
    found["load plain, not verified"] = lambda: timed(lambda: plain.load("off"))
    found["pack plain, not hashed"] = lambda: plain.pack("off")
    found["store plain (pack and commit)"] = lambda: plain.pack("on-copy", commit=True)
    return found


def measure(target: str, options: argparse.Namespace) -> list[dict]:
    with hicache.Client(target, write_limit_bytes=4 << 30) as client:
        engines = {
            codec or "plain": Engine(client, options, codec, seed) for seed, codec in enumerate(CODECS)
        }
        for engine in engines.values():
            engine.check()
        wanted = cases(engines, options)
        taken: dict[str, list[float]] = {name: [] for name in wanted}
        for repetition in range(options.repetitions + 2):  # the first two warm up
            for name, sample in wanted.items():
                seconds = sample()
                if repetition > 1:
                    taken[name].append(seconds)
        size = engines["plain"].copier.kv.page_bytes * options.pages
        yardstick = statistics.median(taken["memcpy"])
        rows = []
        for name, seconds in taken.items():
            median = statistics.median(seconds)
            rows.append(
                {
                    "case": name,
                    "ms": median * 1e3,
                    "ms_min": min(seconds) * 1e3,
                    "ms_max": max(seconds) * 1e3,
                    "kv_gb_s": size / median / 1e9,
                    "of_memcpy": yardstick / median,
                }
            )
            print(f"{name:<32} {median * 1e3:>9.2f} ms  {size / median / 1e9:>7.2f} GB/s of KV"
                  f"  {yardstick / median:>5.2f} of memcpy", flush=True)  # fmt: skip
        choices = getattr(engines["plain"].copier.copies, "choices", {})
        return [*rows, *({"case": f"way of {way}", "choice": str(found)} for way, found in choices.items())]


def main() -> None:
    """Start a sidecar, measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pages", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=harness.MIN_REPETITIONS)
    parser.add_argument("--tiny", action="store_true", help="small pages: checks the bench itself")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hc") as home:
        socket = f"{home}/hc.sock"
        command = [sys.executable, "-m", "hicache", "serve", "--socket-path", socket, "--host-bytes", "3GiB"]
        sidecar = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            rows = measure(f"unix://{socket}", options)
        finally:
            sidecar.terminate()
            sidecar.wait(30)
    if options.tiny:
        print("a dry run: every path moved the right bytes; nothing is written")
        return
    stamp = {"device": options.device, "pages": options.pages, "threads": options.threads,
             "repetitions": options.repetitions, "rows": rows}  # fmt: skip
    harness.write(
        "kv_copies" if options.device == "cpu" else "kv_copies_gpu", stamp, ["torch", "numpy", "xxhash"]
    )


if __name__ == "__main__":
    harness.run(main)
