"""When lower copies are made: the three write policies, cold pages ahead of need, cascades."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from worlds import DEVICE, DISK, HOST, NS, act, ev, fetch, line, pages, put, tier, where, world

from hicache.types import Outcome, WritePolicy


def copied(shell, dst):
    """Pages of the copies into a tier that were started so far."""
    return sum(
        len(c.keys) or len(c.dst_slots) for c in shell.moved if isinstance(c, act.Copy) and c.dst_tier == dst
    )


def test_write_through_copies_at_insert_through_every_tier():
    """A stored page is on disk, too, as soon as the copies are done."""
    shell = world(tier(DEVICE, 8), tier(HOST, 16), tier(DISK, 100), write_policy=WritePolicy.THROUGH)
    put(shell, line(0, 4))
    shell.finish_all()
    assert where(shell, line(0, 4)) == ["R", "R", "R"]


def test_write_through_follows_a_split_that_comes_before_the_copy():
    """A run that is cut while it waits is written through with both its parts."""
    shell = world(tier(HOST, 40), tier(DISK, 100), write_policy=WritePolicy.THROUGH, max_copies=1)
    put(shell, line(0, 4))
    put(shell, line(50, 8))
    fetch(shell, line(50, 3))
    shell.finish_all()
    assert where(shell, line(50, 8)) == ["R", "R"]


def test_selective_write_through_copies_at_the_nth_use():
    """Not at the first use, but at the second; at once, without another event."""
    shell = world(tier(HOST, 16), tier(DISK, 100), write_policy=WritePolicy.SELECTIVE, selective_hits=2)
    put(shell, line(0, 4))
    fetch(shell, line(0, 4))
    assert where(shell, line(0, 4)) == ["R", "-"]
    fetch(shell, line(0, 4))
    assert where(shell, line(0, 4)) == ["R", "F"]
    shell.finish_all()
    fetch(shell, line(0, 4))
    assert copied(shell, 1) == 4


def test_write_back_copies_at_eviction_only():
    """Uses alone make no copy."""
    shell = world(tier(HOST, 8), tier(DISK, 100), write_policy=WritePolicy.BACK)
    put(shell, line(0, 4))
    for _ in range(5):
        fetch(shell, line(0, 4), ttl_ms=1)
    shell.advance(10_000)
    shell.advance(10_000)  # the grace, too
    assert copied(shell, 1) == 0
    put(shell, line(50, 8), wait_ms=1000)
    assert copied(shell, 1) == 4


def test_one_copy_at_a_time_is_enough_for_early_copies():
    """``max_copies`` of 1 does not starve the backlog."""
    shell = world(tier(HOST, 16), tier(DISK, 100), write_policy=WritePolicy.THROUGH, max_copies=1)
    put(shell, line(0, 4))
    shell.finish_all()
    assert where(shell, line(0, 4)) == ["R", "R"]


def test_early_copies_end_even_when_the_tier_below_holds_less():
    """Written-through pages do not push each other out of a smaller tier for ever."""
    shell = world(tier(DEVICE, 16), tier(HOST, 4), tier(DISK, 100), write_policy=WritePolicy.THROUGH)
    for number in range(8):
        put(shell, pages(100 + number))
    shell.finish_all()
    assert copied(shell, 1) <= 16


def test_cold_pages_are_copied_down_before_room_is_needed_and_stay():
    """Below the low-water mark the coldest pages become clean."""
    shell = world(tier(HOST, 10), tier(DISK, 100), free_low_fraction=0.3)
    put(shell, line(0, 4))
    put(shell, line(50, 4))
    shell.finish_all()
    clean = [where(shell, line(start, count)) for start in (0, 50) for count in (4,)]
    assert clean[0] == ["R", "R"]
    assert clean[1] == ["R", "-"]


def test_cold_copies_end_in_a_full_disk_smaller_than_the_host_tier():
    """Copies ahead of need do not go round in circles."""
    shell = world(tier(HOST, 16), tier(DISK, 3), free_low_fraction=0.5)
    for number in range(16):
        put(shell, pages(100 + number), wait_ms=1000)
    shell.finish_all()
    assert copied(shell, 1) < 64


def test_a_failed_early_copy_leaves_the_page_where_it_was():
    """The write-through did not happen; nothing else changed, and the books balance."""
    shell = world(tier(HOST, 16), tier(DISK, 100), write_policy=WritePolicy.THROUGH)
    put(shell, line(0, 4))
    shell.finish(0, [Outcome.FULL] * 4)
    assert where(shell, line(0, 4)) == ["R", "-"]
    assert shell.engine.stats().tiers[1].used_bytes == 0
    assert shell.engine.stats().counters.failed_copy_pages[1] == 4


def test_a_copy_larger_than_one_is_split_and_each_part_settles_alone():
    """``max_copy_pages`` bounds a Copy; the outcome of every page counts."""
    shell = world(tier(HOST, 16), tier(DISK, 100), write_policy=WritePolicy.THROUGH, max_copy_pages=3)
    put(shell, line(0, 8))
    sizes = [len(copy.keys) for copy in shell.pending]
    assert sizes == [3, 3, 2]
    shell.finish(0)
    shell.finish(0, [Outcome.OK, Outcome.FAULT, Outcome.FAULT])
    shell.finish(0, [Outcome.FAULT] * 2)
    assert where(shell, line(0, 4)) == ["R", "R"]
    assert where(shell, line(0, 5)) == ["R", "-"]


def test_a_hit_rescues_a_page_that_is_draining():
    """The copy goes on as a write-through, and the page stays."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 8))
    shell.handle(ev.Reserve(900, 1, NS, line(50, 4), wait_ms=1000))
    assert where(shell, line(0, 8)) == ["D", "F"]
    shell.handle(ev.Touch(NS, line(0, 8)))
    assert where(shell, line(0, 8)) == ["R", "F"]
    assert shell.engine.stats().counters.rescued_pages == 4
    shell.finish()
    assert shell.engine.match(NS, line(0, 8)).pages == 8


def test_a_commit_below_a_draining_page_keeps_it():
    """What has come to hang below a page keeps it in the tier."""
    shell = world(tier(HOST, 8), tier(DISK, 100))
    put(shell, line(0, 4))
    granted = shell.reserve(1, NS, line(0, 5))
    put(shell, line(50, 3))
    fetch(shell, line(50, 3))
    waiting = next(shell.requests)
    shell.handle(ev.Reserve(waiting, 1, NS, line(80, 3), wait_ms=1000))
    assert where(shell, line(0, 4)) == ["D", "F"]
    request = next(shell.requests)
    shell.handle(ev.Commit(request, 1, granted.reservation, [(4, 1)], (NS, line(0, 5)), last=True))
    shell.finish(1)
    assert where(shell, line(0, 4)) == ["R", "F"]
    shell.settle(waiting)
    assert shell.engine.match(NS, line(0, 5)).pages == 5


@pytest.mark.parametrize("policy", ["lru", "sieve"])
def test_equal_events_make_equal_digests_and_others_do_not(policy: str):
    """The digest covers every action, and nothing that is only an address."""

    def run(*prompts):
        shell = world(tier(HOST, 8), tier(DISK, 100), digest=True, policy=policy)
        for prompt in prompts:
            put(shell, prompt, wait_ms=1000)
        return shell.engine.action_digest()

    same = [line(0, 6), line(50, 6)]
    assert run(*same) == run(*same) != run(line(0, 6), line(50, 5))
    assert not world(tier(HOST, 8)).engine.action_digest()


def test_the_digest_leaves_the_source_of_a_commit_out():
    """A client's memory is an address, not a decision."""

    class Memory:
        pass

    def run():
        shell = world(tier(HOST, 8), digest=True)
        granted = shell.reserve(1, NS, line(0, 2))
        event = ev.Commit(50, 1, granted.reservation, [(0, 2)], Memory())
        shell.engine.handle(event, shell.now)
        return shell.engine.action_digest()

    assert run() == run()
