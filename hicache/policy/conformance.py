"""What every policy must do, as checks that anyone can run on his own (``hicache policy check py:module:Class``).

The checks know the seam only. They drive a policy through histories of a small leaf-first cache and through its
mistakes, and raise ``BrokenPolicyError`` with what was expected. None of them says that a policy is good.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from hicache.errors import HicacheError, ViolationError
from hicache.policy.base import Plan, Policy, RunInfo

Maker = Callable[[], Policy]

#: What a policy that is wrong may raise, besides our own errors.
MISHAPS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class BrokenPolicyError(HicacheError):
    """A policy does not keep the contract of the seam."""


def require(holds: bool, text: str) -> None:  # noqa: FBT001 - a condition, as in assert
    """Raises BrokenPolicyError unless it holds."""
    if not holds:
        raise BrokenPolicyError(text)


def drain(plan: Plan) -> list[int]:
    """All victims of a plan."""
    victims: list[int] = []
    while (run := plan.next()) is not None:
        require(run not in victims, f"a plan gave run {run} twice")
        victims.append(run)
    return victims


def candidates(policy: Policy) -> list[int]:
    """All victims that a plan would give, with nothing changed."""
    plan = policy.begin()
    victims = drain(plan)
    plan.abort()
    return victims


def _filled(make: Maker, runs: int = 3, pages: int = 4) -> Policy:
    policy = make()
    for run in range(1, runs + 1):
        policy.insert(run, RunInfo(pages, pages * run), run, ())
        policy.expose(run)
    return policy


def only_exposed_runs_are_given(make: Maker) -> None:
    """A plan gives every exposed run once, and no hidden one unless the plan exposes it."""
    policy = _filled(make)
    policy.hide(2)
    policy.hide(2)
    require(sorted(candidates(policy)) == [1, 3], "run 2 is hidden; a plan must give 1 and 3 only")
    plan = policy.begin()
    plan.expose(2)
    plan.expose(2)
    require(sorted(drain(plan)) == [1, 2, 3], "the plan exposed run 2 and must give it")
    plan.abort()
    require(sorted(candidates(policy)) == [1, 3], "what a plan exposes is hidden again after it")
    policy.expose(2)
    require(sorted(candidates(policy)) == [1, 2, 3], "run 2 was exposed and must be given")


def an_aborted_plan_leaves_no_trace(make: Maker) -> None:
    """After an abort, and after a plan that was left open, the same victims come in the same order."""
    policy = _filled(make, runs=6)
    policy.hit(2, 9)
    first = candidates(policy)
    require(candidates(policy) == first, "the same plan twice must give the same victims")
    left = policy.begin()
    left.next()
    require(candidates(policy) == first, "a plan left open counts as aborted")
    _must_raise("a plan that is over was used", left.next)


def a_commit_takes_what_it_names(make: Maker) -> None:
    """Runs that a commit evicts are hidden until they are forgotten; those it spares stay candidates."""
    policy = _filled(make, runs=4)
    plan = policy.begin()
    first, second = plan.next(), plan.next()
    require(first is not None and second is not None, "there were four candidates")
    assert first is not None
    plan.commit([first])
    require(first not in candidates(policy), "an evicted run is hidden until it is forgotten")
    require(len(candidates(policy)) == 3, "what a commit does not name stays")
    policy.expose(first)
    require(first in candidates(policy), "an evicted run that stays after all can be exposed")
    policy.hide(first)
    policy.forget(first, ())
    require(len(candidates(policy)) == 3, "a forgotten run is gone")
    policy.insert(first, RunInfo(2, 0), 9, ())
    policy.expose(first)
    require(first in candidates(policy), "a forgotten id may come back as a new run")


def pieces_are_runs(make: Maker) -> None:
    """Splitting gives a hidden tail, merging takes the second run away, trimming keeps the run."""
    policy = _filled(make, runs=2)
    policy.split(1, 7, 1)
    require(7 not in candidates(policy), "the tail of a split is hidden")
    policy.expose(7)
    require(sorted(candidates(policy)) == [1, 2, 7], "head and tail are runs of their own")
    policy.trim(2, 3, ())
    require(2 in candidates(policy), "a trimmed run stays")
    policy.merge(1, 7, 4)
    require(sorted(candidates(policy)) == [1, 2], "a merged run is one run")


def mistakes_are_violations(make: Maker) -> None:
    """Calls that break the contract raise ViolationError and change nothing."""
    mistakes: dict[str, Callable[[Policy], object]] = {
        "insert of a known run": lambda policy: policy.insert(1, RunInfo(1, 0), 9, ()),
        "hit of an unknown run": lambda policy: policy.hit(9, 9),
        "hide of an unknown run": lambda policy: policy.hide(9),
        "expose of an unknown run": lambda policy: policy.expose(9),
        "forget of an unknown run": lambda policy: policy.forget(9, ()),
        "trim of an unknown run": lambda policy: policy.trim(9, 1, ()),
        "trim of all pages": lambda policy: policy.trim(1, 4, ()),
        "trim of no page": lambda policy: policy.trim(1, 0, ()),
        "split of an unknown run": lambda policy: policy.split(9, 3, 1),
        "split that leaves no head": lambda policy: policy.split(1, 3, 4),
        "split to a known run": lambda policy: policy.split(1, 2, 1),
        "merge with an unknown run": lambda policy: policy.merge(1, 9, 5),
        "merge with itself": lambda policy: policy.merge(1, 1, 8),
        "merge to a wrong size": lambda policy: policy.merge(1, 2, 9),
        "plan that exposes an unknown run": lambda policy: policy.begin().expose(9),
        "commit of what was not given": lambda policy: policy.begin().commit([1]),
    }
    for name, mistake in mistakes.items():
        policy = _filled(make, runs=2)
        before = candidates(policy)
        _must_raise(name, mistake, policy)
        require(candidates(policy) == before, f"{name} changed the order")


def _must_raise(name: str, call: Callable[..., object], *arguments: object) -> None:
    try:
        call(*arguments)
    except ViolationError:
        return
    raise BrokenPolicyError(f"{name}: expected ViolationError")


def a_tree_lives_on_it(make: Maker, steps: int = 3000, seed: int = 1) -> None:
    """A small leaf-first cache: victims are leaves, room can always be made, and a rerun gives the same history."""
    require(_history(make(), steps, seed) == _history(make(), steps, seed), "two equal runs differ")


def _history(policy: Policy, steps: int, seed: int) -> list[int]:
    """Victims of a random history of chains: each chain grows, is used, and is evicted from its end."""
    rng = random.Random(seed)  # noqa: S311 - a test history, not a secret
    chains: dict[int, list[int]] = {chain: [] for chain in range(12)}
    owner: dict[int, int] = {}
    pages: dict[int, int] = {}
    victims: list[int] = []
    room, ids = 60, 0
    for now in range(1, steps + 1):
        chain = chains[which := min(rng.randrange(12), rng.randrange(12))]
        for run in chain:
            policy.hit(run, now)
        if chain:
            policy.hide(chain[-1])
        depth = sum(pages[run] for run in chain)
        fresh = [which << 32 | page for page in range(depth, depth + rng.randint(1, 4))]
        need = len(fresh) - room
        if need > 0:
            room += _evict(policy, need, (chains, owner, pages), victims)
        if len(fresh) <= room:
            cut = policy.known(fresh) if policy.wants_ghosts else 0
            require(0 <= cut <= len(fresh), "known() is a number of pages, from the first on")
            for piece in (fresh[:cut], fresh[cut:]):
                if piece:
                    ids += 1
                    policy.insert(ids, RunInfo(len(piece), depth), now, piece if policy.wants_ghosts else ())
                    depth += len(piece)
                    owner[ids], pages[ids] = which, len(piece)
                    chain.append(ids)
                    room -= len(piece)
        if chain:
            policy.expose(chain[-1])
        if len(chain) > 6 and rng.random() < 0.1:
            room += _drop_chain(policy, chain, pages)
    require(len(victims) > 50, "the history must evict")
    return victims


def _drop_chain(policy: Policy, chain: list[int], pages: dict[int, int]) -> int:
    """All runs of a chain are gone, not evicted; returns the room that gives."""
    room = 0
    policy.hide(chain[-1])
    for run in reversed(chain):
        policy.forget(run, ())
        room += pages.pop(run)
    chain.clear()
    return room


def _evict(
    policy: Policy,
    need: int,
    state: tuple[dict[int, list[int]], dict[int, int], dict[int, int]],
    victims: list[int],
) -> int:
    chains, owner, pages = state
    plan = policy.begin()
    left = {chain: list(runs) for chain, runs in chains.items()}
    chosen: list[int] = []
    gained = 0
    while gained < need:
        run = plan.next()
        if run is None:
            break
        above = left[owner[run]]
        require(above[-1] == run, f"run {run} was given, and is no leaf")
        above.pop()
        if above:
            plan.expose(above[-1])
        gained += pages[run]
        chosen.append(run)
    plan.commit(chosen)
    for run in chosen:
        chain = chains[owner[run]]
        chain.pop()
        start = sum(pages[each] for each in chain)
        ids = [owner[run] << 32 | page for page in range(start, start + pages[run])]
        policy.forget(run, ids if policy.wants_ghosts else ())
        if chain:
            policy.expose(chain[-1])
        del pages[run], owner[run]
    victims.extend(chosen)
    return gained


CHECKS: tuple[Callable[[Maker], None], ...] = (
    only_exposed_runs_are_given,
    an_aborted_plan_leaves_no_trace,
    a_commit_takes_what_it_names,
    pieces_are_runs,
    mistakes_are_violations,
    a_tree_lives_on_it,
)


def check_policy(make: Maker) -> Iterator[tuple[str, str]]:
    """Each check's promise, and what broke it ("" if nothing)."""
    for check in CHECKS:
        promise = (check.__doc__ or check.__name__).strip()
        try:
            check(make)
        except (HicacheError, *MISHAPS) as error:
            yield promise, f"{type(error).__name__}: {error}"
        else:
            yield promise, ""
