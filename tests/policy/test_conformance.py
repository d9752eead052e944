"""Every policy keeps the contract of the seam, in bounded memory and time; the checker finds those that do not."""

from __future__ import annotations

import heapq

import pytest

from hicache.errors import ConfigError
from hicache.policy import POLICIES, RunInfo, make_policy
from hicache.policy.conformance import CHECKS, check_policy
from hicache.policy.lru import LruPolicy
from hicache.policy.records import SLACK_ENTRIES

NAMES = sorted(POLICIES)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_every_policy_conforms(name, check):
    """Each check of the suite, on each policy of the zoo."""
    check(lambda: make_policy(name))


class GivesHidden(LruPolicy):
    """Hides nothing."""

    def hide(self, run):
        self.find(run)


class GivesUnknown(LruPolicy):
    """Forgets nothing."""

    def forget(self, run, ghosts=()):
        self.find(run)


class Unfinished(LruPolicy):
    """Cannot split."""

    def split(self, run, tail, tail_pages):
        raise NotImplementedError


class Loose(LruPolicy):
    """Takes hits of runs that it never met."""

    def hit(self, run, now):
        if run in self.records:
            super().hit(run, now)


@pytest.mark.parametrize("broken", [GivesHidden, GivesUnknown, Unfinished, Loose])
def test_the_checker_finds_a_broken_policy(broken):
    """A policy that breaks one promise fails a check, and the others still run."""
    results = list(check_policy(broken))
    assert len(results) == len(CHECKS)
    assert any(problem for _, problem in results)
    assert not any(problem for _, problem in check_policy(LruPolicy))


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded_by_the_runs_that_live(name):
    """Runs that come and go, are hit, hidden and exposed again leave nothing behind in the queues."""
    policy = make_policy(name)
    for run in range(10):
        policy.insert(run, RunInfo(9, 0), 0, ())
    queues = getattr(policy, "queues", ())
    for now in range(2000):
        for run in range(10):
            policy.hide(run)
            policy.expose(run)
            if run:
                policy.hit(run, now)
        policy.insert(100 + now, RunInfo(1, 0), now, ())
        policy.expose(100 + now)
        policy.forget(100 + now, ())
        assert all(len(queue) <= 3 * 10 + SLACK_ENTRIES for queue in queues)
        assert len(policy.records) == 10


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lru"])
def test_choosing_does_not_scan(name, monkeypatch):
    """The heap operations of an eviction do not grow with the number of runs."""
    calls = 0

    def counted(function):
        def count(*args):
            nonlocal calls
            calls += 1
            return function(*args)

        return count

    for function in ("heappush", "heappop", "heapreplace"):
        monkeypatch.setattr(heapq, function, counted(getattr(heapq, function)))
    spent = []
    for size in (300, 3000):
        policy = make_policy(name)
        for run in range(size):
            policy.insert(run, RunInfo(1, 0), run, ())
            if run % 2:
                policy.expose(run)
        for turn in range(80):  # the first plan moves what earlier arrivals have put off
            calls *= turn >= 20
            plan = policy.begin()
            victim = plan.next()
            plan.commit([victim])
            policy.forget(victim, ())
            policy.insert(victim, RunInfo(1, 0), size + turn, ())
            policy.expose(victim)
        spent.append(calls)
    assert spent[1] <= 2 * spent[0] + 60


def test_policies_take_parameters_and_ones_own_class():
    """``name:key=value``, ``py:module:Class``; everything else is a ConfigError that helps."""
    assert make_policy("slru:protected=0.5").protected == 0.5
    assert make_policy("2q:kin=0.1,kout=2").kout == 2.0
    assert isinstance(make_policy("py:hicache.policy.lru:LruPolicy"), LruPolicy)
    for name, words in {
        "magic": "lru",
        "slru:size=3": "protected",
        "slru:protected": "protected",
        "slru:protected=much": "not a number",
        "slru:protected=-1": "out of range",
        "lru:x=1": "none",
        "py:lru": "py:module:Class",
        "py:no_such_module:Class": "PYTHONPATH",
        "py:hicache.policy.lru:Missing": "Missing",
    }.items():
        with pytest.raises(ConfigError, match=words):
            make_policy(name)
