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
from hicache.policy import POLICIES, Plan, Policy, RunInfo, make_policy
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
        last = self.given[-1]
        self.twin.hand = self.twin.newer(last) if last in evicted else last
        for entry in self.copy.queue:
            self.twin.find(entry.run).bit = entry.bit


PLANS = {"lru": LruPlan, "sieve": SievePlan}


NAMES = sorted(POLICIES)


class Comparison(RuleBasedStateMachine):
    """The same history through a policy and its twin; whatever they give must be equal."""

    name = ""

    def __init__(self) -> None:
        super().__init__()
        self.policy: Policy = make_policy(self.name)
        self.twin = Twin()
        self.now = 0
        self.ids = 0
        self.forgotten: list[int] = []
        self.plan: Plan | None = None
        self.twin_plan = TwinPlan(self.twin)

    def runs(self) -> list[int]:
        return [entry.run for entry in self.twin.queue]

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.runs())))

    def new_id(self) -> int:
        self.ids += 1
        return self.ids

    idle = precondition(lambda self: self.plan is None)
    known = precondition(lambda self: self.plan is None and self.twin.queue)
    planning = precondition(lambda self: self.plan is not None)

    @initialize(paths=st.lists(st.integers(0, 3), min_size=2, max_size=7))
    def fill(self, paths: list[int]) -> None:
        for path in paths:
            self.insert(3, path, again=False, step=1)
        self.expose_all()

    @idle
    @rule(pages=st.integers(1, 5), path=st.integers(0, 3), again=st.booleans(), step=st.integers(0, 1))
    def insert(self, pages: int, path: int, again: bool, step: int) -> None:
        run = self.forgotten.pop() if again and self.forgotten else self.new_id()
        depth = max((each.depth + each.pages for each in self.twin.queue if each.path == path), default=0)
        self.now += step
        self.policy.insert(run, RunInfo(pages, depth), self.now)
        self.twin.insert(run, pages, depth, self.now, path)

    @known
    @rule(data=st.data(), step=st.integers(0, 1))
    def hit(self, data: st.DataObject, step: int) -> None:
        run = self.pick(data)
        self.now += step
        self.policy.hit(run, self.now)
        self.twin.hit(run, self.now)

    @known
    @rule(uses=st.lists(st.integers(0, 99), max_size=5))
    def hit_some(self, uses: list[int]) -> None:
        self.now += 1
        for use in uses:
            run = self.twin.queue[use % len(self.twin.queue)].run
            self.policy.hit(run, self.now)
            self.twin.hit(run, self.now)

    @known
    @rule(data=st.data())
    def expose(self, data: st.DataObject) -> None:
        run = self.pick(data)
        self.policy.expose(run)
        self.twin.find(run).exposed = True

    @known
    @rule()
    def expose_all(self) -> None:
        for entry in self.twin.queue:
            self.policy.expose(entry.run)
            entry.exposed = True

    @known
    @rule(data=st.data())
    def hide(self, data: st.DataObject) -> None:
        run = self.pick(data)
        self.policy.hide(run)
        self.twin.find(run).exposed = False

    @known
    @rule(data=st.data(), leaf=st.booleans())
    def split(self, data: st.DataObject, leaf: bool) -> None:
        run = self.pick(data)
        pages = self.twin.find(run).pages
        if pages < 2:
            return
        tail, tail_pages = self.new_id(), data.draw(st.integers(1, pages - 1))
        self.policy.split(run, tail, tail_pages)
        self.twin.split(run, tail, tail_pages)
        if leaf:  # as the engine does it
            self.policy.hide(run)
            self.policy.expose(tail)
            self.twin.find(run).exposed, self.twin.find(tail).exposed = False, True

    @known
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        head = self.twin.find(self.pick(data))
        end = (head.path, head.depth + head.pages)
        for after in self.twin.queue:
            if (after.path, after.depth) == end:
                self.policy.merge(head.run, after.run, head.pages + after.pages)
                self.twin.merge(head.run, after.run)
                return

    @known
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        run = self.pick(data)
        entry = self.twin.find(run)
        if entry.pages > 1:
            pages = data.draw(st.integers(1, entry.pages - 1))
            self.policy.trim(run, pages, [b"key"] * pages)
            entry.pages -= pages

    @known
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.drop(self.pick(data))

    def drop(self, run: int) -> None:
        self.policy.forget(run)
        self.twin.forget(run)
        self.forgotten.append(run)

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
    @rule(data=st.data())
    def expose_in_plan(self, data: st.DataObject) -> None:
        hidden = [entry.run for entry in self.twin_plan.copy.queue if not entry.exposed]
        if hidden and self.plan is not None:
            run = data.draw(st.sampled_from(sorted(hidden)))
            self.plan.expose(run)
            self.twin_plan.expose(run)

    @planning
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        assert self.plan is not None
        evicted = [run for run in self.twin_plan.given if data.draw(st.booleans())]
        self.plan.commit(evicted)
        self.twin_plan.commit(evicted)
        self.plan = None
        for run in data.draw(st.permutations(evicted)):
            if data.draw(st.integers(0, 9)):
                self.drop(run)

    @planning
    @rule()
    def abort(self) -> None:
        assert self.plan is not None
        self.plan.abort()
        self.plan = None

    @known
    @rule(count=st.integers(1, 5), keep=st.sampled_from([0, 0, 0, 1, 2]), backwards=st.booleans())
    def evict(self, count: int, keep: int, backwards: bool) -> None:
        plan, twin_plan = self.policy.begin(), PLANS[self.name](self.twin)
        given = [run for run in (plan.next() for _ in range(count)) if run is not None]
        assert given == [run for run in (twin_plan.next() for _ in range(count)) if run is not None]
        evicted = given[: len(given) - keep]
        plan.commit(evicted)
        twin_plan.commit(evicted)
        for run in evicted[::-1] if backwards else evicted:
            self.drop(run)

    @idle
    @rule()
    def drain(self) -> None:
        plan, twin_plan = self.policy.begin(), PLANS[self.name](self.twin)
        while (run := plan.next()) is not None:
            assert run == twin_plan.next()
        assert twin_plan.next() is None
        plan.abort()

    def teardown(self) -> None:
        if self.plan is None:
            self.drain()


@pytest.mark.parametrize("name", NAMES)
def test_policy_and_twin_agree(name: str) -> None:
    """Over any history, with plans that abort, expose and leave runs behind, both give the same victims."""
    machine = type(f"Comparison_{name}", (Comparison,), {"name": name})
    case = machine.TestCase
    case.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
    case().runTest()


@pytest.mark.parametrize("name", NAMES)
def test_policy_and_twin_agree_over_a_long_history(name: str, rng: random.Random) -> None:
    """Thousands of arrivals, uses and evictions over a few hundred runs: the same victims in order."""
    policy, twin = make_policy(name), Twin()
    for now in range(1500):
        policy.insert(now, RunInfo(1, now % 7), now)
        twin.insert(now, 1, now % 7, now)
        policy.expose(now)
        twin.find(now).exposed = True
        run = rng.choice(twin.queue).run
        policy.hit(run, now)
        twin.hit(run, now)
        run = rng.choice(twin.queue).run
        (policy.expose if now % 2 else policy.hide)(run)
        twin.find(run).exposed = bool(now % 2)
        if len(twin.queue) > 200:
            plan, twin_plan = policy.begin(), PLANS[name](twin)
            evicted = [run for run in (plan.next(), plan.next()) if run is not None]
            assert evicted == [twin_plan.next(), twin_plan.next()]
            plan.commit(evicted)
            twin_plan.commit(evicted)
            for run in evicted:
                policy.forget(run)
                twin.forget(run)


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
        assert entries(policy) <= bound * (2 * 10 + SLACK_ENTRIES)
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
