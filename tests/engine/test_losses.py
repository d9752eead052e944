"""Corruption, failed tiers, holes and gaps: what is lost, and what comes back."""

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

from hicache.types import Ack, Outcome


def corrupt(shell, prompt, index):
    assert shell.rot(NS, prompt, index)
    shell.handle(ev.PageCorrupt(NS, index, prompt))


def test_a_corrupt_page_is_a_miss_and_what_hangs_below_is_stranded():
    """Never matched, counted, alive again when the hole is filled."""
    shell = world(tier(HOST, 16))
    put(shell, line(0, 6))
    corrupt(shell, line(0, 3), 0)
    assert matched(shell, line(0, 6)) == 2
    assert shell.engine.stats().stranded_pages == 3
    answer = put(shell, line(0, 6))
    assert (answer.stored_pages, answer.already_present_pages) == (1, 3)
    assert matched(shell, line(0, 6)) == 6
    assert shell.engine.stats().stranded_pages == 0


def test_a_hole_of_several_pages_can_be_filled_piece_by_piece():
    """What is left of a hole is still one."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 6), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=line(0, 6), tier=0)
    lease = fetch(shell, line(0, 4))
    shell.finish(0, [Outcome.OK] + [Outcome.MISS] * 3, source_fault=True)
    assert shell.engine.lease_view(ME, lease.lease).granted_pages == 1
    put(shell, line(0, 2))
    assert matched(shell, line(0, 6)) == 2
    put(shell, line(0, 4))
    assert matched(shell, line(0, 6)) == 6


def test_stranded_pages_are_the_first_victims():
    """Nobody can match them: they go before anything that is older."""
    shell = world(tier(HOST, 10))
    put(shell, line(50, 4))
    put(shell, line(0, 6))
    corrupt(shell, line(0, 1), 0)
    put(shell, line(90, 5))
    assert matched(shell, line(50, 4)) == 4
    assert shell.engine.stats().stranded_pages < 5


def test_a_corrupt_page_under_lease_leaves_when_the_lease_does():
    """The reader keeps its pins; the page is shown to nobody any more."""
    shell = world(tier(HOST, 16))
    put(shell, line(0, 4))
    lease = fetch(shell, line(0, 4))
    corrupt(shell, line(0, 3), 0)
    assert shell.engine.lease_view(ME, lease.lease).granted_pages == 2
    assert fetch(shell, line(0, 4), session=OTHER).granted_pages == 2
    shell.handle(ev.SessionEnded(OTHER, dead=True))
    shell.handle(ev.ReleaseLeases(ME, [lease.lease]))
    assert matched(shell, line(0, 4)) == 2
    assert shell.engine.stats().counters.corrupt_pages == [1]


def test_new_leases_do_not_keep_a_corrupt_page_from_leaving():
    """However many readers come one after another, overlapping: the page leaves with the last that held it before."""
    shell = world(tier(HOST, 16), tier(DISK, 64))
    put(shell, line(0, 6), ack=Ack.DURABLE)
    lease = fetch(shell, line(0, 6))
    corrupt(shell, line(0, 4), 0)
    later = [fetch(shell, line(0, 6), session=OTHER) for _ in range(3)]
    assert [(each.matched_pages, each.granted_pages) for each in later] == [(3, 3)] * 3
    shell.handle(ev.ReleaseLeases(ME, [lease.lease]))
    assert [place.tier for place in shell.engine.page_places(NS, line(0, 4))] == [1]
    healed = fetch(shell, line(0, 6))
    assert healed.matched_pages == 6
    while shell.pending:
        shell.finish()
    assert shell.engine.lease_view(ME, healed.lease).granted_pages == 6


def test_where_a_page_is():
    """For those who look at every copy of a page."""
    shell = world(tier(HOST, 16), tier(DISK, 64))
    put(shell, line(0, 4))
    lease = fetch(shell, line(0, 4))
    slots = [slot for piece in lease.pieces for slot in piece.slots]
    for page in range(4):
        (place,) = shell.engine.page_places(NS, line(0, page + 1))
        assert (place.tier, place.slot) == (0, slots[page])
    put(shell, line(9, 2), ack=Ack.DURABLE)
    assert [(place.tier, place.slot >= 0) for place in shell.engine.page_places(NS, line(9, 2))] == [
        (0, True),
        (1, False),
    ]
    assert shell.engine.page_places(NS, line(0, 5)) == []
    assert shell.engine.page_places(NS, b"") == []
    corrupt(shell, line(0, 2), 0)
    assert shell.engine.page_places(NS, line(0, 2)) == [], "it is to leave"


def test_a_page_reported_twice_counts_once():
    """Two readers may see the same rot."""
    shell = world(tier(HOST, 16))
    put(shell, line(0, 4))
    fetch(shell, line(0, 4))
    for _ in range(2):
        corrupt(shell, line(0, 3), 0)
    assert shell.engine.stats().counters.corrupt_pages == [1]


def test_a_tier_that_goes_while_pages_are_leased_condemns_every_part_of_them():
    """A run that is split afterwards is void in both parts."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 8))
    lease = fetch(shell, line(0, 8))
    shell.latch(0, readable=False)
    fetch(shell, line(0, 4), session=OTHER)
    shell.handle(ev.SessionEnded(OTHER, dead=True))
    shell.handle(ev.ReleaseLeases(ME, [lease.lease]))
    assert matched(shell, line(0, 8)) == 0
    assert used(shell, 0) == 0


def test_a_page_corrupt_on_disk_is_written_there_again_from_host():
    """The gap is mended, so that what is below can be matched after a crash."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 6), ack=Ack.DURABLE)
    corrupt(shell, line(0, 2), 1)
    assert where(shell, line(0, 2)) == ["R", "F"]
    shell.finish_all()
    assert where(shell, line(0, 2)) == ["R", "R"]
    assert not shell.engine._core.gaps


def test_pages_that_the_disk_found_damaged_are_known_to_be_lost():
    """Anywhere in a run, several at once, and keys that nobody has."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 8), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=line(0, 8), tier=0)
    keys = list(shell.content[1])
    shell.lose(1, [keys[6], keys[2], bytes(32)])
    assert matched(shell, line(0, 8)) == 2
    assert shell.engine.stats().counters.corrupt_pages == [0, 2]
    assert shell.engine.stats().stranded_pages == 4
    assert put(shell, line(0, 8)).stored_pages == 2
    shell.finish_all()
    assert matched(shell, line(0, 8)) == 8


def test_a_refilled_hole_is_written_to_disk_again_where_the_disk_has_what_is_below():
    """Recommitting a lost page mends the disk, too, whatever the write policy."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 6), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=line(0, 6), tier=0)
    corrupt(shell, line(0, 2), 1)
    assert matched(shell, line(0, 6)) == 1
    put(shell, line(0, 2))
    shell.finish_all()
    assert matched(shell, line(0, 6)) == 6
    assert where(shell, line(0, 2)) == ["R", "R"]


def test_pages_below_a_gap_are_not_called_durable():
    """A commit's copy arrives, the one above it failed: nothing is promised, or the gap is mended first."""
    shell = world(tier(HOST, 16), tier(DISK, 100), max_copy_pages=2)
    put(shell, line(0, 2))
    granted = shell.reserve(ME, NS, line(0, 4))
    request = next(shell.requests)
    shell.handle(
        ev.Commit(request, ME, granted.reservation, [(2, 2)], (NS, line(0, 4)), Ack.DURABLE, last=True)
    )
    shell.finish()
    assert [len(copy.keys) for copy in shell.pending] == [2, 2]
    shell.finish(0, [Outcome.FAULT] * 2)
    shell.finish(0)
    assert request not in shell.replies or shell.replies[request].durable_pages == 0
    answer = shell.settle(request)
    if answer.durable_pages:
        assert (NS, line(0, 2)) in shell.disk_pages()
    assert shell.engine.match(NS, line(0, 4)).pages == 4


def test_a_disk_that_fails_every_copy_answers_a_durable_commit_in_the_end():
    """Visible, not durable; no copying without end."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    granted = shell.reserve(ME, NS, line(0, 4))
    request = next(shell.requests)
    shell.handle(
        ev.Commit(request, ME, granted.reservation, [(0, 4)], (NS, line(0, 4)), Ack.DURABLE, last=True)
    )
    shell.finish()
    for _ in range(20):
        if not shell.pending:
            break
        shell.finish(0, [Outcome.FULL] * 4)
    assert shell.replies[request] == act.CommitResult(4, 0, 0, 0)
    assert shell.engine._core.copies == {}


def test_a_source_that_is_gone_is_a_loss_and_a_full_target_is_not():
    """The blame decides whether the page stays."""
    for fault, remains in ((True, 2), (False, 4)):
        shell = world(tier(HOST, 16), tier(DISK, 100))
        put(shell, line(0, 4))
        shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(0, 4), tier=1)
        shell.finish(0, [Outcome.OK, Outcome.OK, Outcome.CORRUPT, Outcome.CORRUPT], source_fault=fault)
        assert matched(shell, line(0, 4)) == remains


def test_a_read_only_disk_still_serves_and_host_pages_are_dropped_when_room_is_needed():
    """Latched but readable: a smaller cache, not a dead one."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 4), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=line(0, 4), tier=0)
    shell.latch(1, readable=True)
    lease = fetch(shell, line(0, 4))
    shell.finish_all()
    assert shell.engine.lease_view(ME, lease.lease).granted_pages == 4
    put(shell, line(50, 4))
    put(shell, line(90, 4))
    assert matched(shell, line(50, 4)) == 0


def test_a_disk_that_is_gone_takes_its_pages_with_it():
    """What stood nowhere else is missed; what stood in host is not; copies under way fail quietly."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 4), ack=Ack.DURABLE)
    put(shell, line(50, 4))
    shell.handle(ev.Reserve(900, ME, NS, line(90, 4), wait_ms=1000))
    shell.settle(900)
    assert where(shell, line(0, 4)) == ["-", "R"]
    shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(50, 4), tier=1)
    shell.latch(1, readable=False)
    shell.finish_all()
    assert (matched(shell, line(0, 4)), matched(shell, line(50, 4))) == (0, 4)
    assert used(shell, 1) == 0
    shell.latch(1, readable=False)


def test_a_gap_above_a_read_only_disk_does_not_clog_the_host_tier():
    """A page that cannot be saved any more goes, with what hangs below it."""
    shell = world(tier(HOST, 4), tier(DISK, 100))
    put(shell, line(0, 4), ack=Ack.DURABLE)
    shell.ask(ev.Evict, namespace=NS, prompt=line(0, 4)[:0], tier=0)
    corrupt(shell, line(0, 2), 1)
    shell.latch(1, readable=True)
    put(shell, line(0, 2))
    assert matched(shell, line(0, 4)) == 4
    put(shell, line(50, 4))
    assert matched(shell, line(0, 4)) < 4
    assert matched(shell, line(50, 4)) == 4


def test_a_parent_in_host_with_children_only_on_the_device_gives_way_in_the_end():
    """Where nothing else is left to drop, a small family goes together."""
    shell = world(tier(DEVICE, 4), tier(HOST, 4))
    put(shell, line(0, 4))
    put(shell, line(50, 4), wait_ms=1000)
    shell.finish_all()
    assert where(shell, line(0, 4)) == ["-", "R"]
    put(shell, line(0, 4) + pages(77), wait_ms=1000)
    shell.finish_all()
    for number in range(6):
        put(shell, line(200 + 10 * number, 4), wait_ms=1000)
        shell.finish_all()
    assert shell.engine.stats().counters.refused_calls == 0


@pytest.mark.parametrize("prompt", [b"", line(0, 9), line(5, 1)])
def test_a_report_about_a_page_that_is_not_there_changes_nothing(prompt: bytes):
    """It may have been evicted while the report was on its way."""
    shell = world(tier(HOST, 16))
    put(shell, line(0, 4))
    shell.handle(ev.PageCorrupt(NS, 0, prompt))
    assert matched(shell, line(0, 4)) == 4
