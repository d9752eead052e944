"""Reserve and commit: room, waiting, pressure, order, failures."""

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

from hicache.errors import ErrorCode
from hicache.types import Ack, Namespace, Outcome, Pressure


def test_store_at_eight_times_the_capacity_refuses_nothing():
    """With a disk below, stores at full speed wait for drains and drop nothing that was said to be kept."""
    shell = world(tier(HOST, 16), tier(DISK, 400))
    for number in range(16):
        answer = put(shell, line(100 * number, 8), wait_ms=1000)
        assert (answer.stored_pages, answer.failed_pages) == (8, 0)
    stats = shell.engine.stats()
    assert stats.counters.refused_calls == 0
    assert stats.counters.unsaved_dropped_pages == 0
    shell.finish_all()
    assert all(matched(shell, line(100 * number, 8)) == 8 for number in range(16))


def test_with_a_dead_disk_unsaved_pages_are_dropped_and_counted_rather_than_stores_refused():
    """A latched lower tier costs hits, not availability."""
    shell = world(tier(HOST, 16), tier(DISK, 400))
    shell.latch(1, readable=True)
    for number in range(16):
        put(shell, line(100 * number, 8), wait_ms=1000)
    counters = shell.engine.stats().counters
    assert counters.refused_calls == 0
    assert counters.unsaved_dropped_pages == 14 * 8


def test_everything_pinned_is_refused_with_a_time_to_retry_and_the_pinned_pages_stay():
    """RESOURCE_EXHAUSTED carries retry_after_ms; leased pages keep their bytes."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 8))
    lease = fetch(shell, line(0, 8), ttl_ms=30_000)
    shell.finish_all()
    answer = shell.store(OTHER, NS, line(50, 4), wait_ms=500)
    assert isinstance(answer, act.Failure)
    assert answer.code is ErrorCode.EXHAUSTED
    assert answer.retry_after_ms > 0
    shell.verify(NS, line(0, 8), shell.engine.lease_view(ME, lease.lease))
    assert shell.engine.stats().counters.refused_calls == 1


def test_a_waiting_reserve_goes_on_when_a_lease_is_released():
    """Room that a reader gives back goes to who waits first."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 8))
    lease = fetch(shell, line(0, 8))
    first, second = next(shell.requests), next(shell.requests)
    shell.handle(ev.Reserve(first, ME, NS, line(50, 6), wait_ms=500))
    shell.handle(ev.Reserve(second, OTHER, NS, line(70, 6), wait_ms=500))
    assert not {first, second} & set(shell.replies)
    shell.handle(ev.ReleaseLeases(ME, [lease.lease]))
    assert isinstance(shell.replies[first], act.ReserveResult)
    assert second not in shell.replies
    shell.advance(600)
    refused = shell.replies[second]
    assert isinstance(refused, act.ReserveResult)  # the last try takes what there is
    assert 0 < refused.missing_pages < 6


def test_waiting_reserves_of_an_ended_session_are_answered():
    """Nobody waits for a session that is gone."""
    shell = world(tier(HOST, 4))
    put(shell, line(0, 4))
    fetch(shell, line(0, 4), session=OTHER)
    request = next(shell.requests)
    shell.handle(ev.Reserve(request, ME, NS, line(50, 4), wait_ms=5000))
    shell.handle(ev.SessionEnded(ME, dead=True))
    answer = shell.replies[request]
    assert isinstance(answer, act.Failure)
    assert answer.code is ErrorCode.UNAVAILABLE


@pytest.mark.parametrize("pressure", list(Pressure))
def test_drop_pressure_does_not_wait_for_drains(pressure: Pressure):
    """DROP is answered at once; WAIT when the copies down have arrived, and keeps the pages."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 8))
    request = next(shell.requests)
    shell.handle(ev.Reserve(request, ME, NS, line(50, 8), wait_ms=5000, pressure=pressure))
    assert (request in shell.replies) == (pressure is Pressure.DROP)
    assert isinstance(shell.settle(request), act.ReserveResult)
    shell.finish_all()
    assert matched(shell, line(0, 8)) == (8 if pressure is Pressure.WAIT else 0)


def test_clean_victims_go_first_and_dirty_ones_stay():
    """A page that stands on disk too leaves before an older one that does not."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 4))
    put(shell, line(50, 4), ack=Ack.DURABLE)
    put(shell, line(90, 4))
    assert where(shell, line(0, 4)) == ["R", "-"]
    assert where(shell, line(50, 4)) == ["-", "R"]
    assert shell.engine.stats().counters.unsaved_dropped_pages == 0


def test_a_long_run_is_trimmed_from_its_tail_never_dropped_whole():
    """Room for one page costs one page."""
    shell = world(tier(HOST, 20))
    put(shell, line(0, 20))
    put(shell, pages(99))
    assert matched(shell, line(0, 20)) == 19


def test_trimming_page_by_page_does_not_shred_the_node():
    """What was trimmed to disk piece by piece is one run again."""
    shell = world(tier(HOST, 20), tier(DISK, 100))
    put(shell, line(0, 20), ack=Ack.DURABLE)
    for number in range(10):
        put(shell, pages(1000 + number))
    assert matched(shell, line(0, 20)) == 20
    tree = shell.engine._core.namespaces[NS].tree
    runs, _ = tree.runs(tree.match(line(0, 20)))
    assert len(runs) == 2


def test_a_prompt_larger_than_the_tier_gets_its_head():
    """The head of a prompt is worth keeping."""
    shell = world(tier(HOST, 8))
    answer = shell.reserve(ME, NS, line(0, 30), wait_ms=100)
    assert isinstance(answer, act.ReserveResult)
    assert answer.missing_pages == 8


def test_a_page_that_fits_no_segment_is_refused_at_once():
    """INVALID, whatever the caller would wait; other namespaces go on."""
    shell = world(tier(HOST, 8, 4))
    shell.open_namespace(9, Namespace("m", 1, 1 << 20))
    answer = shell.ask(ev.Reserve, session=ME, namespace=9, prompt=line(0, 1), wait_ms=60_000)
    assert isinstance(answer, act.Failure)
    assert answer.code is ErrorCode.INVALID
    put(shell, line(0, 2))


def test_a_page_too_large_for_the_middle_tier_goes_to_the_one_below():
    """A tier that cannot hold the page is passed over on the way down."""
    shell = world(tier(DEVICE, 8), tier(HOST, 8, 8), tier(DISK, 100))
    shell.open_namespace(9, Namespace("m", 1, 128))
    put(shell, line(0, 4), namespace=9)
    put(shell, line(50, 4), namespace=9, wait_ms=1000)
    shell.finish_all()
    assert where(shell, line(0, 4), 9) == ["-", "-", "R"]


def test_a_latched_first_tier_takes_no_stores_and_still_serves():
    """UNAVAILABLE at once; what is there can be read."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 4))
    shell.latch(0, readable=True)
    answer = shell.store(ME, NS, line(50, 4), wait_ms=5000)
    assert isinstance(answer, act.Failure)
    assert answer.code is ErrorCode.UNAVAILABLE
    assert fetch(shell, line(0, 4)).granted_pages == 4


def test_who_stored_first_wins_and_the_other_is_told():
    """ALREADY_PRESENT for pages that came in between; their room goes back."""
    shell = world(tier(HOST, 8))
    mine = shell.reserve(ME, NS, line(0, 4))
    put(shell, line(0, 4), session=OTHER)
    answer = _commit(shell, mine, line(0, 4), [(0, 4)], last=True)
    assert answer == act.CommitResult(0, 4, 0, 0)
    assert used(shell, 0) == 4 * 64


def test_commits_that_finish_out_of_order_appear_in_page_order():
    """A later piece waits for the earlier one, so that no hole can be seen."""
    shell = world(tier(HOST, 8))
    granted = shell.reserve(ME, NS, line(0, 4))
    first, second = next(shell.requests), next(shell.requests)
    for request, piece in ((first, (0, 2)), (second, (2, 2))):
        shell.handle(ev.Commit(request, ME, granted.reservation, [piece], (NS, line(0, 4))))
    shell.finish(1)
    assert matched(shell, line(0, 4)) == 0
    shell.finish(0)
    assert matched(shell, line(0, 4)) == 4
    assert {first, second} <= set(shell.replies)


def test_a_failed_piece_fails_those_after_it_and_can_be_committed_again():
    """Nothing is written over while a later piece of the failed chain is still being copied."""
    shell = world(tier(HOST, 8))
    granted = shell.reserve(ME, NS, line(0, 4))
    first, second = next(shell.requests), next(shell.requests)
    for request, piece in ((first, (0, 2)), (second, (2, 2))):
        shell.handle(ev.Commit(request, ME, granted.reservation, [piece], (NS, line(0, 4))))
    shell.finish(0, [Outcome.OK, Outcome.FAULT])
    assert shell.replies[first] == act.CommitResult(1, 0, 0, 1)
    early = shell.ask(
        ev.Commit, session=ME, reservation=granted.reservation, pieces=[(1, 3)], source=(NS, line(0, 4))
    )
    assert isinstance(early, act.Failure)
    assert early.code is ErrorCode.UNAVAILABLE
    shell.finish(0)
    assert shell.replies[second] == act.CommitResult(0, 0, 0, 2)
    assert _commit(shell, granted, line(0, 4), [(1, 3)], last=True) == act.CommitResult(3, 0, 0, 0)
    assert matched(shell, line(0, 4)) == 4


@pytest.mark.parametrize("pieces", [[(1, 1)], [(0, 0)], [(0, 2), (3, 1)], [(0, 5)]])
def test_pieces_out_of_order_or_beyond_the_end_are_invalid_and_change_nothing(pieces: list[tuple[int, int]]):
    """INVALID_ARGUMENT, and the same reservation goes on."""
    shell = world(tier(HOST, 8))
    granted = shell.reserve(ME, NS, line(0, 4))
    answer = _commit(shell, granted, line(0, 4), pieces)
    assert isinstance(answer, act.Failure)
    assert answer.code is ErrorCode.INVALID
    assert _commit(shell, granted, line(0, 4), [(0, 4)], last=True).stored_pages == 4


def test_another_sessions_reservation_is_out_of_reach():
    """Neither commit nor abort of a stranger has an effect."""
    shell = world(tier(HOST, 8))
    granted = shell.reserve(ME, NS, line(0, 4))
    shell.handle(ev.Abort(OTHER, granted.reservation))
    answer = shell.ask(
        ev.Commit, session=OTHER, reservation=granted.reservation, pieces=[(0, 4)], source=(NS, line(0, 4))
    )
    assert isinstance(answer, act.Failure)
    assert answer.code is ErrorCode.NOT_FOUND
    assert _commit(shell, granted, line(0, 4), [(0, 4)]).stored_pages == 4


def test_an_expired_reservation_gives_its_room_back_when_its_copies_are_done():
    """Room that a worker still writes to is not given to anybody."""
    shell = world(tier(HOST, 8))
    granted = shell.reserve(ME, NS, line(0, 8), ttl_ms=500)
    request = next(shell.requests)
    shell.handle(ev.Commit(request, ME, granted.reservation, [(0, 2)], (NS, line(0, 8))))
    shell.advance(600)
    assert used(shell, 0) == 8 * 64
    shell.finish_all()
    assert used(shell, 0) == 2 * 64
    assert shell.replies[request] == act.CommitResult(2, 0, 0, 0)
    assert shell.engine.stats().counters.expired_reservations == 1


def test_pages_whose_parent_was_lost_meanwhile_are_a_conflict():
    """ABORTED: match again; nothing hangs in the air."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 2))
    granted = shell.reserve(ME, NS, line(0, 4))
    shell.rot(NS, line(0, 1), 0)
    shell.handle(ev.PageCorrupt(NS, 0, line(0, 1)))
    answer = _commit(shell, granted, line(0, 4), [(2, 2)])
    assert isinstance(answer, act.Failure)
    assert answer.code is ErrorCode.CONFLICT
    assert matched(shell, line(0, 4)) == 0


def test_the_page_before_a_reservation_is_not_dropped():
    """The anchor keeps what the new pages are going to hang from."""
    shell = world(tier(HOST, 8))
    put(shell, line(0, 2))
    granted = shell.reserve(ME, NS, line(0, 4))
    put(shell, line(50, 4), session=OTHER)
    shell.store(OTHER, NS, line(70, 4), wait_ms=100)
    assert matched(shell, line(0, 2)) == 2
    assert _commit(shell, granted, line(0, 4), [(2, 2)], last=True).stored_pages == 2


def test_an_empty_last_commit_ends_the_reservation():
    """``last`` without pages gives the room back."""
    shell = world(tier(HOST, 8))
    granted = shell.reserve(ME, NS, line(0, 4))
    assert _commit(shell, granted, line(0, 4), [], last=True) == act.CommitResult(0, 0, 0, 0)
    assert used(shell, 0) == 0


def test_a_commit_straight_to_disk_survives_the_eviction_of_the_same_key():
    """On a disk-only server a page deleted while a second store of it is on its way is not called stored."""
    shell = world(tier(DISK, 8))
    granted = shell.reserve(ME, NS, line(0, 2))
    request = next(shell.requests)
    shell.handle(
        ev.Commit(request, ME, granted.reservation, [(0, 2)], (NS, line(0, 2)), Ack.DURABLE, last=True)
    )
    other = shell.reserve(OTHER, NS, line(0, 2))
    copy = next(shell.requests)
    shell.handle(ev.Commit(copy, OTHER, other.reservation, [(0, 2)], (NS, line(0, 2)), last=True))
    shell.finish(1)
    shell.ask(ev.Clear, namespace=NS)
    shell.finish(0)
    assert shell.replies[request] == act.CommitResult(0, 0, 0, 2)
    assert used(shell, 0) <= 2 * 8192


def test_a_failed_commit_to_disk_leaves_nothing_behind_beside_a_prompt_that_branches_off():
    """Pages that arrived after one that failed are deleted again, whatever stands next to them."""
    shell = world(tier(DISK, 20))
    granted = shell.reserve(ME, NS, pages(1, 5, 6, 7))
    put(shell, pages(1, 2, 3, 4), session=OTHER)
    request = next(shell.requests)
    shell.handle(ev.Commit(request, ME, granted.reservation, [(0, 4)], (NS, pages(1, 5, 6, 7))))
    shell.finish(0, [Outcome.OK, Outcome.FULL, Outcome.OK, Outcome.OK])
    assert shell.replies[request] == act.CommitResult(0, 1, 0, 3)
    assert len(shell.content[0]) == 4


def _commit(shell, granted, prompt, pieces, *, last=False):
    request = next(shell.requests)
    shell.handle(ev.Commit(request, ME, granted.reservation, pieces, (NS, prompt), last=last))
    return shell.settle(request)
