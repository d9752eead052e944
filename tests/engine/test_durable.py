"""Durable commits, drains, recovery: what survives, and how it comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from shell import recovery_events
from worlds import (
    DEVICE,
    DISK,
    HOST,
    LORA,
    ME,
    NS,
    TENANT,
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

from hicache.types import Ack


def test_a_durable_commit_is_answered_when_it_and_all_above_are_on_disk():
    """Pages that were only visible are saved with it."""
    shell = world(tier(DEVICE, 8), tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 3))
    answer = put(shell, line(0, 5), ack=Ack.DURABLE)
    assert answer.durable_pages == 2
    assert {(NS, line(0, count)) for count in range(1, 6)} <= shell.disk_pages()


def test_without_a_durable_tier_nothing_is_called_durable():
    """The commit is answered at once, and says so."""
    assert put(world(tier(HOST, 8)), line(0, 4), ack=Ack.DURABLE) == act.CommitResult(4, 0, 0, 0)


def test_ancestors_in_another_tier_go_first():
    """Head in host, tail on the device: the head's copy is under way before the tail's."""
    shell = world(tier(DEVICE, 4), tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 4))
    shell.ask(ev.Evict, namespace=NS, prompt=line(0, 4), tier=0)
    shell.finish_all()
    assert where(shell, line(0, 4)) == ["-", "R", "-"]
    granted = shell.reserve(ME, NS, line(0, 6))
    request = next(shell.requests)
    shell.handle(
        ev.Commit(request, ME, granted.reservation, [(4, 2)], (NS, line(0, 6)), Ack.DURABLE, last=True)
    )
    shell.finish()
    assert [copy.src_tier for copy in shell.pending] == [1]
    assert shell.settle(request).durable_pages == 2
    assert {(NS, line(0, count)) for count in range(1, 7)} <= shell.disk_pages()


def test_a_path_that_the_disk_cannot_hold_whole_is_saved_as_far_as_it_goes():
    """Its head is worth keeping; the commit is answered."""
    shell = world(tier(HOST, 16), tier(DISK, 4), max_copy_pages=2)
    answer = put(shell, line(0, 14), ack=Ack.DURABLE)
    assert 0 < answer.durable_pages < 14
    assert {(NS, line(0, count)) for count in range(1, answer.durable_pages + 1)} <= shell.disk_pages()


def test_a_durable_commit_of_pages_that_never_get_room_is_answered_in_time():
    """Others keep the disk busy: after a while without progress the answer says what is durable."""
    shell = world(tier(HOST, 16), tier(DISK, 4), default_ttl_ms=1000)
    put(shell, line(0, 4), ack=Ack.DURABLE)
    shell.ask(ev.Pin, namespace=NS, prompt=line(0, 4), tier=1)
    shell.ask(ev.Evict, namespace=NS, prompt=line(0, 4), tier=0)
    shell.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(0, 4), tier=0)  # a copy that does not end
    granted = shell.reserve(ME, NS, line(50, 2))
    request = next(shell.requests)
    shell.handle(
        ev.Commit(request, ME, granted.reservation, [(0, 2)], (NS, line(50, 2)), Ack.DURABLE, last=True)
    )
    shell.finish(1)
    assert request not in shell.replies
    shell.advance(1001)
    assert shell.replies[request] == act.CommitResult(2, 0, 0, 0)


def test_drain_saves_everything_in_order_of_paths():
    """All namespaces, parents before children; nothing unsaved."""
    shell = world(tier(HOST, 64), tier(DISK, 200), max_copy_pages=4)
    for number in range(5):
        put(shell, line(0, 3) + line(100 * number, 6))
        put(shell, line(10 * number, 3), namespace=LORA)
    request = next(shell.requests)
    shell.handle(ev.Drain(request, 60_000))
    while shell.pending:
        shell.finish()
        have = shell.disk_pages()
        assert all(len(prompt) == 4 or (namespace, prompt[:-4]) in have for namespace, prompt in have)
    assert shell.replies[request] == act.DrainResult(0)


def test_drain_ends_at_its_deadline_and_says_what_is_not_saved():
    """Grace over: the count is honest."""
    shell = world(tier(HOST, 16), tier(DISK, 100), max_copy_pages=2, max_copies=1)
    put(shell, line(0, 6))
    request = next(shell.requests)
    shell.handle(ev.Drain(request, 500))
    shell.finish()
    shell.advance(500)
    assert shell.replies[request] == act.DrainResult(4)


def test_drain_passes_over_what_cannot_be_saved():
    """A window full of hopeless pages does not keep the others from being saved."""
    shell = world(tier(HOST, 200), tier(DISK, 400), check=False)
    for number in range(70):
        put(shell, pages(number, 1000 + number))
        shell.rot(NS, pages(number), 0)
        shell.handle(ev.PageCorrupt(NS, 0, pages(number)))
    put(shell, line(5000, 6))
    request = next(shell.requests)
    shell.handle(ev.Drain(request, 60_000))
    assert shell.settle(request) == act.DrainResult(70)
    assert where(shell, line(5000, 6)) == ["R", "R"]


@pytest.mark.parametrize("tiers", [(tier(HOST, 8),), (tier(HOST, 8), tier(DISK, 100))])
def test_drain_of_what_no_disk_takes_is_answered_at_once(tiers):
    """No disk, or one that latched: everything is unsaved."""
    shell = world(*tiers)
    put(shell, line(0, 4))
    if len(tiers) > 1:
        shell.latch(1, readable=True)
    assert shell.ask(ev.Drain, grace_ms=5000) == act.DrainResult(4)
    assert world(*tiers).ask(ev.Drain, grace_ms=0) == act.DrainResult(0)


def test_what_a_crash_leaves_on_disk_is_matched_after_a_restart():
    """Run, drain, feed the disk back: every prompt matches as before, and reads right."""
    shell = world(tier(HOST, 32), tier(DISK, 200), max_copy_pages=5)
    prompts = [
        (namespace, line(0, 4) + line(100 * n, 3 + n)) for n in range(4) for namespace in (NS, LORA, TENANT)
    ]
    for namespace, prompt in prompts:
        put(shell, prompt, namespace=namespace, wait_ms=1000)
    assert shell.settle(_drain(shell)) == act.DrainResult(0)
    fresh = shell.restart(shell.engine.options)
    fresh.handle(ev.SessionOpened(ME, "default"))
    fresh.finish_all()
    for namespace, prompt in prompts:
        assert matched(fresh, prompt, namespace) == matched(shell, prompt, namespace) == len(prompt) // 4
        lease = fetch(fresh, prompt, namespace=namespace)
        fresh.finish_all()
        fresh.verify(namespace, prompt, fresh.engine.lease_view(ME, lease.lease))
        fresh.handle(ev.ReleaseLeases(ME, [lease.lease]))
    assert fresh.engine.stats().counters.recovered_pages == len(shell.disk_pages())


def test_kill_at_any_moment_leaves_what_was_said_to_be_durable():
    """After each completed copy a restart matches at least what was acknowledged so far."""
    shell = world(tier(HOST, 16), tier(DISK, 200), max_copy_pages=2)
    told = {}
    for number in range(4):
        prompt = line(0, 2) + line(50 * number, 4)
        if put(shell, prompt, ack=Ack.DURABLE, wait_ms=1000).durable_pages:
            told[prompt] = len(prompt) // 4
        fresh = shell.restart(shell.engine.options)
        fresh.finish_all()
        assert all(matched(fresh, known) == count for known, count in told.items())


def test_clients_may_store_while_pages_are_still_being_recovered():
    """The same pages, stored anew before they were found, are there once; none is deleted."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 8), ack=Ack.DURABLE)
    fresh = shell.restart(shell.engine.options, part_pages=3)
    fresh.handle(ev.SessionOpened(ME, "default"))
    request = next(fresh.requests)
    fresh.handle(ev.Reserve(request, ME, NS, line(0, 6)))
    fresh.handle(
        ev.Commit(
            request + 100,
            ME,
            fresh.replies[request].reservation,
            [(0, 6)],
            (NS, line(0, 6)),
            Ack.DURABLE,
            last=True,
        )
    )
    fresh.finish_all()
    assert fresh.replies[request + 100].durable_pages == 6
    assert matched(fresh, line(0, 8)) == 8
    assert used(fresh, 1) == 8 * 4096
    assert len(fresh.disk_pages()) == 8


def test_recovered_pages_wait_for_what_hangs_below_them():
    """Pressure during a recovery evicts no chain whose children have not come yet."""
    shell = world(tier(HOST, 16), tier(DISK, 12))
    put(shell, line(0, 8), ack=Ack.DURABLE)
    fresh = shell.restart(shell.engine.options, part_pages=2)
    fresh.handle(ev.SessionOpened(ME, "default"))
    fresh.recover_some()
    for number in range(6):
        for request in (900 + 2 * number, 901 + 2 * number):
            fresh.handle(ev.Reserve(request, ME, NS, line(100 + 10 * request, 6)))
        fresh.ask(ev.Prefetch, session=ME, namespace=NS, prompt=line(0, 8), tier=0)
    while fresh.recovery:
        fresh.recover_some()
    assert matched(fresh, line(0, 8)) == 8


def test_a_smaller_disk_than_before_is_trimmed_when_recovery_ends():
    """The bound holds after a change of settings; what remains can be matched."""
    shell = world(tier(HOST, 16), tier(DISK, 40))
    put(shell, line(0, 12), ack=Ack.DURABLE)
    fresh = world(tier(HOST, 16), tier(DISK, 3))
    fresh.content[1] = dict(shell.content[1])
    fresh.recovery = recovery_events(fresh.namespaces, 1, shell.disk_pages(), 4)
    fresh.finish_all()
    assert used(fresh, 1) <= 3 * 8192
    assert matched(fresh, line(0, 12)) == 6


def test_recovery_of_an_unknown_namespace_or_a_tier_that_is_gone_deletes_and_ends():
    """Nothing stays half recovered."""
    shell = world(tier(HOST, 16), tier(DISK, 100))
    put(shell, line(0, 4), ack=Ack.DURABLE)
    fresh = shell.restart(shell.engine.options, part_pages=2)
    first, second = fresh.recovery
    fresh.recovery = []
    fresh.content[1][b"stray"] = (99, b"")
    fresh.handle(ev.Recovered(99, 1, [-1], [b"1234"], [[b"stray"]], [[4096]], done=True))
    assert len(fresh.content[1]) == 4
    fresh.handle(first)
    fresh.latch(1, readable=False)
    fresh.handle(second)
    assert matched(fresh, line(0, 4)) == 0
    assert used(fresh, 1) == 0


def test_two_namespaces_never_meet():
    """Other adapter or tenant: no match, no shared slot; another tenant not even a shared segment."""
    shell = world(tier(HOST, 16, 4), tier(DISK, 100))
    for namespace in (NS, LORA, TENANT):
        put(shell, line(0, 3), namespace=namespace)
        assert matched(shell, line(0, 3), namespace) == 3
    put(shell, line(50, 2))
    assert [matched(shell, line(50, 2), n) for n in (NS, LORA, TENANT)] == [2, 0, 0]
    slots = {
        n: {slot for piece in fetch(shell, line(0, 3), namespace=n).pieces for slot in piece.slots}
        for n in (NS, LORA, TENANT)
    }
    assert not slots[NS] & slots[LORA]
    domains = {segment: domain for segment, (domain, _) in shell.open_segments[0].items()}
    assert {domains[slot >> 24] for slot in slots[NS] | slots[LORA]} == {"default"}
    assert {domains[slot >> 24] for slot in slots[TENANT]} == {"other"}


def _drain(shell):
    request = next(shell.requests)
    shell.handle(ev.Drain(request, 60_000))
    return request
