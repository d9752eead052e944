"""hicache's own tree, as a contender of ``bench/tree.py``. Runs in the project's environment or a bare checkout.

What is timed, per case:

match_*        ``Tree.match`` of a prompt given as ``bytes``. Reads only: unlike the peer's, it touches nothing.
match_slots_*  match, then the matched runs, a policy hit for each, and their slots joined to one array: all that the
               peer's match and slot retrieval do.
insert_*       trace, insert, slots, residency and policy order of a prompt that is new.
evict_*        tree and LRU policy: a plan for one leaf's pages, its commit, the run out of tree and policy, its
               parent exposed when nothing is left below. (The engine above them is measured elsewhere.)
"""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import workloads
from contender import Sample, serve, timed_each, timed_loop

import hicache
from hicache.policy import RunInfo, make_policy
from hicache.tree import Run, Tree
from hicache.types import Residency

ABSENT, RESIDENT = int(Residency.ABSENT), int(Residency.RESIDENT)
TIER = 0
INSERT_ITERATIONS = {8_192: 128, 131_072: 24}
EVICTIONS_PER_SAMPLE = 64


class Cache:
    """A tree with one tier and one LRU policy: what the engine does around them, and no more."""

    def __init__(self, spec: workloads.TreeSpec) -> None:
        self.width = 4 * spec.page_tokens
        self.tree = Tree(self.width, 1, itertools.count(1))
        self.policy = make_policy("lru")
        self.runs: dict[int, Run] = {}
        self.now = 0
        self.freed_pages = 0

    def insert(self, prompt: bytes, slots: array) -> None:
        """Give the pages that are new a place, slots and an order."""
        tree, policy = self.tree, self.policy
        self.now += 1
        known = tree.trace(prompt)
        pages = len(prompt) // self.width - known.pages
        if not pages:
            return
        after = tree.cut(known)[-1] if known.pages else None
        run = tree.insert(prompt, after, known.pages, pages)
        tree.set_slots(run, TIER, slots[known.pages : known.pages + pages])
        tree.set_state(run, TIER, RESIDENT)
        policy.insert(run.id, RunInfo(pages, known.pages), self.now)
        policy.expose(run.id)
        if after is not None:
            policy.hide(after.id)
        self.runs[run.id] = run

    def match_slots(self, prompt: bytes) -> array:
        """The slots of the longest known prefix, touched."""
        self.now += 1
        runs, last_pages = self.tree.runs(self.tree.match(prompt))
        hit, now = self.policy.hit, self.now
        joined = array("q")
        for run in runs[:-1]:
            hit(run.id, now)
            joined += run.slots[TIER]
        last = runs[-1]
        hit(last.id, now)
        joined += last.slots[TIER] if last_pages == last.pages else last.slots[TIER][:last_pages]
        return joined

    def evict(self, pages: int) -> None:
        """Make whole runs leave, least recently used first, until ``pages`` are free."""
        plan = self.policy.begin()
        victims = []
        while pages > 0:
            victim = self.runs[plan.next()]
            victims.append(victim)
            pages -= victim.pages
        plan.commit([victim.id for victim in victims])
        for victim in victims:
            self.freed_pages += victim.pages
            parent = self.tree.parent_run(victim)
            self.tree.set_slots(victim, TIER, None)
            self.tree.set_state(victim, TIER, ABSENT)
            self.tree.prune(victim)
            self.policy.forget(victim.id)
            del self.runs[victim.id]
            if parent is not None and not parent.below[TIER]:
                self.policy.expose(parent.id)


def slots_for(tokens: int, spec: workloads.TreeSpec) -> array:
    """Slot numbers for a prompt of this many tokens."""
    return array("q", range(tokens // spec.page_tokens))


def with_others(spec: workloads.TreeSpec) -> Cache:
    """A cache that holds the unrelated prompts."""
    cache = Cache(spec)
    slots = slots_for(spec.others_tokens, spec)
    for prompt in workloads.others(spec):
        cache.insert(prompt.tobytes(), slots)
    return cache


def match_case(
    spec: workloads.TreeSpec, length: int, *, deep: bool, slots: bool
) -> Callable[[], Callable[[], Sample]]:
    """Match a prompt that the tree holds whole, flat or in turns; optionally touch it and fetch its slots."""

    def set_up() -> Callable[[], Sample]:
        cache = with_others(spec)
        prompt = workloads.tokens(spec.seed, length)
        values = slots_for(length, spec)
        for part in workloads.turns(spec, prompt) if deep else [prompt]:
            cache.insert(part.tobytes(), values)
        raw = bytes(bytearray(prompt.tobytes()))  # not the object that the tree may have kept
        pages = length // spec.page_tokens
        match = cache.tree.match
        if match(raw).pages != pages or cache.match_slots(raw) != values:
            raise RuntimeError(f"matched {match(raw)} of {pages} pages")
        return timed_loop(lambda: cache.match_slots(raw)) if slots else timed_loop(lambda: match(raw))

    return set_up


def insert_case(spec: workloads.TreeSpec, length: int) -> Callable[[], Callable[[], Sample]]:
    """Insert prompts that are new, into a tree that is made anew (untimed) before each sample."""

    def set_up() -> Callable[[], Sample]:
        count = INSERT_ITERATIONS[length]
        new = [prompt.tobytes() for prompt in workloads.fresh(spec, count, length, salt=length)]
        values = slots_for(length, spec)

        def sample() -> Sample:
            cache = with_others(spec)
            taken = timed_each(lambda prompt: cache.insert(prompt, values), new)
            if len(cache.runs) != spec.others + count:
                raise RuntimeError(f"the tree holds {len(cache.runs)} runs")
            return taken

        return sample

    return set_up


def evict_case(spec: workloads.TreeSpec, count: int) -> Callable[[], Callable[[], Sample]]:
    """Evict one leaf's tokens at a time from a tree of ``count`` leaves; what left comes back untimed."""

    def set_up() -> Callable[[], Sample]:
        cache = Cache(spec)
        values = slots_for(spec.group_tokens + spec.leaf_tokens, spec)
        prompts = [prompt.tobytes() for prompt in workloads.leaves(spec, count)]
        groups = {prompt[: 4 * spec.group_tokens] for prompt in prompts}
        for prompt in (*groups, *prompts):
            cache.insert(prompt, values)
        pages = spec.evict_tokens // spec.page_tokens
        oldest = 0

        def sample() -> Sample:
            nonlocal oldest
            freed = cache.freed_pages
            taken = timed_each(cache.evict, [pages] * EVICTIONS_PER_SAMPLE)
            if cache.freed_pages - freed != pages * EVICTIONS_PER_SAMPLE:
                raise RuntimeError(f"{cache.freed_pages - freed} pages were evicted")
            for _ in range(EVICTIONS_PER_SAMPLE):
                prompt = prompts[oldest % count]
                if cache.tree.match(prompt).pages * cache.width == len(prompt):
                    raise RuntimeError("the wrong leaf was evicted")
                cache.insert(prompt, values)
                oldest += 1
            return taken

        return sample

    return set_up


def prepare(raw: dict[str, int]) -> dict[str, Callable[[], Callable[[], Sample]]]:
    """The cases for a spec."""
    spec = workloads.TreeSpec(**raw)
    cases: dict[str, Callable[[], Callable[[], Sample]]] = {}
    for shape in ("flat", "deep"):
        for label, length in (("8k", 8_192), ("128k", 131_072)):
            deep = shape == "deep"
            cases[f"match_{shape}_{label}"] = match_case(spec, length, deep=deep, slots=False)
            cases[f"match_slots_{shape}_{label}"] = match_case(spec, length, deep=deep, slots=True)
    cases["insert_new_8k"] = insert_case(spec, 8_192)
    cases["insert_new_128k"] = insert_case(spec, 131_072)
    cases["evict64_10k_leaves"] = evict_case(spec, 10_000)
    cases["evict64_100k_leaves"] = evict_case(spec, 100_000)
    return cases


if __name__ == "__main__":
    serve("hicache", prepare, lambda: {"python": sys.version.split()[0], "hicache": hicache.__version__})
