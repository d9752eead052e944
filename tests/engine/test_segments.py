"""Segments of a slotted tier moving between pools."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from worlds import (
    DISK,
    HOST,
    ME,
    NS,
    OTHER,
    PAGE_BYTES,
    TENANT,
    act,
    ev,
    fetch,
    line,
    matched,
    put,
    tier,
    world,
)

from hicache.types import Ack, Namespace


def segments(shell, namespace):
    return len(shell.engine._core.namespaces[namespace].pools[0].segments)


def test_a_new_tenant_gets_its_share_from_the_one_that_has_all():
    """Its store waits until the segment is empty and nobody maps it; pages go down, not away."""
    shell = world(tier(HOST, 16, 4), tier(DISK, 200))
    for number in range(4):
        put(shell, line(100 * number, 4))
    assert segments(shell, NS) == 4
    request = next(shell.requests)
    shell.handle(ev.Reserve(request, ME, TENANT, line(0, 3), wait_ms=5000))
    assert request not in shell.replies
    while shell.pending:
        shell.finish()
    assert shell.closing
    assert request not in shell.replies
    shell.close_segments()
    assert isinstance(shell.replies[request], act.ReserveResult)
    assert (segments(shell, NS), segments(shell, TENANT)) == (3, 1)
    assert all(matched(shell, line(100 * number, 4)) == 4 for number in range(4))


def test_the_poorer_pool_grows_to_its_fair_share_and_no_further():
    """Two tenants, four segments: two each in the end, however long one of them stores."""
    shell = world(tier(HOST, 16, 4), tier(DISK, 400))
    for number in range(4):
        put(shell, line(100 * number, 4))
    for number in range(12):
        put(shell, line(100 * number, 4), namespace=TENANT, wait_ms=5000)
        shell.finish_all()
    assert (segments(shell, NS), segments(shell, TENANT)) == (2, 2)
    assert shell.engine.stats().counters.reclaimed_segments == 2


def test_two_page_sizes_share_a_tier_too():
    """A slot size is as good a reason as a tenant."""
    shell = world(tier(HOST, 16, 4), tier(DISK, 200))
    shell.open_namespace(9, Namespace("m", 1, 2 * PAGE_BYTES))
    for number in range(4):
        put(shell, line(100 * number, 4))
    put(shell, line(0, 2), namespace=9, wait_ms=5000)
    assert {size for _, size in shell.open_segments[0].values()} == {PAGE_BYTES, 2 * PAGE_BYTES}


def test_leased_pages_hold_their_segment_until_the_lease_ends():
    """Nothing moves under a reader."""
    shell = world(tier(HOST, 16, 4))
    put(shell, line(0, 16))
    lease = fetch(shell, line(0, 16))
    request = next(shell.requests)
    shell.handle(ev.Reserve(request, OTHER, TENANT, line(0, 3), wait_ms=5000))
    shell.finish_all()
    shell.verify(NS, line(0, 16), shell.engine.lease_view(ME, lease.lease))
    assert request not in shell.replies
    shell.handle(ev.ReleaseLeases(ME, [lease.lease]))
    shell.close_segments()
    assert isinstance(shell.replies[request], act.ReserveResult)


def test_without_a_lower_tier_the_segments_pages_are_dropped_with_what_hangs_below():
    """No page is left below one that is gone."""
    shell = world(tier(HOST, 16, 4))
    put(shell, line(0, 16))
    put(shell, line(0, 3), namespace=TENANT, wait_ms=1000)
    assert 0 < matched(shell, line(0, 16)) < 16
    assert shell.engine.stats().stranded_pages == 0


def test_places_reserved_in_a_segment_that_is_given_up_are_followed():
    """A commit that lands there after the segment was chosen does not keep it for ever."""
    shell = world(tier(HOST, 4, 1), tier(DISK, 100))
    granted = shell.reserve(ME, NS, line(0, 4))
    request = next(shell.requests)
    shell.handle(ev.Reserve(request, OTHER, TENANT, line(0, 2), wait_ms=60_000))
    assert segments(shell, NS) == 1
    commit = next(shell.requests)
    shell.handle(ev.Commit(commit, ME, granted.reservation, [(0, 4)], (NS, line(0, 4)), last=True))
    assert isinstance(shell.settle(request), act.ReserveResult)
    assert matched(shell, line(0, 4)) == 4
    assert segments(shell, TENANT) == 1


def test_more_tenants_than_segments_take_turns():
    """Who has none gets one from the pool that was used longest ago."""
    shell = world(tier(HOST, 8, 2), tier(DISK, 400))
    shell.open_namespace(9, Namespace("m", 1, PAGE_BYTES, tenant="third"))
    put(shell, line(0, 2))
    put(shell, line(0, 2), namespace=TENANT)
    fetch(shell, line(0, 2), namespace=NS, ttl_ms=1)
    shell.advance(10)
    shell.advance(5000)
    put(shell, line(0, 2), namespace=9, wait_ms=5000)
    assert [segments(shell, n) for n in (NS, TENANT, 9)] == [1, 0, 1]
    assert matched(shell, line(0, 2), TENANT) == 2


def test_a_large_segment_is_emptied_in_bounded_steps():
    """A segment of many runs is worked off over several events, and only those runs are looked at."""
    shell = world(tier(HOST, 400, 2), tier(DISK, 1000), max_copies=4, check=False)
    for number in range(200):
        put(shell, line(10 * number, 2), ack=Ack.DURABLE if number % 2 else None)
    request = next(shell.requests)
    shell.handle(ev.Reserve(request, ME, TENANT, line(0, 3), wait_ms=60_000))
    assert isinstance(shell.settle(request), act.ReserveResult)
    shell.engine.check()
    assert sum(matched(shell, line(10 * number, 2)) for number in range(200)) == 400


def test_a_stray_segment_closed_changes_nothing():
    """A second report of the same segment, or of one never given up."""
    shell = world(tier(HOST, 16, 4))
    put(shell, line(0, 4))
    shell.handle(ev.SegmentClosed(0, 0))
    shell.handle(ev.SegmentClosed(7, 0))
    put(shell, line(50, 4))
