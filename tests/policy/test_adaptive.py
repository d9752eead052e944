"""Our own policy: the hazard table against brute force, the order against a twin, robustness against LRU."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache.policy import RunInfo, make_policy
from hicache.policy.adaptive import AdaptivePolicy
from hicache.policy.candidates import KINDS
from hicache.policy.hazard import BUCKETS, HazardTable, bucket, worths
from hicache.sim.leaf import LeafCache

WIDTHS = [sum(bucket(age) == index for age in range(5000)) for index in range(40)]


def test_buckets_are_exact_below_four_and_a_quarter_octave_above():
    """Every age has a bucket, buckets are in order, none is wider than a quarter of its age."""
    last = 0
    for age in range(1, 100_000):
        here = bucket(age)
        assert last <= here <= last + 1
        last = here
    assert all(width <= max(1, 2 ** (index // 4 - 1)) for index, width in enumerate(WIDTHS[:36]))
    assert bucket(1 << 60) == BUCKETS - 1


@given(st.lists(st.floats(0, 1), min_size=5, max_size=30))
def test_worth_is_the_best_ratio_over_all_horizons(front):
    """Gittins' index by the definition: for each age the best of all ages to stop at."""
    hazards = front + [0.0] * (BUCKETS - len(front))
    found = worths(hazards)
    for start in range(len(front)):
        best, chance, time, waiting = 0.0, 0.0, 0.0, 1.0
        for index in range(start, len(front)):
            chance += waiting * hazards[index]
            time += waiting * WIDTHS[index] * (1 - hazards[index] / 2)
            waiting *= 1 - hazards[index]
            best = max(best, chance / time)
        assert found[start] == pytest.approx(best, abs=1e-12)


def test_the_table_learns_a_pause():
    """A kind that comes back after 200 ticks is worth more at 150 than at once; one that never does is worth least."""
    table = HazardTable(3)
    for _ in range(300):
        table.reuse(0, 200, 10)
        table.lose(1, 400, 10)
        table.reuse(2, 5, 10)
    table.refresh([])
    assert table.worth[0][bucket(150)] > 2 * table.worth[0][bucket(1)]
    assert table.worth[0][bucket(1)] > 2 * table.worth[1][bucket(1)]
    assert table.worth[2][bucket(1)] > table.worth[0][bucket(1)]
    assert table.worth[2][bucket(150)] < table.worth[0][bucket(150)]
    before = [list(row) for row in table.worth]
    table.decay(0.5)
    table.refresh([])
    assert table.worth != before
    assert table.ended == 0


def test_with_nothing_learned_it_is_lru():
    """Few runs, no reuse: the oldest first, the deepest of one age."""
    policy = make_policy("adaptive")
    for run, (depth, now) in enumerate([(4, 1), (0, 1), (4, 300), (9, 9000)]):
        policy.insert(run, RunInfo(2, depth), now)
        policy.expose(run)
    plan = policy.begin()
    assert [plan.next() for _ in range(5)] == [0, 1, 2, 3, None]


class Twin:
    """The definition on plain lists: the exposed in a list with holes filled from its end, worths looked up."""

    def __init__(self, policy):
        self.policy = policy  # for its table only

    def victims(self, count):
        policy = self.policy
        left = list(policy.exposed)
        state, found = policy.state, []
        for _ in range(count):
            if not left:
                break
            drawn = range(len(left))
            if len(left) > policy.sample:
                drawn = []
                for _ in range(policy.sample):
                    state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
                    drawn.append((state // 2**32) * len(left) // 2**32)
            chosen = min(
                (left[at] for at in drawn),
                key=lambda each: (
                    policy.steps[each.kind][bucket(policy.now - each.last)],
                    each.last,
                    -each.depth,
                    -each.run,
                ),
            )
            found.append(chosen.run)
            at = left.index(chosen)
            left[at] = left[-1]
            left.pop()
        return found


def test_order_equals_the_definition(rng: random.Random):
    """Random histories: every plan gives what the definition gives, whatever is aborted or spared."""
    policy = AdaptivePolicy(sample=8)
    twin, live, now, seen = Twin(policy), [], 0, 0
    for run in range(4000):
        now += rng.randrange(3)
        pages = rng.randint(1, 9)
        start = rng.randrange(200) << 8
        ids = list(range(start, start + pages))
        policy.insert(run, RunInfo(pages, rng.randrange(4)), now, ids)
        policy.expose(run)
        live.append((run, ids))
        for _ in range(rng.randrange(3)):
            policy.hit(rng.choice(live)[0], now)
        if rng.random() < 0.1:
            policy.hide(rng.choice(live)[0])
        while len(live) > 60:
            count = rng.randint(1, 5)
            expected = twin.victims(count)
            plan = policy.begin()
            given_ = [plan.next() for _ in expected]
            assert given_ == expected
            if rng.random() < 0.3:
                plan.abort()
                continue
            leaving = given_[rng.randrange(2) :]
            plan.commit(leaving)
            for gone in leaving:
                ids = next(ids for each, ids in live if each == gone)
                policy.forget(gone, ids)
                live = [each for each in live if each[0] != gone]
                seen += 1
            if not expected:
                for each, _ in live:
                    policy.expose(each)
    assert seen > 3000
    assert any(any(row) for row in policy.table._reused)


def test_ghost_pieces_are_remembered_whole():
    """A piece that left is known by its first page, as long as it is followed page by page."""
    policy = AdaptivePolicy()
    policy.insert(1, RunInfo(6, 0), 1, [1, 2, 3, 4, 5, 6])
    policy.trim(1, 2, [5, 6])
    policy.forget(1, [1, 2, 3, 4])
    assert policy.known([1, 2, 3, 4, 5, 6, 7]) == 6
    assert policy.known([1, 2]) == 2
    assert policy.known([9, 1]) == 0
    policy.insert(2, RunInfo(6, 0), 50, [1, 2, 3, 4, 5, 6])
    assert policy.records[2].uses == 1
    assert policy.table.ended == 6
    assert policy.known([1]) == 0


def test_memory_does_not_grow_with_history():
    """Ghosts stay within the bound, kinds are a fixed number."""
    policy = AdaptivePolicy(ghosts=2000)
    for run in range(30_000):
        policy.insert(run, RunInfo(1, run % 5), run, [run])
        policy.expose(run)
        if run >= 100:
            plan = policy.begin()
            victim = plan.next()
            plan.commit([victim])
            policy.forget(victim, [victim])
    assert len(policy.ghosts) <= 2000
    assert len(policy.records) == 100
    assert policy.table.kinds == KINDS


def chat(seed, count=3000):
    rng = random.Random(seed)
    fresh, sessions, requests = 0, [], []
    for _ in range(count):
        if sessions and rng.random() < 0.6:
            session = sessions.pop(max(0, len(sessions) - 1 - int(rng.expovariate(1 / 120))))
        else:
            session = [-1, -2]
        more = 1 + int(rng.expovariate(1 / 5))
        session = [*session, *range(fresh, fresh + more)]
        fresh += more
        requests.append(session)
        if len(session) < 120:
            sessions.append(session)
    return requests


def zipf(seed, count=5000):
    rng = random.Random(seed)
    documents = [list(range(100 * each, 100 * each + rng.randint(1, 12))) for each in range(2000)]
    return rng.choices(documents, [1 / (rank + 1) for rank in range(2000)], k=count)


def loop(seed, count=4000):
    return [list(range(8 * (at % 250), 8 * (at % 250) + 8)) for at in range(count)]


def scan(seed, count=2000):
    hot = [list(range(10**6 + 10 * each, 10**6 + 10 * each + 6)) for each in range(20)]
    rng = random.Random(seed)
    return [list(range(8 * at, 8 * at + 8)) if at % 3 else rng.choice(hot) for at in range(count)]


@pytest.mark.parametrize(
    ("make", "below"),
    [(chat, 0.009), (zipf, 0.005), (loop, 0.005), (scan, 0.005)],
    ids=["chat", "zipf", "loop", "scan"],
)
def test_never_much_below_lru(make, below):
    """On kinds of traffic that it was not made on: at no size more than half a percent below LRU.

    ``chat`` is LRU's home (reuse falls with stack distance and with nothing else) in pools of a few dozen runs: there
    what is learned is noise, and costs up to nine thousandths (docs/POLICIES.md, what is missing).
    """
    requests = make(3)
    distinct = len({block for request in requests for block in request})
    for share in (1, 5, 10, 25, 50):
        capacity = distinct * share // 100
        adaptive = LeafCache(make_policy("adaptive"), capacity).replay(requests).ratio
        lru = LeafCache(make_policy("lru"), capacity).replay(requests).ratio
        assert adaptive >= lru - below
