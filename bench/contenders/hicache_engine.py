"""hicache's engine, as a contender of ``bench/engine.py``: whole events, as the runtime hands them in.

What is timed, per case:

fetch_*        one ``Fetch`` of a resident prompt of 8,192 tokens (128 pages) that stands in 1, 20 or 64 runs: match,
               touch, lease, answer with the slots. No page keys, no promotion.
release_*      the ``ReleaseLeases`` that ends one such lease.
store_*        ``Reserve`` + ``Commit`` + ``CopyDone`` of a turn of 512 tokens (8 pages) below a prompt of 20 runs.
evict64_*      one ``Reserve`` of a page of 64 tokens in a full tier of 10k or 100k leaves, with no tier below: match,
               plan, the coldest leaf out of policy, tree and ledger, grant. Its commit, which fills the tier again, is
               not timed.
"""

from __future__ import annotations

import itertools
import platform
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from contender import Sample, serve, timed_each

import hicache
from hicache.engine import Engine, EngineOptions
from hicache.engine import actions as act
from hicache.engine import events as ev
from hicache.keys import fingerprint
from hicache.types import Namespace, TierKind, TierSpec

PAGE_TOKENS = 64
WIDTH = 4 * PAGE_TOKENS
PAGE_BYTES = 4096
PAGES = 128
TURN_PAGES = 8
EVENTS_PER_SAMPLE = 400
LONG_TTL_MS = 600_000


class World:
    """An engine with a host tier, one namespace and one session."""

    def __init__(self, pages: int) -> None:
        tier = TierSpec("host", TierKind.HOST, pages * PAGE_BYTES, pages * PAGE_BYTES, client_readable=True)
        self.engine = Engine(EngineOptions((tier,)))
        self.requests = itertools.count(1)
        self.tokens = itertools.count(1)
        self.handle(ev.SessionOpened(1, "default"))
        spec = Namespace("model", PAGE_TOKENS, PAGE_BYTES)
        self.handle(ev.NamespaceOpened(1, spec, fingerprint(spec)))

    def handle(self, event: ev.Event) -> list[act.Action]:
        return self.engine.handle(event, 1)

    def new_pages(self, count: int) -> bytes:
        """Pages that nobody has seen before."""
        return b"".join(next(self.tokens).to_bytes(4, "little") * PAGE_TOKENS for _ in range(count))

    def reserve(self, prompt: bytes) -> act.ReserveResult:
        answer = self.handle(ev.Reserve(next(self.requests), 1, 1, prompt))[-1]
        if not isinstance(answer, act.Reply) or not isinstance(answer.result, act.ReserveResult):
            raise RuntimeError(f"not granted: {answer}")
        return answer.result

    def commit(self, granted: act.ReserveResult) -> None:
        pieces = ((granted.present_pages, granted.missing_pages),)
        actions = self.handle(ev.Commit(next(self.requests), 1, granted.reservation, pieces, None, last=True))
        copy = next(action for action in actions if isinstance(action, act.CopyIn))
        self.handle(ev.CopyDone(copy.copy))

    def store(self, prompt: bytes) -> None:
        self.commit(self.reserve(prompt))

    def conversation(self, runs: int) -> bytes:
        """A prompt of 128 pages, stored in so many turns. Each turn uses those before it, so that no two runs have one
        history and are joined."""
        prompt = b""
        for turn in range(runs):
            self.handle(ev.Touch(1, prompt))
            prompt += self.new_pages(PAGES * (turn + 1) // runs - PAGES * turn // runs)
            self.store(prompt)
        stats = self.engine.stats()
        if (stats.runs, stats.pages) != (runs, PAGES):
            raise RuntimeError(f"{stats.pages} pages in {stats.runs} runs")
        return prompt

    def fetch(self, prompt: bytes) -> int:
        answer = self.handle(ev.Fetch(next(self.requests), 1, 1, prompt, ttl_ms=LONG_TTL_MS))[-1].result
        if answer.granted_pages != PAGES:
            raise RuntimeError(f"{answer.granted_pages} pages were granted")
        return answer.lease


def fetch_case(runs: int, *, release: bool) -> Callable[[], Callable[[], Sample]]:
    def set_up() -> Callable[[], Sample]:
        world = World(PAGES)
        prompt = world.conversation(runs)

        def sample() -> Sample:
            fetches = [
                ev.Fetch(next(world.requests), 1, 1, prompt, ttl_ms=LONG_TTL_MS)
                for _ in range(EVENTS_PER_SAMPLE)
            ]
            leases: list[int] = []
            took = timed_each(lambda event: leases.append(world.handle(event)[-1].result.lease), fetches)
            releases = [ev.ReleaseLeases(1, (lease,)) for lease in leases]
            gave_back = timed_each(world.handle, releases)
            stats = world.engine.stats()
            if stats.leases or stats.runs != runs or not all(leases):
                raise RuntimeError(f"{stats.leases} leases are left, {stats.runs} runs")
            return gave_back if release else took

        return sample

    return set_up


def store_case() -> Callable[[], Sample]:
    world = World(PAGES + TURN_PAGES * EVENTS_PER_SAMPLE)
    prompt = world.conversation(20)

    def sample() -> Sample:
        turns = [prompt + world.new_pages(TURN_PAGES) for _ in range(EVENTS_PER_SAMPLE)]
        took = timed_each(world.store, turns)
        for turn in turns:
            world.handle(ev.Evict(next(world.requests), 1, turn, -1))
        world.store(prompt)
        return took

    # Evicting the turns takes the conversation with the last of them; it is stored again in one run from then on.
    return sample


def evict_case(leaves: int) -> Callable[[], Callable[[], Sample]]:
    def set_up() -> Callable[[], Sample]:
        world = World(leaves)
        for _ in range(leaves):
            world.store(world.new_pages(1))

        def sample() -> Sample:
            granted: list[act.ReserveResult] = []
            prompts = [world.new_pages(1) for _ in range(EVENTS_PER_SAMPLE)]
            before = world.engine.stats().counters.dropped_pages[0]
            took = timed_each(lambda prompt: granted.append(world.reserve(prompt)), prompts)
            if world.engine.stats().counters.dropped_pages[0] - before != EVENTS_PER_SAMPLE:
                raise RuntimeError("one page in, one page out did not hold")
            for each in granted:
                world.commit(each)
            return took

        return sample

    return set_up


def prepare(_spec: dict[str, object]) -> dict[str, Callable[[], Callable[[], Sample]]]:
    """The cases."""
    cases: dict[str, Callable[[], Callable[[], Sample]]] = {}
    for runs in (1, 20, 64):
        cases[f"fetch_8k_{runs}_runs"] = fetch_case(runs, release=False)
        cases[f"release_8k_{runs}_runs"] = fetch_case(runs, release=True)
    cases["store_turn"] = store_case
    cases["evict64_10k_leaves"] = evict_case(10_000)
    cases["evict64_100k_leaves"] = evict_case(100_000)
    return cases


if __name__ == "__main__":
    serve("hicache", prepare, lambda: {"hicache": hicache.__version__, "python": platform.python_version()})
