"""The offline optimum beside a sweep's capacities: Belady with the running request pinned, kept from run to run."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

from hicache.sim.oracle import belady
from hicache.sim.packed import PackedTrace


def optimum(
    trace: PackedTrace, capacities: Sequence[int], folder: Path, *, jobs: int
) -> list[tuple[int, float]]:
    """(pages, best hit ratio) of each capacity, in order."""
    path = folder / trace.path.with_suffix(".optimum.json").name
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = sorted(set(capacities))
    todo = [pages for pages in wanted if str(pages) not in known]
    if todo:
        known |= zip(map(str, todo), _ratios(trace.path, todo, jobs), strict=True)
        path.write_text(json.dumps(known) + "\n", encoding="utf-8")
    return [(pages, known[str(pages)]) for pages in wanted]


def _ratios(path: Path, capacities: Sequence[int], jobs: int) -> list[float]:
    if jobs <= 1:
        return [_ratio(path, pages) for pages in capacities]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(jobs, len(capacities)), context) as pool:
        return list(pool.map(_ratio, [path] * len(capacities), capacities))


def _ratio(path: Path, pages: int) -> float:
    with PackedTrace(path) as trace:
        return belady([memoryview(row[5]).cast("q")[::2].tolist() for row in trace], pages).ratio
