"""Every policy of the zoo against its twin, ghosts and moves inside plans included."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from twins import TWINS, Entry

from hicache.policy import RunInfo, make_policy

CLASSES = ("", "low", "high")


class Pair:
    """A policy and its twin under the same history. Pages of one path are one prompt: the same ids come back."""

    def __init__(self, name):
        self.policy, self.twin = make_policy(name), TWINS[name]()
        self.now = self.ids = self.victims = 0

    def pick(self, which):
        return self.twin.entries[which % len(self.twin.entries)]

    def ids_of(self, path, first, count):
        return [path << 20 | page for page in range(first, first + count)]

    def insert(self, path, pages):
        self.now += 1
        depth = max((e.depth + e.pages for e in self.twin.entries if e.path == path), default=0)
        ids = self.ids_of(path, depth, pages)
        cut = self.policy.known(ids)
        for piece in (ids[:cut], ids[cut:]):
            if piece:
                self.ids += 1
                cls = CLASSES[path % 3]
                shown = piece if self.policy.wants_ghosts else ()
                self.policy.insert(self.ids, RunInfo(len(piece), depth, cls=cls), self.now, shown)
                self.twin.insert(Entry(self.ids, len(piece), depth, self.now, path, cls), shown)
                depth += len(piece)
        self.show(self.ids)

    def show(self, run):
        self.policy.expose(run)
        self.twin.expose(run)

    def hide(self, run):
        self.policy.hide(run)
        self.twin.hide(run)

    def hit(self, which, step):
        self.now += step
        run = self.pick(which).run
        self.policy.hit(run, self.now)
        self.twin.hit(run, self.now)

    def split(self, which, pages):
        head = self.pick(which)
        if head.pages > 1:
            self.ids += 1
            pages = 1 + pages % (head.pages - 1)
            self.policy.split(head.run, self.ids, pages)
            self.twin.split(head.run, self.ids, pages)
            if head.exposed:
                self.hide(head.run)
            self.show(self.ids)

    def merge(self, which):
        head = self.pick(which)
        end = (head.path, head.depth + head.pages)
        for after in self.twin.entries:
            if (after.path, after.depth) == end:
                self.policy.merge(head.run, after.run, head.pages + after.pages)
                self.twin.merge(head.run, after.run)
                return

    def shown_ids(self, entry, pages):
        first = entry.depth + entry.pages - pages
        return self.ids_of(entry.path, first, pages) if self.policy.wants_ghosts else []

    def trim(self, which, pages):
        entry = self.pick(which)
        if entry.pages > 1:
            pages = 1 + pages % (entry.pages - 1)
            ids = self.shown_ids(entry, pages)
            self.policy.trim(entry.run, pages, ids)
            self.twin.trim(entry.run, pages, ids)

    def forget(self, run, *, evicted):
        entry = self.twin.find(run)
        ids = self.shown_ids(entry, entry.pages) if evicted else []
        self.policy.forget(run, ids)
        self.twin.forget(run, ids)

    def evict(self, count, keep, extra):
        """A plan of ``count`` victims that shows one hidden run; the last ``keep`` stay; -1: it is aborted."""
        plan = self.policy.begin()
        self.twin.full = self.twin.total()
        working = copy.deepcopy(self.twin)
        shown = []
        for step in range(count):
            if step == 1 and extra is not None and working.entries:
                entry = working.entries[extra % len(working.entries)]
                if not entry.exposed:
                    shown.append(entry.run)
                    plan.expose(entry.run)
                    working.expose(entry.run)
            victim = working.choose()
            assert plan.next() == (None if victim is None else victim.run)
            if victim is None:
                break
            working.given.append(victim.run)
        if keep < 0:
            plan.abort()
            return
        given, working.given = working.given, []
        leaving = given[: max(0, len(given) - keep)]
        for run in {*leaving, *shown}:
            working.hide(run)
        working.left([working.find(run) for run in leaving])
        plan.commit(leaving)
        self.twin = working
        for run in leaving:
            self.forget(run, evicted=True)
        self.victims += len(leaving)

    def step(self, kind, a, b):
        """One step of a history, by three plain numbers."""
        if kind < 4 or not self.twin.entries:
            self.insert(a % 5, 1 + b % 6)
        elif kind < 8:
            self.hit(a, b % 2)
        elif kind == 8:
            self.show(self.pick(a).run)
        elif kind == 9:
            self.hide(self.pick(a).run)
        elif kind == 10:
            self.split(a, b)
        elif kind == 11:
            self.merge(a)
        elif kind == 12:
            self.trim(a, b)
        elif kind == 13:
            self.forget(self.pick(a).run, evicted=bool(b % 2))
        else:
            self.evict(1 + a % 5, b % 4 - 1, a if b % 3 else None)

    def drain(self):
        self.evict(len(self.twin.entries) + 1, -1, None)


numbers = st.integers(0, 60)


@pytest.mark.parametrize("name", sorted(TWINS))
def test_policy_and_twin_agree(name):
    """Over any history both give the same victims."""

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 17), numbers, numbers), max_size=80))
    def histories(steps):
        pair = Pair(name)
        for step in steps:
            pair.step(*step)
        pair.drain()

    histories()


@pytest.mark.parametrize("name", sorted(TWINS))
def test_policy_and_twin_agree_over_a_long_history(name, rng: random.Random):
    """Thousands of steps with a few dozen runs: the same victims, many of them, with ghosts that come back."""
    pair = Pair(name)
    for _ in range(2500):
        kind = rng.randrange(18)
        if len(pair.twin.entries) > 30:
            kind = 14
        pair.step(kind, rng.randrange(61), rng.randrange(61))
    pair.drain()
    assert pair.victims > 200
