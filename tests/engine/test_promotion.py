"""Promotions that beat computing again: order, fairness, what a cancelled one wastes, and prefetch at look-up."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from worlds import DISK, HOST, ME, NS, OTHER, act, ev, fetch, line, put, tier, where, world

from hicache.engine import leases

LARGE, SMALL = line(0, 40), line(500, 4)


@pytest.fixture
def small_copies(monkeypatch):
    """Pages of the tests are small: let copies of them be, too."""
    monkeypatch.setattr(leases, "LEAST_COPY_BYTES", 64)


def on_disk(*prompts, host=64, **settings):
    """A shell whose prompts are on disk only."""
    shell = world(tier(HOST, host), tier(DISK, 400), max_copy_pages=4, default_ttl_ms=100_000, **settings)
    for prompt in prompts:
        put(shell, prompt)
        for _ in range(20):  # what stands above pages that leave is only copied: it goes with the next call
            shell.ask(ev.Evict, namespace=NS, prompt=prompt, tier=0)
            shell.finish_all()
        assert where(shell, prompt) == ["-", "R"]
    return shell


def counters(shell):
    """The live counters."""
    return shell.engine._core.counters


def granted(shell, lease, session=ME):
    """Pages of a lease that can be read now."""
    return shell.engine.lease_view(session, lease).granted_pages


def test_a_promotion_has_a_bounded_number_of_copies_under_way():
    """All readers have work; the pages go in page order."""
    shell = on_disk(LARGE, promotion_copies=3)
    answer = fetch(shell, LARGE)
    assert [len(copy.keys) for copy in shell.pending] == [4, 4, 4]
    seen = []
    while shell.pending:
        assert len(shell.pending) <= 3
        shell.finish()
        seen.append(granted(shell, answer.lease))
    assert seen == list(range(4, 44, 4))
    assert list(shell.done_operations) == [answer.operation]


def test_a_short_promotion_is_cut_so_that_every_reader_has_work(small_copies):
    """Eight pages go in four copies, not in two."""
    shell = on_disk(line(0, 8))
    fetch(shell, line(0, 8))
    assert [len(copy.keys) for copy in shell.pending] == [2, 2, 2, 2]


def test_tiny_pages_are_not_moved_one_by_one():
    """A copy has its cost: a megabyte is not cut."""
    shell = on_disk(line(0, 4))
    fetch(shell, line(0, 4))
    assert [len(copy.keys) for copy in shell.pending] == [4]


def test_a_small_fetch_does_not_wait_behind_a_large_one():
    """It has its pages after the copies that were under way when it came."""
    shell = on_disk(LARGE, SMALL, promotion_copies=2)
    large = fetch(shell, LARGE)
    small = fetch(shell, SMALL, session=OTHER)
    for _ in range(3):
        shell.finish()
    assert granted(shell, small.lease, OTHER) == 4
    assert granted(shell, large.lease) < 40


def test_what_is_cancelled_or_released_moves_no_more_than_was_under_way():
    """The rest never starts, and its room is not taken."""
    for end in (
        lambda answer: ev.CancelOperation(ME, answer.operation),
        lambda answer: ev.ReleaseLeases(ME, [answer.lease]),
        lambda _: ev.SessionEnded(ME, dead=True),
    ):
        shell = on_disk(LARGE, promotion_copies=2)
        before = counters(shell).copied_pages[1][0]
        answer = fetch(shell, LARGE)
        shell.handle(end(answer))
        shell.finish_all()
        assert counters(shell).copied_pages[1][0] - before == 8


def test_an_expired_lease_moves_no_more():
    """As if it had been released."""
    shell = on_disk(LARGE, promotion_copies=2)
    fetch(shell, LARGE, ttl_ms=10)
    shell.advance(20)
    shell.finish_all()
    assert counters(shell).copied_pages[1][0] == 8


# --- prefetch at look-up


def look_up(shell, prompt):
    """What Match with ``prefetch`` hands in."""
    shell.handle(ev.Touch(NS, prompt, prefetch=True))


def test_a_look_up_starts_what_a_fetch_would_wait_for():
    """The Fetch that follows has its pages at once, and they count as used."""
    shell = on_disk(LARGE)
    look_up(shell, LARGE)
    shell.finish_all()
    assert fetch(shell, LARGE).granted_pages == 40
    found = counters(shell)
    assert (found.prefetched_pages, found.used_prefetched_pages, found.unused_prefetched_pages) == (40, 40, 0)
    assert not shell.engine._core.warmed
    assert not shell.engine._core.warming


def test_a_fetch_joins_what_is_on_its_way():
    """Nothing is copied twice."""
    shell = on_disk(LARGE)
    look_up(shell, LARGE)
    fetch(shell, LARGE)
    shell.finish_all()
    found = counters(shell)
    assert found.copied_pages[1][0] == 40
    assert found.used_prefetched_pages == found.prefetched_pages > 0


def test_what_is_prefetched_and_leaves_unused_is_waste():
    """Also where only a part of it was fetched."""
    shell = on_disk(LARGE)
    look_up(shell, LARGE)
    shell.finish_all()
    fetch(shell, line(0, 10), ttl_ms=1)
    shell.advance(100_000)
    shell.ask(ev.Evict, namespace=NS, prompt=LARGE, tier=0)
    found = counters(shell)
    assert (found.prefetched_pages, found.used_prefetched_pages, found.unused_prefetched_pages) == (
        40,
        10,
        30,
    )


def test_look_ups_leave_bandwidth_to_fetches():
    """So many at one time, and none where copies are many; the others are counted."""
    prompts = [line(100 * number, 8) for number in range(6)]
    shell = on_disk(*prompts, promotion_copies=1)
    for prompt in prompts:
        look_up(shell, prompt)
    assert (len(shell.pending), counters(shell).skipped_prefetches) == (4, 2)
    shell.finish_all()
    assert counters(shell).prefetched_pages == 32
    shell = on_disk(LARGE, SMALL, max_copies=4)
    fetch(shell, LARGE)
    look_up(shell, SMALL)
    assert counters(shell).skipped_prefetches == 1


def test_a_look_up_of_what_is_there_or_unknown_starts_nothing():
    """And is not counted as skipped."""
    shell = on_disk(SMALL)
    fetch(shell, SMALL)
    shell.finish_all()
    look_up(shell, SMALL)
    look_up(shell, line(900, 4))
    assert not shell.pending
    assert counters(shell).skipped_prefetches == 0


def test_the_books_of_prefetch_balance(seed):
    """Whatever happens: what was brought was used, is there still, or left unused."""
    draw = random.Random(seed)
    prompts = [line(0, 12) + line(100 * number, 8) for number in range(1, 6)]
    shell = world(tier(HOST, 24, 2), tier(DISK, 400), max_copy_pages=3, promotion_copies=2, default_ttl_ms=50)
    for _ in range(300):
        prompt = draw.choice(prompts)
        kind = draw.randrange(5)
        if kind == 0:
            shell.store(ME, NS, prompt, wait_ms=1000)
        elif kind == 1:
            fetch(shell, prompt[: 4 * draw.randint(1, 20)], ttl_ms=20)
        elif kind == 2:
            look_up(shell, prompt)
        elif kind == 3 and shell.pending:
            shell.finish(draw.randrange(len(shell.pending)))
        else:
            shell.advance(draw.choice([1, 30, 3000]))
    shell.finish_all()
    found = counters(shell)
    waiting = sum(run.pages for run in shell.engine._core.warmed)
    assert found.prefetched_pages > 0
    assert found.used_prefetched_pages + found.unused_prefetched_pages + waiting == found.prefetched_pages
    assert all(isinstance(copy, act.Copy | act.CopyIn) for copy in shell.moved)
