"""Every policy against a twin written straight from its definition: lists, no cleverness, O(n) everywhere."""

from __future__ import annotations

import copy
import dataclasses
import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from hicache.errors import ConfigError, ViolationError
from hicache.policy import Plan, Policy, RunInfo, make_policy
from hicache.policy.ordered import OrderedPolicy
from hicache.policy.records import SLACK_ENTRIES


@dataclasses.dataclass
class Entry:
    """One run."""

    run: int
    pages: int
    depth: int
    path: int = 0  # runs of one path hold different pages of one prompt
    exposed: bool = False
    last: int = 0  # LRU: tick of the last use
    bit: bool = False  # SIEVE: visited


class Twin:
    """What both twins do alike. ``queue`` is in SIEVE's order, oldest first; LRU ignores it."""

    def __init__(self) -> None:
        self.queue: list[Entry] = []
        self.hand: int | None = None

    def at(self, run: int) -> int:
        return [entry.run for entry in self.queue].index(run)

    def find(self, run: int) -> Entry:
        return self.queue[self.at(run)]

    def insert(self, run: int, pages: int, depth: int, now: int, path: int = 0) -> None:
        self.queue.append(Entry(run, pages, depth, path, last=now))

    def hit(self, run: int, now: int) -> None:
        entry = self.find(run)
        entry.last, entry.bit = now, True

    def split(self, run: int, tail: int, tail_pages: int) -> None:
        head = self.find(run)
        head.pages -= tail_pages
        new = dataclasses.replace(
            head, run=tail, pages=tail_pages, depth=head.depth + head.pages, exposed=False
        )
        self.queue.insert(self.at(run), new)
        if self.hand == run:
            self.hand = tail

    def merge(self, run: int, absorbed: int) -> None:
        head, gone = self.find(run), self.find(absorbed)
        head.pages += gone.pages
        head.last = max(head.last, gone.last)
        head.bit = head.bit or gone.bit
        self.forget(absorbed)

    def forget(self, run: int) -> None:
        if self.hand == run:
            self.hand = self.newer(run)
        del self.queue[self.at(run)]

    def newer(self, run: int) -> int | None:
        following = self.queue[self.at(run) + 1 :]
        return following[0].run if following else None


class TwinPlan:
    """A plan on a copy of its policy, so that ``abort`` has nothing to do."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin
        self.copy = copy.deepcopy(twin)
        self.given: list[int] = []

    def candidates(self) -> list[Entry]:
        return [entry for entry in self.copy.queue if entry.exposed and entry.run not in self.given]

    def next(self) -> int | None:
        entry = self.choose()
        if entry is None:
            return None
        self.given.append(entry.run)
        return entry.run

    def choose(self) -> Entry | None:
        raise AssertionError("each twin chooses in its own way")

    def expose(self, run: int) -> None:
        self.copy.find(run).exposed = True

    def commit(self, evicted: list[int]) -> None:
        for run in evicted:
            self.twin.find(run).exposed = False


class LruPlan(TwinPlan):
    """Least recently used first, deepest first among equals."""

    def choose(self) -> Entry | None:
        return min(self.candidates(), key=lambda entry: (entry.last, -entry.depth, entry.run), default=None)


class SievePlan(TwinPlan):
    """The paper's loop: from the hand, clear bits until one is clear; hidden runs are not looked at."""

    def choose(self) -> Entry | None:
        if not self.candidates():
            return None
        copied = self.copy
        while True:
            entry = copied.queue[0 if copied.hand is None else copied.at(copied.hand)]
            copied.hand = copied.newer(entry.run)
            if not entry.exposed or entry.run in self.given:
                continue
            if not entry.bit:
                return entry
            entry.bit = False

    def commit(self, evicted: list[int]) -> None:
        super().commit(evicted)
        if not self.given:
            return
        self.twin.hand = self.given[-1]  # and on to the next newer when that is forgotten
        for entry in self.copy.queue:
            self.twin.find(entry.run).bit = entry.bit


PLANS = {"lru": LruPlan, "sieve": SievePlan}


NAMES = sorted(PLANS)  # the other policies meet their twins in test_zoo.py


numbers = st.integers(0, 99)


class Comparison(RuleBasedStateMachine):
    """The same history through a policy and its twin; whatever they give must be equal.

    Rules take plain numbers, so that a random history can drive them too.
    """

    name = ""
    idle = precondition(lambda self: self.plan is None)
    known = precondition(lambda self: self.plan is None and self.twin.queue)
    planning = precondition(lambda self: self.plan is not None)

    def __init__(self) -> None:
        super().__init__()
        self.policy: Policy = make_policy(self.name)
        self.twin = Twin()
        self.now = 0
        self.ids = 0
        self.forgotten: list[int] = []
        self.plan: Plan | None = None
        self.twin_plan = TwinPlan(self.twin)

    def new_id(self) -> int:
        self.ids += 1
        return self.ids

    def pick(self, which: int) -> Entry:
        return self.twin.queue[which % len(self.twin.queue)]

    def drop(self, run: int) -> None:
        self.policy.forget(run)
        self.twin.forget(run)
        self.forgotten.append(run)

    # --- histories

    @initialize(paths=st.lists(st.integers(0, 3), min_size=2, max_size=7))
    def fill(self, paths: list[int]) -> None:
        for path in paths:
            self.arrive(path)

    @idle
    @rule(path=st.integers(0, 3))
    def arrive(self, path: int) -> None:
        self.now += 1
        self.insert(3, path, again=False)
        self.expose(-1)

    @idle
    @rule(pages=st.integers(1, 5), path=st.integers(0, 3), again=st.booleans())
    def insert(self, pages: int, path: int, again: bool) -> None:
        run = self.forgotten.pop() if again and self.forgotten else self.new_id()
        depth = max((each.depth + each.pages for each in self.twin.queue if each.path == path), default=0)
        self.policy.insert(run, RunInfo(pages, depth), self.now)
        self.twin.insert(run, pages, depth, self.now, path)

    @known
    @rule(uses=st.lists(numbers, max_size=5), step=st.integers(0, 1))
    def hit(self, uses: list[int], step: int) -> None:
        self.now += step
        for which in uses:
            run = self.pick(which).run
            self.policy.hit(run, self.now)
            self.twin.hit(run, self.now)

    @known
    @rule(which=numbers)
    def expose(self, which: int) -> None:
        self.policy.expose(self.pick(which).run)
        self.pick(which).exposed = True

    @known
    @rule(which=numbers)
    def hide(self, which: int) -> None:
        self.policy.hide(self.pick(which).run)
        self.pick(which).exposed = False

    @known
    @rule(which=numbers, pages=numbers, leaf=st.booleans())
    def split(self, which: int, pages: int, leaf: bool) -> None:
        head = self.pick(which)
        if head.pages < 2:
            return
        tail, tail_pages = self.new_id(), 1 + pages % (head.pages - 1)
        self.policy.split(head.run, tail, tail_pages)
        self.twin.split(head.run, tail, tail_pages)
        if leaf:  # as the engine does it
            self.policy.hide(head.run)
            self.policy.expose(tail)
            head.exposed, self.twin.find(tail).exposed = False, True

    @known
    @rule(which=numbers)
    def merge(self, which: int) -> None:
        head = self.pick(which)
        end = (head.path, head.depth + head.pages)
        for after in self.twin.queue:
            if (after.path, after.depth) == end:
                self.policy.merge(head.run, after.run, head.pages + after.pages)
                self.twin.merge(head.run, after.run)
                return

    @known
    @rule(which=numbers, pages=numbers)
    def trim(self, which: int, pages: int) -> None:
        entry = self.pick(which)
        if entry.pages > 1:
            pages = 1 + pages % (entry.pages - 1)
            self.policy.trim(entry.run, pages, list(range(pages)))
            entry.pages -= pages

    @known
    @rule(which=numbers)
    def forget(self, which: int) -> None:
        self.drop(self.pick(which).run)

    # --- plans, in one step and step by step

    @known
    @rule(
        count=st.integers(1, 6),
        keep=st.sampled_from([0, 0, 0, 1, 2]),
        backwards=st.booleans(),
        shown=st.lists(numbers, max_size=3),
    )
    def evict(self, count: int, keep: int, backwards: bool, shown: list[int]) -> None:
        self.begin()
        for _ in range(count):
            self.next()
            if shown:  # as if this victim had hidden it
                self.expose_in_plan(shown.pop())
        self.commit(2 ** max(0, len(self.twin_plan.given) - keep) - 1, backwards=backwards)

    @idle
    @rule()
    def begin(self) -> None:
        self.plan, self.twin_plan = self.policy.begin(), PLANS[self.name](self.twin)

    @planning
    @rule()
    def next(self) -> None:
        assert self.plan is not None
        assert self.plan.next() == self.twin_plan.next()

    @planning
    @rule(which=numbers)
    def expose_in_plan(self, which: int) -> None:
        assert self.plan is not None
        if self.twin.queue:
            run = self.pick(which).run
            self.plan.expose(run)
            self.plan.expose(run)
            self.twin_plan.expose(run)

    @planning
    @rule(leaving=numbers, backwards=st.booleans())
    def commit(self, leaving: int, backwards: bool) -> None:
        assert self.plan is not None
        evicted = [run for index, run in enumerate(self.twin_plan.given) if leaving >> index & 1]
        self.plan.commit(evicted)
        self.twin_plan.commit(evicted)
        self.plan = None
        for run in evicted[::-1] if backwards else evicted:
            self.drop(run)

    @planning
    @rule()
    def abort(self) -> None:
        assert self.plan is not None
        self.plan.abort()
        self.plan = None

    @idle
    @rule()
    def drain(self) -> None:
        self.begin()
        for _ in range(len(self.twin.queue) + 1):
            self.next()
        self.abort()

    def teardown(self) -> None:
        if self.plan is None:
            self.drain()


def comparison(name: str) -> type[Comparison]:
    return type(f"Comparison_{name}", (Comparison,), {"name": name})


@pytest.mark.parametrize("name", NAMES)
def test_policy_and_twin_agree(name: str) -> None:
    """Over any history, with plans that abort, expose and leave runs behind, both give the same victims."""
    case = comparison(name).TestCase
    case.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
    case().runTest()


@pytest.mark.parametrize("name", NAMES)
def test_policy_and_twin_agree_over_a_long_history(name: str, rng: random.Random) -> None:
    """Thousands of steps with a few dozen runs at a time: the same victims in the same order."""
    pair = comparison(name)()
    pair.fill([0, 1, 2])
    victims = 0
    for _ in range(12_000):
        if len(pair.twin.queue) < rng.randrange(40):
            pair.arrive(rng.randrange(4))
        before = len(pair.forgotten)
        random_step(pair, rng.randrange(100), rng.randrange(100), odd=rng.random() < 0.5)
        victims += len(pair.forgotten) > before
    assert victims > 200
    assert pair.now > 4000


def random_step(pair: Comparison, which: int, other: int, *, odd: bool) -> None:
    kind = (which + other) % 10
    if kind < 3:
        pair.hit([which, other, which // 2], step=int(odd))
    elif kind == 3:
        pair.expose(which)
    elif kind == 4:
        pair.hide(which)
    elif kind == 5:
        pair.split(which, other, leaf=odd)
    elif kind == 6:
        (pair.merge if odd else pair.forget)(which)
    elif kind == 7:
        pair.trim(which, other)
    elif kind == 8:
        pair.evict(1 + which % 6, max(0, other % 6 - 3), backwards=odd, shown=[which, other])
    else:
        pair.drain()


def test_lru_gives_the_deepest_of_one_request_first() -> None:
    """Runs touched by one request leave from the end of the path."""
    policy = make_policy("lru")
    for run, depth in ((1, 0), (2, 8), (3, 4)):
        policy.insert(run, RunInfo(4, depth), 1)
        policy.expose(run)
    plan = policy.begin()
    assert [plan.next(), plan.next(), plan.next(), plan.next()] == [2, 3, 1, None]


def test_sieve_spares_the_visited_and_keeps_their_places() -> None:
    """Worked by hand from the paper's text: A, B and G were visited, the hand stands at the oldest, G."""
    policy = make_policy("sieve")
    names = "GFEDCBA"
    for run in range(7):
        policy.insert(run, RunInfo(1, 0), run)
        policy.expose(run)
    for name in "ABG":
        policy.hit(names.index(name), 9)
    gone = []
    for new in (7, 8):  # H and I arrive
        plan = policy.begin()
        victim = plan.next()
        assert victim is not None
        plan.commit([victim])
        policy.forget(victim)
        gone.append(names[victim])
        policy.insert(new, RunInfo(1, 0), new + 9)
        policy.expose(new)
    assert gone == ["F", "E"]  # G is spared and keeps its place; its bit is clear now
    plan = policy.begin()
    assert [plan.next() for _ in range(3)] == [3, 4, 7]  # D, C; B and A are spared; H was not visited


def entries(policy: Policy) -> int:
    assert isinstance(policy, OrderedPolicy)
    return sum(len(queue) for queue in policy.queues)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded_by_the_runs_that_live(name: str) -> None:
    """Runs that come and go, are hit, hidden and exposed again leave nothing behind."""
    policy = make_policy(name)
    bound = len(policy.queues) if isinstance(policy, OrderedPolicy) else 0
    for run in range(10):
        policy.insert(run, RunInfo(9, 0), 0)
    for now in range(2000):
        for run in range(10):
            policy.hide(run)
            policy.expose(run)
            if run:  # the first stays the next victim: entries behind it are never met
                policy.hit(run, now)
        policy.insert(100 + now, RunInfo(1, 0), now)
        policy.expose(100 + now)
        policy.forget(100 + now)
        assert entries(policy) <= bound * (3 * 10 + SLACK_ENTRIES)
    plan = policy.begin()
    assert sorted(run for run in iter(plan.next, None) if run is not None) == list(range(10))


@pytest.mark.parametrize("name", NAMES)
def test_choosing_does_not_scan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heap operations of an eviction do not depend on how many runs there are, exposed or hidden."""
    calls = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def count(*args: object) -> object:
            nonlocal calls
            calls += 1
            return function(*args)

        return count

    for function in ("heappush", "heappop", "heapreplace", "heapify"):
        monkeypatch.setattr(heapq, function, counted(getattr(heapq, function)))
    spent = []
    for size in (200, 5000):
        policy = make_policy(name)
        for run in range(size):
            policy.insert(run, RunInfo(1, 0), run)
            if run % 2:
                policy.expose(run)
        calls = 0
        for _ in range(90):
            plan = policy.begin()
            victim = plan.next()
            assert victim is not None
            plan.commit([victim])
            policy.forget(victim)
        spent.append(calls)
    assert spent[0] == spent[1] <= 2 * 90


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_left_open_counts_as_aborted(name: str) -> None:
    """The next plan sees what an abandoned one had taken, and the abandoned one is over."""
    policy = make_policy(name)
    policy.insert(1, RunInfo(1, 0), 0)
    policy.expose(1)
    left = policy.begin()
    assert left.next() == 1
    assert policy.begin().next() == 1
    with pytest.raises(ViolationError):
        left.next()


@pytest.mark.parametrize("name", NAMES)
def test_an_evicted_run_that_stays_after_all_can_be_exposed_again(name: str) -> None:
    """Until it is forgotten an evicted run is hidden, and no more than that."""
    policy = make_policy(name)
    policy.insert(1, RunInfo(1, 0), 0)
    policy.expose(1)
    plan = policy.begin()
    assert plan.next() == 1
    plan.commit([1])
    assert policy.begin().next() is None
    policy.expose(1)
    assert policy.begin().next() == 1


MISTAKES: dict[str, Callable[[Policy], object]] = {
    "insert twice": lambda policy: policy.insert(1, RunInfo(1, 0), 0),
    "hit unknown": lambda policy: policy.hit(9, 0),
    "hide unknown": lambda policy: policy.hide(9),
    "expose unknown": lambda policy: policy.expose(9),
    "forget unknown": lambda policy: policy.forget(9),
    "trim unknown": lambda policy: policy.trim(9, 1, ()),
    "trim all": lambda policy: policy.trim(1, 4, ()),
    "trim nothing": lambda policy: policy.trim(1, 0, ()),
    "split unknown": lambda policy: policy.split(9, 3, 1),
    "split off all": lambda policy: policy.split(1, 3, 4),
    "split off a known tail": lambda policy: policy.split(1, 2, 1),
    "merge unknown": lambda policy: policy.merge(1, 9, 5),
    "merge with itself": lambda policy: policy.merge(1, 1, 8),
    "merge to other pages": lambda policy: policy.merge(1, 2, 9),
    "plan exposes unknown": lambda policy: policy.begin().expose(9),
    "commit what was not given": lambda policy: policy.begin().commit([1]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_a_violation_and_changes_nothing(name: str, mistake: str) -> None:
    """Calls that break the contract raise, and the policy goes on as before."""
    policy = make_policy(name)
    for run in (1, 2):
        policy.insert(run, RunInfo(4, 4 * run), run)
        policy.expose(run)
    with pytest.raises(ViolationError):
        MISTAKES[mistake](policy)
    policy.split(1, 3, 1)
    policy.trim(1, 2, ())
    policy.merge(1, 3, 2)
    policy.merge(2, 1, 6)
    plan = policy.begin()
    assert [plan.next(), plan.next()] == [2, None]
    plan.commit()
    with pytest.raises(ViolationError):
        plan.abort()


def test_policies_are_made_by_name() -> None:
    """Each name gives a fresh policy; another name is an error that lists the known ones."""
    for name in NAMES:
        assert make_policy(name) is not make_policy(name)
    with pytest.raises(ConfigError, match="lru"):
        make_policy("magic")
