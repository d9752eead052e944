"""What one event costs the engine: Fetch, Release, a store, an eviction. No I/O, no copies, no gRPC.

    python bench/engine.py [--repetitions 9]

A prompt of 8,192 tokens (128 pages of 64) is resident in the host tier, in 1, 20 or 64 runs; a Fetch is match, touch,
lease and plan, no page key is computed. Standard library only. Writes ``bench/results/engine.json``.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import harness  # noqa: E402

from hicache.engine import Engine, EngineOptions  # noqa: E402
from hicache.engine import actions as act  # noqa: E402
from hicache.engine import events as ev  # noqa: E402
from hicache.keys import fingerprint  # noqa: E402
from hicache.types import Namespace, TierKind, TierSpec  # noqa: E402

PAGE_TOKENS, PAGES = 64, 128
PAGE_BYTES = 4096
WIDTH = 4 * PAGE_TOKENS
ITERATIONS = 400
BAR_FETCH_20_RUNS_US = 60.0


class Bench:
    """An engine whose copies are done at once."""

    def __init__(self, pages: int) -> None:
        size = -(-pages // 16) * 16 * PAGE_BYTES
        spec = TierSpec("host", TierKind.HOST, size, segment_bytes=size // 16, client_readable=True)
        self.engine = Engine(EngineOptions((spec,)))
        self.requests = itertools.count(1)
        self.now = 1
        space = Namespace("bench", PAGE_TOKENS, PAGE_BYTES)
        self.engine.handle(ev.NamespaceOpened(1, space, fingerprint(space)), self.now)
        self.engine.handle(ev.SessionOpened(1, "default"), self.now)

    def ask(self, make: type, **fields: object) -> act.Result:
        """Hand an event in; copies that it starts are done before its answer is looked for."""
        request = next(self.requests)
        todo: list[ev.Event] = [make(request=request, **fields)]
        answer = None
        while todo:
            for action in self.engine.handle(todo.pop(), self.now):
                if isinstance(action, act.CopyIn | act.Copy):
                    todo.append(ev.CopyDone(action.copy))
                elif isinstance(action, act.Reply) and action.request == request:
                    answer = action.result
        assert answer is not None and not isinstance(answer, act.Failure), answer
        return answer

    def store(self, prompt: bytes) -> None:
        """Reserve and commit what is missing."""
        room = self.ask(ev.Reserve, session=1, namespace=1, prompt=prompt)
        assert isinstance(room, act.ReserveResult)
        if room.reservation:
            pieces = [(room.present_pages, room.missing_pages)]
            self.ask(
                ev.Commit, session=1, reservation=room.reservation, pieces=pieces, source=None, last=True
            )


def fetch(runs: int, rng: random.Random) -> tuple[float, float]:
    """Microseconds of a Fetch over ``runs`` runs, and of the release of its lease: medians over ITERATIONS."""
    bench = Bench(4 * PAGES + runs)
    prompt = rng.randbytes(WIDTH * PAGES)
    for turn in range(1, runs + 1):
        end = PAGES if turn == runs else turn * (PAGES // runs)
        bench.store(prompt[: end * WIDTH])
        bench.now += 1
        if turn < runs:
            bench.store(prompt[: end * WIDTH] + rng.randbytes(WIDTH))  # a branch, so that the runs stay apart
    fetched, released = [], []
    for number in range(ITERATIONS):
        event = ev.Fetch(10**6 + number, 1, 1, prompt)
        begin = time.perf_counter_ns()
        actions = bench.engine.handle(event, bench.now)
        fetched.append(time.perf_counter_ns() - begin)
        reply = actions[-1]
        assert isinstance(reply, act.Reply) and isinstance(reply.result, act.FetchResult)
        assert reply.result.granted_pages == PAGES
        begin = time.perf_counter_ns()
        bench.engine.handle(ev.ReleaseLeases(1, [reply.result.lease]), bench.now)
        released.append(time.perf_counter_ns() - begin)
    return statistics.median(fetched) / 1e3, statistics.median(released) / 1e3


def churn(leaves: int, rng: random.Random) -> float:
    """Microseconds of a whole store of one page that must evict one, with so many leaves: a median."""
    bench = Bench(leaves)
    while not (stats := bench.engine.stats()).tiers[0].pages or stats.tiers[0].pages < leaves - leaves % 16:
        for _ in range(max(leaves // 20, 1)):
            bench.store(rng.randbytes(WIDTH))
        bench.now += 1
        if bench.engine.stats().counters.dropped_pages[0]:
            break
    prompts = [rng.randbytes(WIDTH) for _ in range(ITERATIONS)]
    taken = []
    for prompt in prompts:
        begin = time.perf_counter_ns()
        bench.store(prompt)
        taken.append(time.perf_counter_ns() - begin)
    return statistics.median(taken) / 1e3


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9, help="samples a case, at least 7 (default 9)")
    options = parser.parse_args()
    taken: dict[str, list[float]] = {}
    for repetition in range(options.repetitions):
        rng = random.Random(repetition)
        for runs in (1, 20, 64):
            one, other = fetch(runs, rng)
            taken.setdefault(f"fetch_{runs}_runs_us", []).append(one)
            taken.setdefault(f"release_{runs}_runs_us", []).append(other)
        for leaves in (10_000, 100_000) if repetition < harness.MIN_REPETITIONS else ():
            taken.setdefault(f"store_and_evict_{leaves}_leaves_us", []).append(churn(leaves, rng))
    found = {name: statistics.median(values) for name, values in taken.items()}
    for name, value in found.items():
        bar = f"  (bar {BAR_FETCH_20_RUNS_US:.0f})" if name == "fetch_20_runs_us" else ""
        print(f"{name:<34} {value:8.1f} us  ({min(taken[name]):.1f} to {max(taken[name]):.1f}){bar}")
    harness.write("engine", {"bars": {"fetch_20_runs_us": BAR_FETCH_20_RUNS_US}, **found, "samples": taken})


if __name__ == "__main__":
    harness.run(main)
