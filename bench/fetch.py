"""A Fetch that hits, from call to answer, over the unix socket: in the host tier and in the device tier.

    python bench/fetch.py [--repetitions 9] [--rounds 60] [--device cpu] [--private]

A prompt of 8,192 tokens is cached in both tiers, once as 512 pages of 16 tokens, once as 128 of 64. Each round asks for
every case once, in turn, so that all of them meet the same machine; a case's sample is the median of its rounds. Beside
them stands a Match of the same prompt (the same bytes in, no lease and no columns out) and the release of a lease.
``readable_device`` is what the bar speaks of: from call to memory that can be read, in place in the pool of the
sidecar's process, under 1 ms. On a GPU that is ``Lease.tensors``, on ``--device cpu`` a view of every page
(``Lease.views``). With ``--private``, where the pool is not shared, there is none, and the answer has no places.
Writes ``bench/results/fetch.json``.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402

import hicache  # noqa: E402
from hicache.cli.sidecar import Sidecar  # noqa: E402

TOKENS, PAGE_BYTES = 8192, 16 << 10
BAR_US = 1000.0


class Cached:
    """A prompt of TOKENS tokens in pages of ``page_tokens``, in the device tier and in the host tier."""

    def __init__(self, client: hicache.Client, page_tokens: int) -> None:
        self.pages = TOKENS // page_tokens
        self.cache = client.namespace(model="bench", page_tokens=page_tokens, page_bytes=PAGE_BYTES)
        self.prompt = b"".join(
            (page_tokens * 1_000_000 + token).to_bytes(4, "little") for token in range(TOKENS)
        )
        with self.cache.reserve(self.prompt) as room:
            room.store([bytes([page % 251]) * PAGE_BYTES for page in range(self.pages)])
        for device in (False, True):
            with self.cache.fetch(self.prompt, wait_ms=20_000, device=device) as lease:
                assert lease.granted_pages == self.pages, (lease.granted_pages, self.pages)

    def match(self) -> dict[str, float]:
        """The prompt there and a few numbers back."""
        begin = time.perf_counter_ns()
        self.cache.match(self.prompt)
        return {"match": (time.perf_counter_ns() - begin) / 1e3}

    def fetch(self, *, device: bool) -> dict[str, float]:
        """A lease of all pages, and its release."""
        begin = time.perf_counter_ns()
        lease = self.cache.fetch(self.prompt, device=device)
        got = time.perf_counter_ns()
        assert lease.granted_pages == self.pages
        lease.release()
        end = time.perf_counter_ns()
        where = "device" if device else "host"
        return {f"fetch_{where}": (got - begin) / 1e3, f"release_{where}": (end - got) / 1e3}

    def readable(self, *, gpu: bool) -> dict[str, float]:
        """A lease in the device tier, and its pages as this process reads them in place."""
        begin = time.perf_counter_ns()
        lease = self.cache.fetch(self.prompt, device=True)
        pages = lease.tensors() if gpu else lease.views()
        got = time.perf_counter_ns()
        assert sum(len(tensor) for tensor in pages) == self.pages if gpu else len(pages) == self.pages
        if not gpu:
            assert pages[-1][-1] == (self.pages - 1) % 251
        lease.release()
        return {"readable_device": (got - begin) / 1e3}


def rounds(cases: dict[str, Callable[[], dict[str, float]]], count: int) -> dict[str, float]:
    """Every case in turn, ``count`` times: medians in microseconds."""
    taken: dict[str, list[float]] = {}
    for _ in range(count):
        for shape, case in cases.items():
            for name, value in case().items():
                taken.setdefault(f"{name}_{shape.split()[0]}_pages_us", []).append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9, help="samples a case, at least 7 (default 9)")
    parser.add_argument("--rounds", type=int, default=60, help="calls a sample (default 60)")
    parser.add_argument("--device", default="cpu", help="of the device tier (default cpu)")
    parser.add_argument(
        "--private", action="store_true", help="without --share-device: no places in the answer"
    )
    options = parser.parse_args()
    flags = ["--device", options.device, "--device-bytes", "64MiB", "--host-bytes", "64MiB"]
    flags += [] if options.private else ["--share-device"]
    with (
        tempfile.TemporaryDirectory() as folder,
        Sidecar(Path(folder), flags) as sidecar,
        hicache.Client(sidecar.target) as client,
    ):
        cases: dict[str, Callable[[], dict[str, float]]] = {}
        for page_tokens in (16, 64):
            cached = Cached(client, page_tokens)
            cases[f"{cached.pages} match"] = cached.match
            cases[f"{cached.pages} host"] = functools.partial(cached.fetch, device=False)
            cases[f"{cached.pages} device"] = functools.partial(cached.fetch, device=True)
            if not options.private:
                gpu = options.device != "cpu"
                cases[f"{cached.pages} readable"] = functools.partial(cached.readable, gpu=gpu)
        rounds(cases, options.rounds)  # warm
        samples = [rounds(cases, options.rounds) for _ in range(options.repetitions)]
    found = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    for name, value in found.items():
        low, high = min(sample[name] for sample in samples), max(sample[name] for sample in samples)
        print(f"{name:<32} {value:8.0f} us  ({low:.0f} to {high:.0f})")
    harness.write("fetch", {"bars": {"readable_device_us": BAR_US}, **found, "samples": samples})


if __name__ == "__main__":
    harness.run(main)
