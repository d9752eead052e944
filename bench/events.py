"""What watchers cost the engine: nothing without one; with one, the announcing; and how long a snapshot holds it up.

    python bench/events.py [--repetitions 9] [--pages 1000000]

CPU time of the engine's thread. Fetch with its release and a store of 16 pages, unwatched and watched, take turns in
one run. Then a survey of one million pages (in conversations of 1,000 pages that share nothing, and a tenth as many as
prompts of a single page, the dearest layout): what its pieces take, one engine step each, between which everything
else is served. Standard library only. Writes ``bench/results/events.json``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from array import array
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402
from engine import PAGE_TOKENS, PAGES, Bench  # noqa: E402

from hicache.engine import actions as act  # noqa: E402
from hicache.engine import events as ev  # noqa: E402
from hicache.keys import KEY_BYTES  # noqa: E402

PROMPTS = 200
STORED_PAGES = 16
LONG = 1000


def prompt(number: int, pages: int) -> bytes:
    """No two of them share a page."""
    return array("i", [number] * PAGE_TOKENS).tobytes() + bytes(4 * PAGE_TOKENS * (pages - 1))


def pass_once(bench: Bench, prompts: list[bytes], first: int) -> tuple[float, float]:
    """Microseconds of a Fetch with its release, and of a store."""
    begin = time.thread_time_ns()
    for number, each in enumerate(prompts):
        reply = bench.engine.handle(ev.Fetch(10**9 + number, 1, 1, each), bench.now)[-1]
        assert isinstance(reply, act.Reply) and isinstance(reply.result, act.FetchResult)
        bench.engine.handle(ev.ReleaseLeases(1, [reply.result.lease]), bench.now)
    fetched_ns = time.thread_time_ns() - begin
    fresh = [prompt(first + number, STORED_PAGES) for number in range(PROMPTS)]
    begin = time.thread_time_ns()
    for each in fresh:
        bench.store(each)
    return fetched_ns / len(prompts) / 1e3, (time.thread_time_ns() - begin) / PROMPTS / 1e3


def watching(repetitions: int) -> dict[str, float]:
    """Medians, unwatched and watched in turns."""
    bench = Bench(PROMPTS * PAGES + 2 * (repetitions + 1) * PROMPTS * STORED_PAGES)
    prompts = [prompt(number, PAGES) for number in range(PROMPTS)]
    for each in prompts:
        bench.store(each)
    taken: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):  # the first one warms up
        for on in (False, True):
            bench.engine.handle(ev.Watching(on), bench.now)
            fetch, store = pass_once(bench, prompts, 10**6 * (2 * repetition + on + 1))
            for name, value in (("fetch", fetch), ("store_16", store)) if repetition else ():
                taken.setdefault(f"{name}_{'watched' if on else 'unwatched'}_us", []).append(value)
    return {name: statistics.median(values) for name, values in taken.items()}


def survey(label: str, prompts: int, pages: int) -> dict[str, float]:
    """Milliseconds of a survey's pieces."""
    bench = Bench(prompts * pages)
    for number in range(prompts):
        bench.store(prompt(number, pages))
    gc.collect()
    gc.freeze()  # what the collector does with a million objects is not the survey's
    bench.engine.handle(ev.Watching(on=True), bench.now)
    bench.engine.handle(ev.SurveyOpened(1, ""), bench.now)
    taken, told, done = [], 0, False
    while not done:
        begin = time.thread_time_ns()
        actions = bench.engine.handle(ev.SurveyNext(1), bench.now)
        taken.append((time.thread_time_ns() - begin) / 1e6)
        told += sum(len(each.keys) // KEY_BYTES for each in actions if isinstance(each, act.Announce))
        done = any(isinstance(each, act.SurveyDone) for each in actions)
    gc.unfreeze()
    assert told == prompts * pages
    taken.sort()
    return {
        f"{label}_pages": told,
        f"{label}_pieces": len(taken),
        f"{label}_piece_ms": statistics.median(taken),
        f"{label}_piece_p99_ms": taken[int(0.99 * len(taken))],
        f"{label}_piece_max_ms": taken[-1],
        f"{label}_total_s": sum(taken) / 1e3,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9, help="at least 7 (default 9)")
    parser.add_argument("--pages", type=int, default=1_000_000, help="of the surveyed tree (default 1000000)")
    options = parser.parse_args()
    found = watching(options.repetitions)
    found |= survey("conversations", options.pages // LONG, LONG)
    found |= survey("single_pages", options.pages // 10, 1)
    for name, value in found.items():
        print(f"{name:<30} {value:12.2f}")
    harness.write("events", found)


if __name__ == "__main__":
    harness.run(main)
