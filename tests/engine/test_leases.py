"""Fetch, prefetch and pins: what is granted, promoted, kept, and let go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from worlds import (
    DEVICE,
    DISK,
    HOST,
    ME,
    NS,
    OTHER,
    act,
    ev,
    fetch,
    line,
    matched,
    pages,
    put,
    tier,
    used,
    where,
    world,
)

from hicache.errors import NotFoundError
from hicache.types import Ack, Outcome


def on_disk(count=8, host=16, **settings):
    """A world in which a line of pages stands on disk only."""
    shell = world(tier(HOST, host), tier(DISK, 100), **settings)
    put(shell, line(0, count), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=line(0, count), tier=0)
    assert where(shell, line(0, count)) == ["-", "R"]
    return shell


def test_resident_pages_are_granted_at_once_and_pinned():
    """A lease shows its pages until it is released; meanwhile they stay."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    lease = fetch(shell, line(0, 6))
    assert (lease.matched_pages, lease.granted_pages, lease.operation) == (4, 4, 0)
    assert shell.ask(ev.Clear, namespace=0) == act.EvictResult(0, 4)
    shell.handle(ev.ReleaseLeases(ME, [lease.lease]))
    assert shell.ask(ev.Clear, namespace=0) == act.EvictResult(4, 0)


def test_a_miss_leases_nothing():
    """No lease, no operation."""
    assert fetch(world(tier(HOST, 8)), line(0, 4)) == act.FetchResult(0, 0, 0, 0, (), 0, [0])


def test_max_pages_bounds_what_is_matched():
    """Pages beyond it are neither leased nor counted as missing."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    assert fetch(shell, line(0, 4), max_pages=2).matched_pages == 2
    assert shell.engine.stats().counters.missed_pages == 0


def test_another_sessions_release_and_renew_do_not_touch_a_lease():
    """A lease ends by its owner, its TTL or its session only."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    lease = fetch(shell, line(0, 4)).lease
    shell.handle(ev.ReleaseLeases(OTHER, [lease]))
    assert shell.ask(ev.RenewLeases, session=OTHER, leases=[lease], ttl_ms=500).lost == [lease]
    assert shell.engine.lease_view(ME, lease).granted_pages == 4
    with pytest.raises(NotFoundError):
        shell.engine.lease_view(OTHER, lease)
    shell.handle(ev.Unpin(lease))
    assert shell.engine.lease_view(ME, lease).granted_pages == 4


def test_an_expired_lease_is_gone_for_its_owner_and_its_slots_rest_for_the_grace():
    """Expired: not found, not renewable; not reused before the grace is over."""
    shell = world(tier(HOST, 4), expiry_grace_ms=500)
    put(shell, line(0, 4))
    lease = fetch(shell, line(0, 4), ttl_ms=100).lease
    shell.advance(100)
    with pytest.raises(NotFoundError):
        shell.engine.lease_view(ME, lease)
    assert shell.ask(ev.RenewLeases, session=ME, leases=[lease], ttl_ms=100).lost == [lease]
    assert isinstance(shell.store(OTHER, NS, line(50, 4)), act.Failure)
    shell.advance(500)
    assert isinstance(shell.store(OTHER, NS, line(50, 4)), act.CommitResult)


def test_a_renewed_lease_lives_on_and_a_shortened_one_ends_earlier():
    """The last renewal decides, in both directions."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    longer, shorter = fetch(shell, line(0, 4)).lease, fetch(shell, line(0, 4)).lease
    shell.ask(ev.RenewLeases, session=ME, leases=[longer], ttl_ms=5000)
    shell.ask(ev.RenewLeases, session=ME, leases=[shorter], ttl_ms=50)
    shell.advance(60)
    with pytest.raises(NotFoundError):
        shell.engine.lease_view(ME, shorter)
    shell.advance(4000)
    assert shell.engine.lease_view(ME, longer).granted_pages == 4
    shell.advance(1000)
    with pytest.raises(NotFoundError):
        shell.engine.lease_view(ME, longer)


def test_timers_of_released_leases_do_not_pile_up():
    """Ten thousand short leases with long TTLs leave no ten thousand timers."""
    shell = world(tier(HOST, 8), check=False, max_ttl_ms=600_000)
    put(shell, line(0, 4))
    for _ in range(10_000):
        lease = fetch(shell, line(0, 4), ttl_ms=600_000).lease
        shell.handle(ev.ReleaseLeases(ME, [lease]))
    assert len(shell.engine._core.timers) < 3000


def test_the_ttl_is_bounded():
    """``max_ttl_ms`` is the most that anybody gets."""
    shell = world(tier(HOST, 8), max_ttl_ms=2000)
    put(shell, line(0, 4))
    assert fetch(shell, line(0, 4), ttl_ms=10**9).expires_ms == shell.now + 2000


def test_pages_on_disk_are_promoted_and_the_lease_grows():
    """Nothing is granted at once; the operation ends; the lease shows the pages."""
    shell = on_disk()
    lease = fetch(shell, line(0, 8))
    assert (lease.granted_pages, lease.matched_pages, lease.tier_pages) == (0, 8, [0, 8])
    assert lease.operation
    shell.finish_all()
    assert shell.done_operations[lease.operation] == act.OperationDone(lease.operation, 8, 0)
    view = shell.engine.lease_view(ME, lease.lease)
    shell.verify(NS, line(0, 8), view)
    assert (view.granted_pages, view.operation) == (8, 0)
    assert shell.engine.operation_view(ME, lease.operation).done
    assert shell.engine.lease_prompt(ME, lease.lease) == (NS, line(0, 8))


def test_without_promotion_only_the_resident_prefix_is_leased():
    """``promote=False`` starts nothing."""
    shell = on_disk()
    fetch(shell, line(0, 3))
    shell.finish_all()
    lease = fetch(shell, line(0, 8), promote=False)
    assert (lease.granted_pages, lease.operation) == (3, 0)
    assert not shell.pending


def test_two_fetches_of_the_same_pages_share_one_copy():
    """Who comes second waits for the copy that is under way."""
    shell = on_disk()
    first, second = fetch(shell, line(0, 8)), fetch(shell, line(0, 8), session=OTHER)
    assert len(shell.pending) == 1
    shell.handle(ev.ReleaseLeases(ME, [first.lease]))
    shell.finish_all()
    assert shell.engine.lease_view(OTHER, second.lease).granted_pages == 8


def test_a_failed_promotion_cuts_the_lease_where_it_failed():
    """What arrived is granted; the rest is let go."""
    shell = on_disk(max_copy_pages=2)
    lease = fetch(shell, line(0, 8))
    shell.finish(0)
    shell.finish(0, [Outcome.OK, Outcome.CORRUPT], source_fault=True)
    shell.finish_all()
    assert shell.engine.lease_view(ME, lease.lease).granted_pages == 3
    assert matched(shell, line(0, 8)) == 3


def test_a_fetch_that_finds_no_room_grants_what_it_can():
    """Nothing under way can help: the operation ends at once, the lease has the prefix."""
    shell = on_disk(count=6, host=8)
    put(shell, line(50, 6))
    fetch(shell, line(50, 6), session=OTHER)
    lease = fetch(shell, line(0, 6))
    shell.finish_all()
    if lease.lease:
        assert shell.engine.lease_view(ME, lease.lease).granted_pages <= 2
    assert not any(not operation.done for operation in shell.engine._core.operations.values())
    assert shell.engine.stats().leases <= 2


def test_an_operation_that_waits_for_room_ends_with_its_time():
    """However busy the tiers are, nobody waits for ever."""
    shell = on_disk(count=6, host=8, default_ttl_ms=1000)
    put(shell, line(50, 8))
    held = fetch(shell, line(50, 8), session=OTHER, ttl_ms=100_000)
    put_aside = fetch(shell, line(50, 1), session=OTHER)
    answer = shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(50, 8), tier=1)
    assert answer.moving_pages == 8
    assert shell.pending  # a copy of somebody else goes on and on
    waiting = shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(0, 6), tier=0)
    assert waiting.operation not in shell.done_operations
    shell.advance(1001)
    assert shell.done_operations[waiting.operation].failed_pages == 6
    assert (held.granted_pages, put_aside.granted_pages) == (8, 1)


def test_a_fetch_that_waits_goes_on_when_room_comes():
    """The second promotion starts when the first lease is released."""
    shell = on_disk(count=6, host=8)
    put(shell, line(50, 6), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=line(50, 6), tier=0)
    first = fetch(shell, line(0, 6))
    second = fetch(shell, line(50, 6), session=OTHER)
    assert second.operation
    shell.handle(ev.ReleaseLeases(ME, [first.lease]))
    shell.finish_all()
    assert shell.engine.lease_view(OTHER, second.lease).granted_pages == 6


def test_cancelling_leaves_copies_that_others_share():
    """What has not started never will; what is under way arrives."""
    shell = on_disk(max_copy_pages=2, max_copies=1)
    lease = fetch(shell, line(0, 8))
    shell.handle(ev.CancelOperation(OTHER, lease.operation))
    shell.handle(ev.CancelOperation(ME, lease.operation))
    shell.finish_all()
    assert shell.engine.lease_view(ME, lease.lease).granted_pages == 2
    assert shell.done_operations[lease.operation].failed_pages == 6


def test_an_expired_lease_starts_no_further_promotions():
    """Its copies under way arrive; the rest is given up."""
    shell = on_disk(max_copy_pages=2, max_copies=1)
    lease = fetch(shell, line(0, 8), ttl_ms=100)
    shell.advance(100)
    shell.finish_all()
    assert shell.done_operations[lease.operation].moved_pages == 2
    assert where(shell, line(0, 8)) == ["-", "R"]


def test_prefetch_promotes_without_a_lease():
    """Pages come up and can be evicted again; nothing to do is answered with operation 0."""
    shell = on_disk()
    answer = shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(0, 8), tier=0)
    shell.finish_all()
    assert (answer.matched_pages, answer.moving_pages) == (8, 8)
    assert where(shell, line(0, 8)) == ["R", "R"]
    again = shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(0, 8), tier=0)
    assert again == act.OperationResult(0, 8, 0)


def test_prefetch_to_the_durable_tier_saves_what_stands_above_first():
    """The disk stays closed towards the root."""
    shell = world(tier(DEVICE, 8), tier(HOST, 16), tier(DISK, 100), max_copy_pages=3)
    put(shell, line(0, 8))
    shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(0, 8), tier=2)
    shell.finish_all()
    assert where(shell, line(0, 8)) == ["R", "-", "R"]


def test_operations_of_an_ended_session_end_with_it():
    """Nothing more is started for it."""
    shell = on_disk(max_copy_pages=2, max_copies=1)
    shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(0, 8), tier=0)
    shell.handle(ev.SessionEnded(ME, dead=False))
    shell.finish_all()
    assert where(shell, line(0, 3)) == ["-", "R"]


def test_a_dead_sessions_leases_end_at_once_and_a_lost_ones_after_the_grace():
    """Nobody reads for a dead process; a lost one may still be reading."""
    shell = world(tier(HOST, 8), expiry_grace_ms=500)
    put(shell, line(0, 4))
    put(shell, line(50, 4))
    fetch(shell, line(0, 4), session=ME)
    fetch(shell, line(50, 4), session=OTHER)
    shell.handle(ev.SessionEnded(ME, dead=True))
    shell.handle(ev.SessionEnded(OTHER, dead=False))
    assert shell.ask(ev.Clear, namespace=0) == act.EvictResult(4, 4)
    shell.advance(500)
    assert shell.ask(ev.Clear, namespace=0) == act.EvictResult(4, 0)
    assert shell.engine.stats().counters.lost_sessions == 1


def test_a_suspended_session_keeps_everything_if_it_comes_back_in_time():
    """A blip is not a death; silence is."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    lease = fetch(shell, line(0, 4), ttl_ms=100_000).lease
    shell.handle(ev.SessionSuspended(ME, 300))
    shell.handle(ev.SessionResumed(ME))
    shell.advance(400)
    assert shell.engine.lease_view(ME, lease).granted_pages == 4
    shell.handle(ev.SessionSuspended(ME, 300))
    shell.advance(300)
    with pytest.raises(NotFoundError):
        shell.engine.lease_view(ME, lease)
    assert shell.engine.stats().sessions == 1


def test_pins_keep_pages_in_the_tier_that_they_name():
    """Also where that is disk, and until their TTL if they have one."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 4))
    disk = shell.ask(ev.Pin, namespace=NS, prompt=line(0, 4), tier=1)
    shell.finish_all()
    assert where(shell, line(0, 4)) == ["R", "R"]
    host = shell.ask(ev.Pin, namespace=NS, prompt=line(0, 2), tier=0, ttl_ms=100)
    assert shell.ask(ev.Clear, namespace=0).kept_pages == 4
    shell.handle(ev.Unpin(disk.pin))
    assert shell.ask(ev.Clear, namespace=0) == act.EvictResult(2, 2)
    shell.advance(100)
    shell.advance(2000)
    shell.handle(ev.Unpin(host.pin))
    assert shell.ask(ev.Clear, namespace=0) == act.EvictResult(2, 0)


def test_pinning_what_is_not_there_pins_nothing():
    """A miss, or no room in the tier, is pin 0."""
    shell = world(tier(HOST, 8), tier(DISK, 1))
    assert shell.ask(ev.Pin, namespace=NS, prompt=line(0, 4), tier=0) == act.PinResult(0, 0)
    put(shell, line(0, 4))
    shell.latch(1, readable=True)
    assert shell.ask(ev.Pin, namespace=NS, prompt=line(0, 4), tier=1) == act.PinResult(0, 0)
    assert shell.engine.stats().leases == 0


def test_finished_operations_are_forgotten_in_time():
    """A late waiter of a recent one is answered; the table is bounded."""
    shell = world(tier(HOST, 8), tier(DISK, 100), check=False)
    put(shell, pages(7), ack=Ack.DURABLE)
    for _ in range(1100):
        shell.ask(ev.Evict, namespace=NS, prompt=pages(7), tier=0)
        last = shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=pages(7), tier=0)
        shell.finish_all()
    assert len(shell.engine._core.operations) <= 1024
    assert shell.engine.operation_view(ME, last.operation).moved_pages == 1
    with pytest.raises(NotFoundError):
        shell.engine.operation_view(ME, 1)


def test_a_retrieval_leaves_the_ledger_as_it_was():
    """Promote, read, release, evict: nothing is held at the end."""
    shell = on_disk()
    lease = fetch(shell, line(0, 8))
    shell.finish_all()
    shell.handle(ev.ReleaseLeases(ME, [lease.lease]))
    shell.ask(ev.Clear, namespace=0)
    assert (used(shell, 0), used(shell, 1), shell.engine.stats().runs) == (0, 0, 0)
