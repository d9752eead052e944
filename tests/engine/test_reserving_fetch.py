"""Fetch that reserves what it does not find: one call where a Reserve would follow."""

from __future__ import annotations

import random

import pytest

from hicache.engine import actions as act
from hicache.engine import events as ev
from tests.engine.shell import Shell
from tests.engine.worlds import DISK, HOST, ME, NS, fetch, line, matched, put, tier, world


def commit(shell: Shell, prompt: bytes, room: act.ReserveResult) -> None:
    pieces = [(room.present_pages, room.missing_pages)]
    request = next(shell.requests)
    shell.handle(ev.Commit(request, ME, room.reservation, pieces, (NS, prompt), last=True))
    answer = shell.settle(request)
    assert isinstance(answer, act.CommitResult) and answer.stored_pages == room.missing_pages


def reserve(shell: Shell, prompt: bytes, **fields: object) -> act.ReserveResult:
    answer = shell.reserve(ME, NS, prompt, **fields)
    assert isinstance(answer, act.ReserveResult)
    return answer


def test_miss_is_stored_with_one_call_less() -> None:
    shell = world(tier(HOST, 8))
    answer = fetch(shell, line(0, 4), reserve_missing=True)
    assert answer.lease == 0
    assert answer.reserved is not None and answer.reserved.missing_pages == 4
    commit(shell, line(0, 4), answer.reserved)
    assert matched(shell, line(0, 4)) == 4


def test_rest_of_a_hit() -> None:
    shell = world(tier(HOST, 8))
    put(shell, line(0, 3))
    answer = fetch(shell, line(0, 5), reserve_missing=True, reserve_ttl_ms=500)
    assert answer.granted_pages == 3 and answer.reserved is not None
    assert (answer.reserved.present_pages, answer.reserved.missing_pages) == (3, 2)
    assert answer.reserved.expires_ms == shell.now + 500
    commit(shell, line(0, 5), answer.reserved)
    assert fetch(shell, line(0, 5), reserve_missing=True).reserved == act.ReserveResult(0, 5, 0, 0)


def test_not_asked_for() -> None:
    shell = world(tier(HOST, 8))
    assert fetch(shell, line(0, 3)).reserved is None
    assert not shell.engine._core.reservations


def test_max_pages_bounds_the_lease_only() -> None:
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    answer = fetch(shell, line(0, 6), max_pages=2, reserve_missing=True)
    assert answer.granted_pages == 2 and answer.reserved is not None
    assert (answer.reserved.present_pages, answer.reserved.missing_pages) == (4, 2)


def test_full_of_leased_pages_answers_without() -> None:
    shell = world(tier(HOST, 4))
    put(shell, line(0, 4))
    held = fetch(shell, line(0, 4))
    assert held.granted_pages == 4
    answer = fetch(shell, line(0, 6), reserve_missing=True)
    assert answer.granted_pages == 4 and answer.reserved is None
    assert not shell.engine._core.reservations


def test_does_not_pass_those_who_wait() -> None:
    shell = world(tier(HOST, 4))
    put(shell, line(0, 4))
    held = fetch(shell, line(0, 4))
    request = next(shell.requests)
    shell.handle(ev.Reserve(request, ME, NS, line(50, 2), 0, 900))
    assert request not in shell.replies
    answer = fetch(shell, line(0, 2), reserve_missing=True)
    assert answer.reserved is None
    assert fetch(shell, line(70, 1), reserve_missing=True).reserved is None
    shell.handle(ev.ReleaseLeases(ME, [held.lease, answer.lease]))
    assert isinstance(shell.replies[request], act.ReserveResult)


def test_anchors_what_it_goes_on_from() -> None:
    """The pages that match stay until the reservation ends, also when the lease is gone."""
    shell = world(tier(HOST, 6))
    put(shell, line(0, 3))
    answer = fetch(shell, line(0, 5), reserve_missing=True)
    shell.handle(ev.ReleaseLeases(ME, [answer.lease]))
    put(shell, line(90, 1))
    reserve(shell, line(70, 3))
    assert answer.reserved is not None and matched(shell, line(0, 3)) == 3
    commit(shell, line(0, 5), answer.reserved)
    assert matched(shell, line(0, 5)) == 5


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "adaptive"])
@pytest.mark.parametrize("tiers", [1, 2])
def test_as_fetch_and_reserve(seed: int, policy: str, tiers: int) -> None:
    """A world that asks with one call and one that asks with two go the same way."""
    draw = random.Random(f"{seed}/{policy}/{tiers}")
    specs = (tier(HOST, 12), tier(DISK, 40))[:tiers]
    one, two = world(*specs, policy=policy), world(*specs, policy=policy)
    for _ in range(120):
        prompt = b"".join(line(10 * draw.randrange(3) + draw.randrange(2), draw.randint(1, 4)) for _ in "ab")
        joint = fetch(one, prompt, reserve_missing=True)
        apart = fetch(two, prompt)
        assert (joint.matched_pages, joint.granted_pages) == (apart.matched_pages, apart.granted_pages)
        room = reserve(two, prompt, wait_ms=500)
        mine = joint.reserved or reserve(one, prompt, wait_ms=500)
        assert (mine.present_pages, mine.missing_pages) == (room.present_pages, room.missing_pages)
        for shell, found, given in ((one, joint, mine), (two, apart, room)):
            if given.reservation:
                commit(shell, prompt, given)
            shell.handle(ev.ReleaseLeases(ME, [found.lease]))
            shell.finish_all()
    assert one.engine.stats().counters.hit_pages == two.engine.stats().counters.hit_pages
